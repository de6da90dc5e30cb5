"""The search with training: each training once, shown, paid for in time, and its failure told."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize import executors, moves, scratch, search, trainings, workflow
from quantize.executors import Said
from quantize.recipe import Calibration, Data, Recipe, Search, Variant
from quantize.search import Searched
from quantize.trainings import LOG, Training, Trainings, Untrained
from tests.quantize import lessons
from tests.quantize.inline import InlineExecutor

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="torch is not installed (make test-quantize TORCH=1)",
)
BACKENDS = tuple(
    name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name) is not None
)


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lessons are counted; one single setting of each backend is enough here."""
    monkeypatch.setenv("LESSONS", str(tmp_path / "lessons"))
    monkeypatch.setattr(moves, "SHOTS", {key: shots[:1] for key, shots in moves.SHOTS.items()})
    yield


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.onnx (two layers, 32 channels between them) and its data."""
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.Generator(np.random.PCG64(2))

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "g", "h"], ["logits"], "last", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
        [weight("w", 32, 1, 3, 3), weight("b", 32), weight("g", 4, 32), weight("h", 4)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, folder / "net.onnx")
    x = rng.random((96, 1, 8, 8), dtype=np.float32)
    np.savez(folder / "data.npz", x=x, y=np.arange(96) % 4)
    return folder


def recipe(given: Path, function: str = "train", **limits: object) -> Recipe:
    told = {
        "backends": BACKENDS[:1],
        "rounds": 3,
        "time_s_max": 1000.0,
        "ratios": [0.5],
        "train": f"tests.quantize.lessons:{function}",
        "trials_max": 7,
    }
    return Recipe(
        "net",
        str(given / "net.onnx"),
        Data(str(given / "data.npz")),
        seed=3,
        calibration=Calibration(samples=16),
        variants=(Variant("fp32"),),
        search=msgspec.convert(told | limits, Search),
    )


def searched(recipe: Recipe, folder: Path, said: list[str] | None = None) -> Searched:
    with InlineExecutor() as executor:
        return search.search(recipe, folder, executor, (said if said is not None else []).append)


def pruned(found: Searched) -> list[search.Trial]:
    return [one for one in found.trials if trainings.is_trained(one.variant)]


def cuts(found: Searched) -> set[str]:
    """What was pruned in different ways."""
    return {
        str(step)
        for one in found.trials
        for step in one.variant.passes
        if step["use"] == "prune_channels"
    }


@needs_torch
def test_what_was_trained_once_serves_every_backend_and_the_finalists(
    given: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    limits = {"backends": BACKENDS, "trials_max": 7 * len(BACKENDS)}
    found = searched(recipe(given, **limits), tmp_path / "work", said)
    assert len(pruned(found)) > len(cuts(found)) >= 1
    assert all(one.found for one in pruned(found))
    assert {one.variant.backend for one in pruned(found)} == set(BACKENDS)
    assert len(lessons.lines()) == len(cuts(found))
    assert any(one.startswith("pruned50: epoch 2: loss ") for one in said)
    best = pruned(found)[0].variant
    ready = workflow.prepare(msgspec.structs.replace(found.recipe, variants=(best,)))
    kept = scratch.Scratch(tmp_path / "work")
    chain = next(one for one in ready.chains if one.variant == best)
    keys = trainings.building.keys(chain, ready.source, ready.split.calibration, 3)
    assert all((kept.folder / f"{key}.onnx").exists() for key in keys)


@needs_torch
def test_the_same_seed_trains_the_same(given: Path, tmp_path: Path) -> None:
    first, second = (searched(recipe(given), tmp_path / name) for name in ("a", "b"))
    losses = [[one.found.loss for one in pruned(found) if one.found] for found in (first, second)]
    assert losses[0] and losses[0] == losses[1]
    files = [Path(one.found.path).read_bytes() for one in pruned(first) if one.found]
    again = [Path(one.found.path).read_bytes() for one in pruned(second) if one.found]
    assert files == again


@needs_torch
def test_a_failing_training_refuses_what_needs_it_and_nothing_else(
    given: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    found = searched(recipe(given, "fail"), tmp_path / "work", said)
    assert pruned(found) and {one.refusal for one in pruned(found)} == {
        "fine_tune: tests.quantize.lessons:fail failed: ValueError: no labels today"
    }
    assert lessons.lines() == ["fail"]  # once for all that need it
    assert any("was not trained" in one and "no labels today" in one for one in said)
    others = [one for one in found.trials if one not in pruned(found)]
    assert len(others) > 3 and all(one.found for one in others)
    searched(recipe(given, "fail"), tmp_path / "work")
    assert lessons.lines() == ["fail", "fail"]  # a later command tries again


@needs_torch
def test_a_training_that_was_cut_off_is_done_again(given: Path, tmp_path: Path) -> None:
    with executors.LocalExecutor(1) as executor:
        trained(given, "die_once", tmp_path / "work", executor)
    assert lessons.lines() == ["die", "train"]


@needs_torch
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (make test-quantize)"
)
def test_a_ray_cluster_trains_the_same_file(given: Path, tmp_path: Path) -> None:
    files = []
    for name in ("local", "ray"):
        with executors.executor(name, 2) as executor:
            files.append(trained(given, "train", tmp_path / name, executor))
    assert files[0] == files[1]


def trained(given: Path, function: str, folder: Path, executor: executors.Executor) -> bytes:
    """What a training of half of the channels leaves."""
    told = recipe(given, function)
    kept = scratch.Scratch(folder)
    every = Trainings(told, kept, executor, lambda _: None, lambda: 1000.0)
    cut = {"use": "prune_channels", "ratio": 0.5}
    step = {"use": "fine_tune", "train": f"tests.quantize.lessons:{function}"}
    wanted = trainings.of(workflow.prepare(told), Variant("", passes=(cut, step)))
    assert wanted is not None and every.made([wanted]) == {}
    return (folder / f"{wanted.key}.onnx").read_bytes()


# --- time -----------------------------------------------------------------------------------------


class Trainer(InlineExecutor):
    """Trainings of 50 s each, as far as the clock here knows."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.left_s, self._folder = 120.0, folder

    def submit(self, job: executors.Job) -> None:
        self.jobs.append(job)
        self.left_s -= 50
        (self._folder / f"{job.key}{LOG}").write_text("epoch 1\nepo")
        (self._folder / f"{job.key}.onnx").write_bytes(b"")
        self._said.append((job.key, Said(50.0)))


def test_no_training_begins_that_cannot_end_in_time(given: Path, tmp_path: Path) -> None:
    said: list[str] = []
    executor = Trainer(tmp_path)
    every = Trainings(
        recipe(given), scratch.Scratch(tmp_path), executor, said.append, lambda: executor.left_s
    )
    wanted = [Training(name, chain(ratio)) for name, ratio in (("a", 0.25), ("b", 0.5), ("c", 0.6))]
    assert every.made(wanted) == {"c": Untrained("")}  # 20 s are left, one takes 50 s
    assert [job.key for job in executor.jobs] == ["a", "b"]
    assert "pruned60 is left out: too little time to train" in said
    assert "pruned25: epoch 1" in said and not any(one[-3:] == "epo" for one in said)
    assert every.made(wanted[:2]) == {} and len(executor.jobs) == 2


def chain(ratio: float) -> Variant:
    cut = {"use": "prune_channels", "ratio": ratio}
    return Variant("training", passes=(cut, {"use": "fine_tune", "train": "a:b"}))
