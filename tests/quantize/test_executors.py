"""Executors: one contract, the same on this machine and on a local Ray cluster."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.errors import UsageError
from quantize import executors
from quantize.executors import Executor, Job, Said

RAY_MISSING = importlib.util.find_spec("ray") is None
NAMES = [
    "local",
    pytest.param(
        "ray",
        marks=pytest.mark.skipif(RAY_MISSING, reason="ray is not installed (make test-quantize)"),
    ),
]


@pytest.fixture(scope="module", params=NAMES)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with executors.executor(request.param, 2) as found:
        yield found


def job(name: str, **order: object) -> Job:
    return Job(name, f"tests.quantize.jobs:{name.partition('-')[0]}", dict(order))


def one(executor: Executor, job: Job, job_s_max: float = 60.0) -> executors.Done:
    (done,) = executors.run(executor, [job], job_s_max)
    return done


def test_every_job_is_answered_once_under_its_key(executor: Executor) -> None:
    jobs = [job(f"square-{number}", number=number) for number in range(5)]
    done = sorted(executors.run(executor, jobs), key=lambda one: one.key)
    assert [one.said for one in done] == [Said(number**2) for number in range(5)]
    assert [one.attempts for one in done] == [1] * 5


def test_a_lost_job_is_tried_again(executor: Executor, tmp_path: Path) -> None:
    done = one(executor, job("die", count=str(tmp_path / "count"), times=1))
    assert (done.said.result, done.attempts) == ("alive", 2)


def test_a_job_that_always_dies_is_refused_with_how_it_died(
    executor: Executor, tmp_path: Path
) -> None:
    done = one(executor, job("die", count=str(tmp_path / "count"), times=100))
    assert done.said.refusal.startswith(f"lost {executors.ATTEMPTS_MAX} times: ")
    assert len(done.said.refusal) > len("lost 3 times: ") + 10
    assert (tmp_path / "count").read_text() == str(executors.ATTEMPTS_MAX)


def test_a_refusal_and_a_fault_are_answers_and_are_not_tried_again(executor: Executor) -> None:
    refused, stumbled = one(executor, job("refuse")), one(executor, job("stumble"))
    assert "nothing was quantized" in refused.said.refusal and refused.attempts == 1
    assert stumbled.said.refusal == "unexpected ZeroDivisionError: of course"
    assert (refused.said.passing, stumbled.said.passing) == (False, True)
    assert stumbled.attempts == 1


def test_a_job_that_hangs_is_ended(executor: Executor, tmp_path: Path) -> None:
    started = tmp_path / "pid"
    # Begun at once by both, but a first worker of Ray may take seconds.
    done = one(executor, job("hang", pid=str(started)), job_s_max=5.0)
    assert done.said.refusal == "took longer than 5 s"
    pid, until_s = int(started.read_text()), time.monotonic() + 10
    while running(pid) and time.monotonic() < until_s:
        os.sched_yield()
    assert not running(pid)


def test_jobs_that_may_not_begin_are_left_out(executor: Executor) -> None:
    left = iter([True, True, False])
    jobs = [job(f"square-{number}", number=number) for number in range(4)]
    done = list(executors.run(executor, jobs, may_begin=lambda: next(left, False)))
    assert sorted(one.said.result for one in done) == [0, 1]


def test_closing_ends_what_runs(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    with executors.LocalExecutor(1) as executor:
        executor.submit(job("hang", pid=str(started)))
        until_s = time.monotonic() + 30
        while not (started.exists() and started.read_text()) and time.monotonic() < until_s:
            executor.wait(0.05)
        pid = int(started.read_text())
    assert not Path(f"/proc/{pid}").exists()


def test_what_a_job_began_ends_with_it(tmp_path: Path) -> None:
    """A training's loaders of data hold memory and files."""
    started = tmp_path / "pid"
    with executors.LocalExecutor(1) as executor:
        done = one(executor, job("beget", pid=str(started)))
        assert done.said.result == "gone before its child"
        pid, until_s = int(started.read_text()), time.monotonic() + 10
        while running(pid) and time.monotonic() < until_s:
            os.sched_yield()
        assert not running(pid)


def test_a_job_dies_with_who_asked_for_it(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    code = (
        "from quantize import executors\n"
        f"job = executors.Job('k', 'tests.quantize.jobs:hang', {{'pid': {str(started)!r}}})\n"
        "executor = executors.LocalExecutor(1)\n"
        "executor.submit(job)\n"
        "executor.wait(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    until_s = time.monotonic() + 30
    while not (started.exists() and started.read_text()) and time.monotonic() < until_s:
        time.sleep(0.01)
    job = int(started.read_text())
    parent.kill()
    parent.wait()
    while running(job) and time.monotonic() < until_s:
        os.sched_yield()
    assert not running(job)


def running(pid: int) -> bool:
    """Not gone, and not waiting to be buried."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_an_unknown_executor_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="unknown executor"):
        executors.executor("slurm")


def test_a_missing_ray_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError) as caught:
        executors.executor("ray")
    assert "quantize-ray" in caught.value.remedy
