"""Goldens while a model serves: when one is due, and what a worker does that finds itself wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_runtime.clock import suspended_ns
from edge_runtime.errors import BackendError
from edge_runtime.serving import channel, heartbeat, page, worker
from edge_runtime.serving.heartbeat import Beats, Heart, alarm, overdue
from edge_runtime.serving.measuring import Meter
from edge_runtime.serving.spec import GoldenFile, GoldenPair, WorkerSpec
from tests.serving.rig import Array, NumpyModel, Rig, close_all, double_plus_one, infer

SECOND = 1_000_000_000


# --- when -----------------------------------------------------------------------------------------


def test_one_is_overdue_after_the_time_without_and_never_at_zero() -> None:
    beats = Beats(checked_ns=5 * SECOND)
    assert not overdue(beats, 64 * SECOND, 60)
    assert overdue(beats, 65 * SECOND, 60) == "none for 60 s"
    assert not overdue(beats, 10**6 * SECOND, 0)


def test_a_suspend_is_noticed_by_the_clocks_drifting_apart_and_jitter_is_not_one() -> None:
    beats = Beats(checked_ns=0, slept_ns=7 * SECOND)
    assert not alarm(beats, SECOND, 7 * SECOND + 50_000)
    assert alarm(beats, SECOND, 8 * SECOND) == "the machine was suspended"


def test_failures_ask_for_a_golden_but_only_for_a_small_share_of_the_time() -> None:
    beats = Beats(checked_ns=SECOND, took_ns=1_000_000, failed=True)
    assert not alarm(beats, SECOND + 10_000_000, 0)
    assert alarm(beats, SECOND + 20_000_000, 0) == "the library failed"


def test_this_machines_clocks_tell_how_long_it_slept() -> None:
    assert abs(suspended_ns() - suspended_ns()) < heartbeat.SUSPEND_NS_MIN


# --- a heart --------------------------------------------------------------------------------------


class Patient:
    """A model that is right, wrong or broken when told, with two recorded answers."""

    def __init__(self, directory: Path) -> None:
        self.ill: Exception | float = 0.0
        self.later: float | None = None  # what it is once it has failed
        self.slept_ns = 0
        self.asked: list[float] = []
        self.pairs = tuple(self._golden(directory, value) for value in (1.0, 5.0))

    def _golden(self, directory: Path, value: float) -> GoldenPair:
        x = np.full((1, 4), value, np.float32)
        files = []
        for name, array in (("x", x), ("y", double_plus_one({"x": x})["y"])):
            data = array.tobytes()
            path = directory / f"{name}{value}"
            path.write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            files.append(GoldenFile(name, "FP32", (1, 4), str(path), digest))
        return GoldenPair((files[0],), (files[1],))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.asked.append(float(inputs["x"].flat[0]))
        if isinstance(self.ill, Exception):
            ill, self.ill = self.ill, self.ill if self.later is None else self.later
            raise ill
        return {"y": double_plus_one(inputs)["y"] + np.float32(self.ill)}

    def heart(self, spec: WorkerSpec | None = None, **more: Any) -> Heart:
        spec = msgspec.structs.replace(spec or _spec(), goldens=self.pairs, **more)
        return Heart(self.run, spec, 0, lambda: self.slept_ns)


def _spec() -> WorkerSpec:
    return WorkerSpec("m", 1, 1, "fp32", "numpy", "/nowhere", "", (), ())


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    return Patient(tmp_path)


def test_the_goldens_take_turns(patient: Patient) -> None:
    heart = patient.heart()
    assert [heart.beat(lambda: 0) for _ in range(3)] == [None] * 3
    assert patient.asked == [1.0, 5.0, 1.0]


def test_a_wrong_answer_is_told_with_the_goldens_number_and_how_far_off(patient: Patient) -> None:
    heart = patient.heart()
    heart.beat(lambda: 0)
    patient.ill = 1.0
    wrong = heart.beat(lambda: 0)
    assert wrong is not None and "golden 1" in wrong.message and "'y'" in wrong.message


def test_a_model_that_fails_is_not_wrong_and_is_looked_at_again_soon(patient: Patient) -> None:
    heart = patient.heart()
    patient.ill = BackendError("the bus hung up")
    assert heart.beat(lambda: SECOND) is None
    heart.look(SECOND + 1)
    assert heart.pressing and heart.reason == "the library failed"


def test_a_model_that_fails_golden_after_golden_has_lost_its_device(patient: Patient) -> None:
    heart = patient.heart()
    patient.ill = BackendError("the bus hung up")
    assert [heart.beat(lambda: SECOND) for _ in range(2)] == [None, None]
    lost = heart.beat(lambda: SECOND)
    assert lost is not None and "3 goldens all failed: the bus hung up" in lost.message
    patient.ill = 0.0
    assert heart.beat(lambda: SECOND) is None
    patient.ill = ValueError("not one of our errors")
    assert heart.beat(lambda: SECOND) is None


def test_a_recording_that_rotted_on_the_disk_does_not_condemn_the_model(patient: Patient) -> None:
    heart = patient.heart()
    Path(patient.pairs[0].outputs[0].path).write_bytes(b"\1" * 16)
    assert heart.beat(lambda: 0) is None
    Path(patient.pairs[1].outputs[0].path).unlink()
    assert heart.beat(lambda: 0) is None


def test_a_resume_presses_and_a_golden_that_is_only_overdue_waits_for_a_quiet_moment(
    patient: Patient,
) -> None:
    heart = patient.heart(heartbeat_idle_s=10.0)
    heart.look(9 * SECOND)
    assert not heart.reason
    heart.look(10 * SECOND)
    assert heart.reason and not heart.pressing
    patient.slept_ns = SECOND
    heart.look(10 * SECOND)
    assert heart.pressing
    heart.beat(lambda: 11 * SECOND)
    heart.look(12 * SECOND)
    assert not heart.reason


def test_a_model_whose_state_is_its_clients_gets_no_goldens(patient: Patient) -> None:
    heart = patient.heart(options={"stateful": "keep"})
    patient.slept_ns = 99 * SECOND
    heart.note_failure(99 * SECOND)
    assert not heart.reason


# --- in the loop ----------------------------------------------------------------------------------


def rig_of(build: Callable[..., Rig], patient: Patient, **options: Any) -> Rig:
    """A worker whose model is the patient, and whose heart beats."""
    rig = build(NumpyModel(patient.run), **options)
    rig.worker._heart = heart = patient.heart(rig.spec, heartbeat_idle_s=0.0)
    rig.worker._dispatch._heart = heart
    return rig


def told(rig: Rig) -> list[channel.Message]:
    """What the worker said to the supervisor; connections among it are closed."""
    found = rig.told()
    for _, fds in found:
        close_all(fds)
    return [message for message, _ in found]


@pytest.mark.parametrize("runners", [0, 1])
def test_a_quiet_worker_runs_a_golden_and_goes_on(
    build: Callable[..., Rig],
    patient: Patient,
    runners: int,
) -> None:
    rig = rig_of(build, patient, runners=runners)
    client = rig.client()
    assert client.ask(infer(3.0)).array()[0, 0] == 7.0
    rig.worker._heart.reason = "none for 60 s"  # type: ignore[union-attr]
    assert client.ask(infer(3.0)).array()[0, 0] == 7.0
    assert rig.status[page.GOLDENS] == 1 and patient.asked == [3.0, 3.0, 1.0]


@pytest.mark.parametrize("runners", [0, 1])
def test_after_an_error_of_the_library_a_golden_runs_before_the_next_request(
    build: Callable[..., Rig],
    patient: Patient,
    runners: int,
) -> None:
    rig = rig_of(build, patient, runners=runners)
    client = rig.client()
    patient.ill = BackendError("the bus hung up")
    assert client.ask(infer(3.0)).code == "backend_failed"
    patient.ill = 0.0
    rig.settle()
    assert client.ask(infer(4.0)).array()[0, 0] == 9.0
    assert patient.asked[:2] == [3.0, 1.0] and rig.status[page.GOLDENS] >= 1


@pytest.mark.parametrize("runners", [0, 1])
def test_a_worker_that_is_wrong_says_so_answers_nobody_and_gives_its_connections_back(
    build: Callable[..., Rig],
    patient: Patient,
    runners: int,
) -> None:
    rig = rig_of(build, patient, runners=runners)
    first, second = rig.client(), rig.client()
    assert first.ask(infer(3.0)).array()[0, 0] == 7.0
    told(rig)
    patient.later = 1.0  # it fails once, and lies from then on
    patient.ill = BackendError("the bus hung up")
    first.send(infer(3.0, 1) + infer(4.0, 2) + infer(5.0, 3))  # the last two wait
    second.send(infer(6.0, 9))
    codes = [one.code for one in first.answers() + second.answers()]
    assert codes[0] == "backend_failed" and set(codes[1:]) == {"unavailable"}, codes
    messages = told(rig)
    kinds = [type(one) for one in messages]
    assert kinds.index(channel.Failed) < kinds.index(channel.Returned)
    failed = messages[kinds.index(channel.Failed)]
    assert isinstance(failed, channel.Failed) and failed.error["code"] == "golden_mismatch"
    assert kinds.count(channel.Returned) == 2 and not rig.connections()
    assert rig.worker.serve() is True  # and it ends


def test_a_connection_that_still_comes_goes_back_with_its_request(
    build: Callable[..., Rig],
    patient: Patient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = rig_of(build, patient)
    slow = rig.client(buffer_bytes=4096)
    monkeypatch.setattr(worker, "PART_S_MAX", 3600.0)
    slow.send(infer(np.ones((20_000, 4), np.float32)))  # does not take its answer: it stays
    rig.settle()
    patient.ill = 1.0
    rig.worker._heart.reason = "none for 60 s"  # type: ignore[union-attr]
    rig.tell(channel.Promote())  # a turn of the loop
    assert [type(message) for message in told(rig)] == [channel.Failed]
    late = rig.client()
    late.send(infer(3.0))
    rig.settle()
    assert [type(message) for message in told(rig)] == [channel.Returned]
    assert patient.asked.count(3.0) == 0
    assert [one.code for one in slow.answers()] == [""]  # from before it was known


def test_after_a_suspend_the_next_sweep_has_a_golden_run(
    build: Callable[..., Rig], patient: Patient
) -> None:
    rig = rig_of(build, patient)
    client = rig.client()
    client.ask(infer(3.0))
    patient.slept_ns = 30 * SECOND
    rig.worker._sweep_at_ns = 0  # a second has passed
    assert client.ask(infer(3.0)).array()[0, 0] == 7.0
    assert patient.asked == [3.0, 3.0, 1.0] and rig.status[page.GOLDENS] == 1


# --- measuring ------------------------------------------------------------------------------------


def test_a_worker_measures_itself_as_ordered(build: Callable[..., Rig], patient: Patient) -> None:
    rig = rig_of(build, patient)
    rig.worker._spec = msgspec.structs.replace(rig.spec, goldens=patient.pairs)
    rig.tell(channel.Measure(20, 1000.0))
    (message,) = told(rig)
    assert isinstance(message, channel.Measured) and not message.error
    assert len(message.times_ns) == 20 and min(message.times_ns) > 0
    assert patient.asked == [1.0] * 20
    rig.tell(channel.Measure(1000, 0.0))
    (message,) = told(rig)
    assert isinstance(message, channel.Measured) and len(message.times_ns) == 1
    patient.ill = BackendError("no")
    rig.tell(channel.Measure(5, 1000.0))
    (message,) = told(rig)
    assert isinstance(message, channel.Measured) and message.error["code"] == "backend_failed"
    assert rig.status[page.RUN_BEGAN] == 0


def test_without_goldens_zeros_are_measured(build: Callable[..., Rig], patient: Patient) -> None:
    rig = build(NumpyModel(patient.run))
    assert len(Meter(rig.spec, rig.worker._planner, rig.status).run(3, SECOND)) == 3
    assert patient.asked == [0.0] * 3
