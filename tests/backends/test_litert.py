"""What is particular to LiteRT: names, state, delegates, placement, and its library's manners."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends import litert as door
from edge_runtime.backends.litert import Node, Options, placement_of, replaced
from edge_runtime.backends.protocol import Placement
from edge_runtime.errors import BackendError, RequestError, UsageError
from edge_runtime.tensors import TensorSpec
from tests import tflite_writer

from . import contract

library = contract.installed_tflite()
pytest.importorskip(library, reason="neither LiteRT nor tflite-runtime is installed")

X = np.arange(3, dtype=np.float32).reshape(1, 3)


def written(folder: Path, data: bytes) -> Path:
    path = folder / "model.tflite"
    path.write_bytes(data)
    return path


def load(folder: Path, data: bytes, **options: Any) -> door.LiteRtModel:
    return door.LiteRt().load(written(folder, data), options)


def names(model: door.LiteRtModel) -> tuple[list[str], list[str]]:
    return [spec.name for spec in model.inputs], [spec.name for spec in model.outputs]


class TestNames:
    OWN = (["serving_default_input:0"], ["StatefulPartitionedCall:0"])

    def test_the_signatures_names_are_used(self, tmp_path: Path, weights: np.ndarray):
        model = load(tmp_path, tflite_writer.linear(weights))
        assert names(model) == (["input"], ["output"])

    def test_or_the_tensors_own_on_demand(self, tmp_path: Path, weights: np.ndarray):
        model = load(tmp_path, tflite_writer.linear(weights), names="tensor")
        assert names(model) == self.OWN
        given = np.ones((1, contract.WIDTH), np.float32)
        assert model.run({"serving_default_input:0": given})[self.OWN[1][0]].shape == (1, 4)

    def test_a_signature_of_another_graph_is_not_taken_for_the_main_one(
        self, tmp_path: Path, weights: np.ndarray
    ):
        partial = tflite_writer.Signature({"input": 0}, {})
        model = load(tmp_path, tflite_writer.linear(weights, signatures=[partial]))
        assert names(model) == self.OWN


class TestShapes:
    def test_a_fixed_batch_takes_that_batch_only(self, tmp_path: Path, weights: np.ndarray):
        model = load(tmp_path, tflite_writer.linear(weights, batch=1))
        assert model.inputs[0].shape == (1, contract.WIDTH)
        with pytest.raises(RequestError, match=r"\[2, 16\]"):
            model.run({"input": np.zeros((2, contract.WIDTH), np.float32)})

    def test_a_free_shape_can_be_fixed(self, tmp_path: Path, weights: np.ndarray):
        model = load(tmp_path, tflite_writer.linear(weights), shapes={"input": [3, 16]})
        assert model.inputs == (TensorSpec("input", "FP32", (3, 16)),)
        given = np.ones((3, 16), np.float32)
        np.testing.assert_allclose(model.run({"input": given})["output"], given @ weights, 1e-4)

    @pytest.mark.parametrize(
        ("shapes", "text"),
        [
            ({"input": [1, 17]}, "[-1, 16]"),
            ({"inptu": [1, 16]}, "did you mean 'input'"),
            ({"input": [0, 16]}, ">= 1"),
        ],
    )
    def test_a_wrong_shape_is_a_usage_error(
        self, tmp_path: Path, weights: np.ndarray, shapes: Any, text: str
    ):
        with pytest.raises(UsageError) as caught:
            load(tmp_path, tflite_writer.linear(weights), shapes=shapes)
        assert text in str(caught.value)

    def test_it_works_again_after_shapes_that_do_not_go_together(self, tmp_path: Path):
        model = load(tmp_path, tflite_writer.pair())
        two, five = np.ones((2, 3), np.float32), np.ones((5, 3), np.float32)
        for _ in range(6):  # more often than there are interpreters
            with pytest.raises(BackendError):
                model.run({"a": two, "b": five})
        assert (model.run({"a": two, "b": two})["sum"] == 2).all()

    def test_one_interpreter_serves_many_threads_one_after_the_other(self, tmp_path: Path):
        model = load(tmp_path, tflite_writer.pair(), interpreters=1)
        assert not model.concurrent
        wrong: list[int] = []

        def work(rows: int) -> None:
            given = np.full((rows, 3), rows, np.float32)
            for _ in range(200):
                if not (model.run({"a": given, "b": given})["sum"] == 2 * rows).all():
                    wrong.append(rows)

        threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not wrong and not any(thread.is_alive() for thread in threads)


def test_text_of_any_number_passes_unchanged(tmp_path: Path):
    model = load(tmp_path, tflite_writer.text())
    assert (model.inputs[0].datatype, model.outputs[0].datatype) == ("BYTES", "BYTES")
    for count in (2, 3, 1):
        x = np.array([b"abc", b"\xff\0z", b""][:count], object)
        assert model.run({"x": x})["y"].tolist() == [x.tolist()]
        out = np.empty((1, count), object)
        model.bind({"x": x}, {"y": out})()
        assert out.tolist() == [x.tolist()]


class TestState:
    def test_every_request_starts_anew_by_default(self, tmp_path: Path):
        model = load(tmp_path, tflite_writer.counter())
        given = np.full(1, 5, np.float32)
        run = model.bind({"x": given}, {"total": None})
        assert [float(run()["total"][0]) for _ in range(3)] == [5, 5, 5]
        assert float(model.run({"x": given})["total"][0]) == 5

    @pytest.mark.parametrize(("stateful", "answers"), [("reset", [2, 2, 2]), ("keep", [2, 4, 6])])
    def test_a_state_inside_an_operator_is_reset_or_kept_too(
        self, tmp_path: Path, stateful: str, answers: list[float]
    ):
        model = load(tmp_path, tflite_writer.recurrent(), stateful=stateful)
        assert model.keeps_state == (stateful == "keep")
        x = np.full((1, 1, 1), 2, np.float32)
        run = model.bind({"x": x}, {"y": None})
        got = []
        for _ in range(3):
            got.append(run()["y"].item())
            assert model.run({"x": x})["y"].item() == 2
        assert got == answers

    def test_a_kept_state_goes_from_request_to_request_of_any_binding(self, tmp_path: Path):
        model = load(tmp_path, tflite_writer.counter(), stateful="keep")
        assert not model.concurrent
        one, ten = np.full(1, 1, np.float32), np.full(1, 10, np.float32)
        out = np.zeros(1, np.float32)
        by_one = model.bind({"x": one}, {"total": out})
        by_ten = model.bind({"x": ten}, {"total": None})
        assert [by_one()["total"][0], by_ten()["total"][0]] == [1, 11]
        by_one()
        assert out[0] == 12

    def test_a_golden_neither_sees_nor_moves_a_kept_state(self, tmp_path: Path):
        model = load(tmp_path, tflite_writer.counter(), stateful="keep")
        one = np.full(1, 1, np.float32)
        run = model.bind({"x": one}, {"total": None})
        totals = []
        for _ in range(3):
            totals.append(float(run()["total"][0]))
            assert model.run({"x": one})["total"][0] == 1
        assert totals == [1, 2, 3]

    def test_a_kept_state_has_one_interpreter(self, tmp_path: Path):
        with pytest.raises(UsageError, match="2 states"):
            load(tmp_path, tflite_writer.counter(), stateful="keep", interpreters=2)

    def test_a_model_without_state_may_ask_to_keep_it(self, tmp_path: Path):
        assert load(tmp_path, tflite_writer.pair(), stateful="keep").concurrent


class TestPlacement:
    def test_xnnpack_and_the_plain_kernels_are_told_apart(self, tmp_path: Path):
        assert load(tmp_path, tflite_writer.mixed()).placement == (Placement("CPU", "XNNPACK", 3),)
        plain = load(tmp_path, tflite_writer.mixed(), xnnpack=False)
        assert plain.placement == (Placement("CPU", "kernels", 3),)

    def test_parts_are_found_from_their_borders(self):
        nodes = [
            Node("ADD", (0, 9), (1,)),  # 9: a constant
            Node("MUL", (1, 1), (2,)),
            Node("SUB", (2, 0), (3,)),
            Node("DELEGATE", (1, 9), (2,)),
            Node("DELEGATE", (0, 2), (3,)),
        ]
        assert [replaced(nodes, nodes[part]) for part in (3, 4)] == [{1}, {2}]
        options = Options(delegate=door.Delegate("libedgetpu.so.1"))
        assert placement_of(nodes, 4, options) == (
            Placement("TPU", "libedgetpu.so.1", 1),
            Placement("CPU", "XNNPACK", 1),
            Placement("CPU", "kernels", 1),
        )

    def test_a_part_stands_for_all_that_leads_to_its_outputs(self):
        nodes = [
            Node("A", (0,), (1,)),
            Node("B", (1,), (2,)),
            Node("C", (1,), (3,)),
            Node("DELEGATE", (0,), (2, 3)),
        ]
        assert replaced(nodes, nodes[3]) == {0, 1, 2}


@pytest.fixture(scope="module")
def delegate(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(contract.compiled_delegate(tmp_path_factory.mktemp("delegate")))


class TestDelegate:
    def test_it_gets_its_nodes_and_computes_them(self, tmp_path: Path, delegate: str):
        model = load(
            tmp_path,
            tflite_writer.mixed(),
            delegate={"library": delegate, "options": {"offset": "100"}, "device": "NPU"},
        )
        assert model.placement[0] == Placement("NPU", "libtest_delegate.so", 2)
        assert sum(place.nodes for place in model.placement[1:]) == 1
        assert {place.device for place in model.placement[1:]} == {"CPU"}
        assert not model.concurrent  # one interpreter for one device
        for rows in (1, 4, 2):
            x = np.repeat(X, rows, axis=0)
            want = (x + x + 100) ** 2 + x + 100
            np.testing.assert_allclose(model.run({"x": x})["y"], want)
            out = np.empty_like(x)
            model.bind({"x": x}, {"y": out})()
            np.testing.assert_allclose(out, want)

    def test_nodes_left_to_the_cpu_can_be_refused(self, tmp_path: Path, delegate: str):
        with pytest.raises(BackendError) as caught:
            load(
                tmp_path,
                tflite_writer.mixed(),
                delegate={"library": delegate},
                cpu_fallback=False,
            )
        assert "1 of 3 nodes would run on the CPU" in str(caught.value)
        load(tmp_path, tflite_writer.pair(), delegate={"library": delegate}, cpu_fallback=False)

    def test_a_delegate_that_takes_nothing_is_seen(
        self, tmp_path: Path, delegate: str, weights: np.ndarray
    ):
        model = load(tmp_path, tflite_writer.linear(weights), delegate={"library": delegate})
        assert {place.device for place in model.placement} == {"CPU"}

    @pytest.mark.parametrize(
        ("stage", "text"),
        [("create", "no accelerator is plugged in"), ("prepare", "firmware is too old")],
    )
    def test_its_failure_is_a_refusal_in_its_own_words(
        self, tmp_path: Path, delegate: str, stage: str, text: str
    ):
        with pytest.raises(BackendError) as caught:
            load(
                tmp_path,
                tflite_writer.pair(),
                delegate={"library": delegate, "options": {"fail": stage}},
            )
        assert text in str(caught.value)
        assert "libtest_delegate.so" in str(caught.value)

    def test_its_failure_in_a_run_is_a_backend_error(self, tmp_path: Path, delegate: str):
        model = load(
            tmp_path,
            tflite_writer.pair(),
            delegate={"library": delegate, "options": {"fail": "run"}},
        )
        for _ in range(3):
            with pytest.raises(BackendError, match="stopped answering"):
                model.run({"a": X, "b": X})

    @pytest.mark.parametrize(
        ("name", "kind", "text"),
        [
            ("libnot_there.so.1", BackendError, "libnot_there.so.1"),
            ("libc.so.6", BackendError, "no external delegate"),
            ("here/lib.so", UsageError, "relative"),
        ],
    )
    def test_a_wrong_library_is_told_before_it_is_used(
        self, tmp_path: Path, name: str, kind: type[Exception], text: str
    ):
        with pytest.raises(kind) as caught:
            load(tmp_path, tflite_writer.pair(), delegate={"library": name})
        assert text in str(caught.value)
        assert caught.value.where == "options.delegate.library"  # type: ignore[attr-defined]

    @pytest.mark.parametrize("operator", ["ethos-u", "edgetpu-custom-op"])
    def test_a_compiled_model_without_its_delegate_says_so(self, tmp_path: Path, operator: str):
        with pytest.raises(BackendError) as caught:
            load(tmp_path, tflite_writer.compiled(operator))
        assert f"{operator!r}" in str(caught.value)
        assert "options.delegate" in str(caught.value)


def test_a_file_that_vela_compiled_says_so_too():
    """Recorded: Arm's compiler (ethos-u-vela 5.2.0, Ethos-U55-128) on `linear_int8`."""
    recorded = Path(__file__).parents[1] / "bundle" / "data" / "ethos_u_vela.tflite"
    with pytest.raises(BackendError, match="'ethos-u'"):
        door.LiteRt().load(recorded, {})


