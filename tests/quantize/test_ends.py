"""What a run leaves when it is ended early, and what it does with models that cannot be judged."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.backends import backend
from edge_runtime.errors import ModelError, StorageError
from quantize import biases, building, cli, latency, models, passes, scratch, served
from quantize.datasets import Dataset
from quantize.passes import Bench
from quantize.passes.graph import Clean
from quantize.passes.integer import StaticInt8
from quantize.recipe import Data, Evaluation, Recipe, Variant
from quantize.workflow import prepare, run

X = np.random.Generator(np.random.PCG64(0)).normal(size=(60, 16)).astype(np.float32)
WAIT_S = 60.0


def product(path: Path, *more: onnx.NodeProto, inner: str = "o", opset: int = 17) -> Path:
    """x [N, 16] -> MatMul -> (more) -> o [N, 4]."""
    weights = np.random.Generator(np.random.PCG64(1)).normal(size=(16, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], [inner], name="in/ner 1"), *more],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", x=X)
    return tmp_path / "data.npz"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_run_that_is_ended_leaves_no_daemon_and_no_folders(
    tmp_path: Path, data: Path, number: int, code: int
) -> None:
    temporary = Path("/tmp") / f"ends-{os.getpid()}-{number}"  # short: it holds sockets
    temporary.mkdir()
    model = product(tmp_path / "m.onnx")
    words = [sys.executable, "-m", "quantize", "auto", str(model), "--data", str(data)]
    process = subprocess.Popen(
        words, env={**os.environ, "TMPDIR": str(temporary)}, stderr=subprocess.DEVNULL
    )
    try:
        _until(lambda: list(temporary.glob("edge-q-*/run/control.sock")))
        daemons = _mentioning(str(temporary))
        assert daemons
        process.send_signal(number)
        assert process.wait(WAIT_S) == code
        _until(lambda: not _mentioning(str(temporary)))
        if number != signal.SIGKILL:
            assert list(temporary.iterdir()) == []
    finally:
        process.kill()
        subprocess.run(["rm", "-rf", str(temporary)], check=True)


def _until(what: object) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.02)


def _mentioning(text: str) -> list[str]:
    """Processes with this in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue  # it ended
    return found


def test_a_float_model_that_answers_nan_is_refused_not_agreed_with(
    tmp_path: Path, data: Path
) -> None:
    root = helper.make_node("Sqrt", ["h"], ["o"])
    model = product(tmp_path / "m.onnx", root, inner="h")
    recipe = Recipe(
        name="nan", source=str(model), data=Data(str(data)), variants=(Variant("fp32"),)
    )
    with pytest.raises(ModelError, match=r"answers NaN .* samples in output 'o'"):
        run(prepare(recipe), tmp_path / "work", None, lambda what: None)


