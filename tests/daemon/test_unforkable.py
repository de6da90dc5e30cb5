"""A backend that does not survive a fork: every worker is a fresh process, all else is the same."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.daemon.world import bundle, until


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("backend", ["unforkable", "threaded"])
def test_each_worker_is_the_process_that_imported_the_library(daemon, backend: str):
    imported = [f"{backend}-{number}" for number in (1, 2)]
    for name in imported:
        daemon.add(name, backend=backend, golden_off=0.0)
    ready = [event["fields"]["pid"] for event in daemon.events("template_ready", backend=backend)]
    assert [daemon.worker(name)["pid"] for name in imported] == ready
    assert len(set(ready)) == 2
    assert all(daemon.infer(name) == 7.0 for name in imported)
    assert backend not in [one["backend"] for one in daemon.control("ps")["templates"]]
    assert not daemon.events("template_died", backend=backend)


def test_it_is_restarted_rolled_back_and_unloaded_like_any_other(daemon):
    for version, scale in ((1, 2.0), (2, 5.0)):
        daemon.add("life", version, backend="unforkable", scale=scale)
    assert daemon.infer("life") == 16.0
    pid = daemon.worker("life")["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: daemon.worker("life").get("pid", pid) != pid and daemon.ready("life"))
    assert daemon.events("worker_died", model="life")[-1]["fields"]["pid"] == pid
    assert daemon.infer("life") == 16.0
    daemon.control("rollback", name="life")
    assert daemon.infer("life") == 7.0
    pid = daemon.worker("life")["pid"]
    daemon.control("unload", name="life")
    until(lambda: not Path(f"/proc/{pid}").exists() or state_of(pid) == "Z")


def test_models_that_load_at_the_same_time_do_not_take_each_others_process(daemon):
    names = [f"crowd-{number}" for number in range(4)]
    paths = [bundle(daemon.bundles, name, backend="unforkable") for name in names]
    for path in paths:
        daemon.install(path, activate=False)
    threads = [
        threading.Thread(
            target=daemon.control, args=("activate",), kwargs={"name": name, "version": 1}
        )
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [daemon.infer(name) for name in names] == [7.0] * 4
    assert len({daemon.worker(name)["pid"] for name in names}) == 4
