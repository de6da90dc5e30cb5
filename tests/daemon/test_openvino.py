"""OpenVINO in sandboxed workers of a real daemon."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from edge_runtime.backends import backend
from edge_runtime.bundle import create
from edge_runtime.bundle.manifest import Variant
from tests.backends import contract
from tests.backends.contract import openvino
from tests.daemon.world import NO_BLOB, filled, onnx_bundle, running, until

openvino()
pytest.importorskip("onnx", reason="onnx is not installed")


def variant(**options: object) -> Variant:
    return Variant("fp32", "openvino", NO_BLOB, "fp32", options=options)


def test_a_model_answers_batches_of_any_size_from_its_sandbox(daemon):
    daemon.install(onnx_bundle(daemon.bundles, "ov", rows="N", variants=[variant()]))
    for rows in (1, 3, 1, 8):
        assert daemon.infer("ov", rows=rows) == 6.0
    worker = daemon.worker("ov")
    assert worker["backend"] == "openvino"
    assert daemon.model("ov")["device"] == "CPU"
    (ready,) = daemon.events("template_ready", backend="openvino")
    assert ready["fields"]["version"][0].isdigit()
    os.kill(worker["pid"], signal.SIGKILL)
    until(lambda: daemon.worker("ov").get("pid", worker["pid"]) != worker["pid"])
    until(lambda: daemon.ready("ov"))
    assert daemon.infer("ov") == 6.0


def test_clients_at_the_same_time_each_get_their_own_answer(daemon):
    daemon.install(onnx_bundle(daemon.bundles, "many", rows="N", variants=[variant(streams=2)]))
    with daemon.client() as one, daemon.client() as other:
        for value in range(50):
            mine = one.infer("many", {"x": filled(value, 2)})["y"]
            theirs = other.infer("many", {"x": filled(-value, 1)})["y"]
            assert (mine == 2 * value).all() and (theirs == -2 * value).all()


def test_an_option_that_is_wrong_refuses_the_activation_with_its_key_path(daemon):
    from edge_runtime.errors import EdgeError

    path = onnx_bundle(daemon.bundles, "wrong", variants=[variant(device="TPU")])
    with pytest.raises(EdgeError) as caught:
        daemon.install(path)
    assert "options.device" in str(caught.value)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to tell one apart")
def test_its_threads_stay_on_the_cores_of_the_configuration():
    """The library sets them to all of the machine's at each run, unless it is refused."""
    with running({"models": {"placed": {"cpuset": "0"}}}) as daemon:
        daemon.install(onnx_bundle(daemon.bundles, "placed", variants=[variant(streams=2)]))
        assert [daemon.infer("placed") for _ in range(20)] == [6.0] * 20
        tasks = Path(f"/proc/{daemon.worker('placed')['pid']}/task")
        assert {frozenset(os.sched_getaffinity(int(one.name))) for one in tasks.iterdir()} == {
            frozenset({0})
        }


def stateful_ir(folder: Path) -> Path:
    """A sum of all inputs so far, x FP32 [1, 16] -> y, kept in the model."""
    from onnx import helper
    from openvino._offline_transformations import apply_make_stateful_transformation

    tensor = ("FLOAT", [1, 16])
    nodes = [helper.make_node("Add", ["x", "before"], ["after"])]
    nodes.append(helper.make_node("Identity", ["after"], ["y"]))
    path = contract.write_onnx(
        folder / "sum.onnx", nodes, {"x": tensor, "before": tensor}, {"y": tensor, "after": tensor}
    )
    model = openvino().Core().read_model(path)
    apply_make_stateful_transformation(model, {"before": "after"})
    openvino().save_model(model, folder / "sum.xml")
    return folder / "sum.xml"


@pytest.mark.parametrize(("choice", "want"), [("reset", [3, 3, 3]), ("keep", [3, 6, 9])])
def test_a_model_with_a_state_forgets_it_or_keeps_it(
    daemon, tmp_path: Path, choice: str, want: list[int]
):
    options = create.Options(choice, goldens=2, backend_options={"openvino": {"stateful": choice}})
    out = tmp_path / "state.bundle"
    create.create(
        [stateful_ir(tmp_path)],
        options,
        out,
        lambda variant, path: backend("openvino").load(path, variant.options).run,
    )
    daemon.install(out)
    assert [daemon.infer(choice) for _ in range(3)] == want