def test_a_quantized_model_is_refused_with_what_is_wanted(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = product(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    StaticInt8().apply(model, out, bench())
    assert cli.main(["auto", str(out), "--data", str(data)]) == 2
    assert "is quantized already" in capsys.readouterr().err


def test_an_old_operator_set_is_raised_so_that_scales_per_channel_can_be_said(
    tmp_path: Path, data: Path
) -> None:
    model = product(tmp_path / "m.onnx", opset=9)
    recipe = Recipe(
        name="old",
        source=str(model),
        data=Data(str(data)),
        evaluation=Evaluation(rounds=3),
        variants=(Variant("int8", passes=({"use": "clean"}, {"use": "static_int8"})),),
    )
    done = run(prepare(recipe), tmp_path / "work", None, lambda what: None)
    int8 = done.outcome.of("int8")
    assert int8.against is not None and int8.score is not None, int8.refusal
    assert onnx.load(int8.path).opset_import[0].version >= 13


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    model = product(tmp_path / "m.onnx")
    for name in ("a.onnx", "b.onnx"):
        Clean().apply(model, tmp_path / f"clean-{name}", bench())
        StaticInt8(method="mse").apply(tmp_path / f"clean-{name}", tmp_path / name, bench())
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_biases_that_nodes_share_or_that_lie_in_rows_are_quantized(tmp_path: Path) -> None:
    """The library copies a shared bias b to b2, which is another tensor's name here."""
    rng = np.random.Generator(np.random.PCG64(3))
    weights = {name: rng.normal(size=(16, 16)).astype(np.float32) for name in ("w1", "w2", "w3")}
    given = {**weights, "b": rng.normal(size=(1, 16)), "c": rng.normal(size=16)}
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "c"], ["c2"], name="one"),
            helper.make_node("Relu", ["c2"], ["r"], name="relu"),
            helper.make_node("Gemm", ["r", "w2", "c"], ["h"], name="two"),
            helper.make_node("Gemm", ["h", "w3", "b"], ["o"], name="three"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, ["N", 16])],
        [numpy_helper.from_array(one.astype(np.float32), name) for name, one in given.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    source, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(model, source)
    before = source.read_bytes()
    StaticInt8().apply(source, out, bench())
    want, got = (backend("onnxruntime").load(one, {}).run({"x": X})["o"] for one in (source, out))
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)
    assert source.read_bytes() == before
    assert biases.separated(model)
    assert {one.name for one in model.graph.initializer} >= {"c", "w1"}
    assert "b" not in {one.name for one in model.graph.initializer}  # nothing uses it now
    assert not biases.separated(model)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_histograms_of_the_library_are_made_of_a_few_samples_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Literal["percentile", "entropy"]
) -> None:
    """All at once, it keeps every activation of the calibration set in memory."""
    calibrate = importlib.import_module("onnxruntime.quantization.calibrate")
    held: list[int] = []
    collect = calibrate.HistogramCollector.collect

    def watched(self: object, given: dict[str, list[np.ndarray]]) -> object:
        held.append(max(sum(len(one) for one in each) for each in given.values()))
        return collect(self, given)

    monkeypatch.setattr(calibrate.HistogramCollector, "collect", watched)
    model, out = product(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    StaticInt8(method=method).apply(model, out, bench())
    want, got = (backend("onnxruntime").load(one, {}).run({"x": X})["o"] for one in (model, out))
    assert np.linalg.norm(got - want) < 0.2 * np.linalg.norm(want)
    assert held == [32, 28]  # of 60 samples


def test_a_slow_model_is_measured_in_fewer_rounds_and_a_quick_one_in_all() -> None:
    def nothing() -> None:
        pass

    ticks = iter(range(0, 100_000, 40))  # each look at the clock is 40 s later
    slow = latency._rounds({"a": nothing, "b": nothing}, 30, lambda: float(next(ticks)))
    assert [len(one) for one in slow.values()] == [latency.ROUNDS_LEAST + 2] * 2
    quick = latency._rounds({"a": nothing}, 7, lambda: 0.0)
    assert len(quick["a"]) == 7


def bench() -> Bench:
    return Bench({"x": X}, (), (), 0, 0, lambda what: None)


def test_an_output_without_an_axis_for_samples_is_one_of_each_sample() -> None:
    state = [np.full((2, 1, 3), number) for number in range(5)]
    assert served._joined("state", state, [1] * 5).shape == (5, 2, 1, 3)
    assert served._joined("scalar", [np.float32(1)] * 5, [1] * 5).shape == (5,)
    assert served._joined("y", [np.zeros((3, 4)), np.zeros((2, 4))], [3, 2]).shape == (5, 4)
    with pytest.raises(ModelError, match="7 rows for 3 samples"):
        served._joined("boxes", [np.zeros((7, 6)), np.zeros((1, 6))], [3, 2])
    with pytest.raises(ModelError, match="another shape for other samples"):
        served._joined("boxes", [np.zeros((7, 6)), np.zeros((1, 6))], [1, 1])


@pytest.mark.parametrize("use", ["static_int8", "dynamic_int8"])
def test_quantizing_writes_nothing_beside_its_source_where_another_job_may_work(
    use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(Path("examples/fashion_mnist/fp32.onnx").read_bytes())
    out = tmp_path / "out" / "small.onnx"
    out.parent.mkdir()
    seen: list[list[str]] = []
    real = onnx.shape_inference.infer_shapes_path

    def infer(*names: str) -> None:
        real(*names)
        seen.append(sorted(path.name for path in tmp_path.iterdir()))  # the library's file is there

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes_path", infer)
    spec = models.read(source)
    samples = {"input": np.zeros((4, 1, 28, 28), np.float32)}
    bench = Bench(samples, spec.inputs, spec.outputs, 0, 0, lambda what: None)
    passes.decode({"use": use}, "passes[0]").apply(source, out, bench)
    assert seen and all(names == ["model.onnx", "out"] for names in seen)


def test_a_full_disk_ends_the_run_and_refuses_no_variant(tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = scratch.Scratch(tmp_path / "work")
    with pytest.raises(StorageError, match="No space left") as caught:
        kept.made("key", ".onnx", full)
    assert caught.value.where == str(tmp_path / "work") and list(kept.folder.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="File exists"):
        scratch.Scratch(tmp_path / "file")
    model = models.read(product(tmp_path / "m.onnx"))
    (chain,) = building.chains([Variant("x", passes=({"use": "clean"},))], model)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(Clean, "apply", full)
        building.build(chain, model, Dataset({"x": X}, None, "x"), 0, kept, lambda _: None)