# Imports the door with one library missing or broken, as the rows of CASES say.
IMPORTING = """
import sys, types
import numpy as np
{before}
from edge_runtime.backends import backend
from edge_runtime.errors import BackendError
try:
    print(backend("litert").version())
except BackendError as e:
    print(e)
"""
NONE = "sys.modules['ai_edge_litert'] = None; sys.modules['tflite_runtime'] = None"
FAKE_OLD = """
sys.modules['ai_edge_litert'] = None
old = sys.modules['tflite_runtime'] = types.ModuleType('tflite_runtime')
old.__version__ = '2.14.0'
old.interpreter = sys.modules['tflite_runtime.interpreter'] = types.ModuleType('interpreter')
np.__version__ = '{numpy}'
"""
CASES = {
    "none": (NONE, ["or else tflite-runtime", "edge-runtime[litert]"]),
    "old with numpy 2": (FAKE_OLD.format(numpy="2.1.0"), ["numpy 2.1.0", "edge-runtime[tflite]"]),
    "old with numpy 1": (FAKE_OLD.format(numpy="1.26.4"), ["2.14.0 (tflite-runtime)"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_installed_is_told_with_its_remedy(case: str):
    before, texts = CASES[case]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING.format(before=before)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in texts), done.stdout
    assert "Traceback" not in done.stderr


IMPORT_ONLY = """
import os
before = set(os.listdir("/proc/self/task"))
from edge_runtime.backends import backend
backend("litert").version()
print(len(set(os.listdir("/proc/self/task")) - before))
"""


def test_the_import_starts_no_thread():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ONLY],
        env={"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "0", done.stderr
