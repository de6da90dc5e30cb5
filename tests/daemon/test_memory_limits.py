"""What a machine allows, from recorded trees; and three models in a cgroup that is small."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.daemon import memory
from edge_runtime.errors import EdgeError
from tests.daemon.test_deaths import memory_cgroup
from tests.daemon.world import Daemon, large_onnx_bundle, running

MIB = 1024 * 1024
NO_LIMIT = "9223372036854771712\n"  # as version 1 writes it on a machine with 4 KiB pages


def tree(root: Path, cgroup: str, files: dict[str, str], total_kb: int = 8_000_000) -> int:
    """What `limit_bytes` makes of a /proc/self/cgroup and files below /sys/fs/cgroup."""
    proc, cgroups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(cgroup)
    if total_kb:
        heading = f"MemTotal:        {total_kb} kB\nMemFree:         1000000 kB\n"
        (proc / "meminfo").write_text(heading)
    for name, text in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(text)
    return memory.limit_bytes(proc, cgroups)


def test_without_a_cgroup_the_limit_is_the_machines(tmp_path):
    assert tree(tmp_path, "", {}) == 8_000_000 * 1024


def test_where_nothing_can_be_read_the_limit_is_not_known(tmp_path):
    assert tree(tmp_path, "", {}, total_kb=0) == 0


V1 = "5:cpu,cpuacct:/\n4:freezer,memory:/box/app\n1:name=systemd:/box/app\n"
V1_FILE = "memory/box/app/memory.limit_in_bytes"
V2 = "0::/system.slice/edge-runtime.service\n"
V2_FILE = "system.slice/edge-runtime.service/memory.max"
HYBRID = "3:memory:/box\n1:name=systemd:/init.scope\n0::/init.scope\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (V1, {V1_FILE: f"{512 * MIB}\n"}, 512 * MIB),
        (V1, {V1_FILE: NO_LIMIT}, 8_000_000 * 1024),
        (V1, {V1_FILE: NO_LIMIT, "memory/box/memory.limit_in_bytes": f"{MIB}\n"}, MIB),
        # A container with the host's path and its own group as the root:
        (V1, {"memory/memory.limit_in_bytes": f"{256 * MIB}\n"}, 256 * MIB),
        (V2, {V2_FILE: f"{512 * MIB}\n"}, 512 * MIB),
        (V2, {V2_FILE: "max\n"}, 8_000_000 * 1024),
        (V2, {V2_FILE: "max\n", "system.slice/memory.max": f"{MIB}\n"}, MIB),
        (V2, {V2_FILE: f"{2 * MIB}\n", "system.slice/memory.max": f"{MIB}\n"}, MIB),
        ("0::/../../outside\n", {"memory.max": f"{MIB}\n"}, MIB),
        (HYBRID, {"memory/box/memory.limit_in_bytes": f"{MIB}\n"}, MIB),
        (HYBRID, {"unified/init.scope/memory.max": f"{MIB}\n"}, MIB),
        (HYBRID, {}, 8_000_000 * 1024),
    ],
)
def test_the_least_limit_on_the_way_up_counts(tmp_path, cgroup, files, expected):
    assert tree(tmp_path, cgroup, files) == expected


def test_this_machine_has_a_limit():
    assert 64 * MIB < memory.limit_bytes() < 1 << 50


# --- a small box ----------------------------------------------------------------------------------

# Weights of the three models, in MiB, to which a worker adds 6: any two fit, three do not.
SIZES_MIB = {"small": 26, "middle": 40, "large": 60}
BUDGET = 130 * MIB
CLIENTS, ROUNDS = 3, 4


def kernel_kills(group: Path) -> int:
    """Out-of-memory kills in a cgroup."""
    events = group / "memory.oom_control"
    lines = (events if events.exists() else group / "memory.events").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


@pytest.mark.root
def test_three_models_in_512_mib_with_room_for_two_are_all_answered_and_nothing_is_killed():
    with (
        memory_cgroup(512 * MIB) as group,
        running(
            {"memory": {"budget_bytes": BUDGET}},
            enter=lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None,
        ) as daemon,
    ):
        for name, size_mib in SIZES_MIB.items():
            daemon.install(large_onnx_bundle(daemon.bundles, name, size_mib * MIB))
        answered, taken = traffic(daemon)
        assert answered == dict.fromkeys(SIZES_MIB, CLIENTS * ROUNDS)
        assert max(taken) <= BUDGET, max(taken) / MIB
        assert max(taken) > 60 * MIB  # it was used
        assert kernel_kills(group) == 0
        assert not daemon.events("worker_died")
        assert len(daemon.events("model_idle")) >= ROUNDS  # somebody, in each round of a client


def traffic(daemon: Daemon) -> tuple[dict[str, int], list[int]]:
    """Several clients ask the models in turn, each beginning with another; answers per model, and
    samples of their memory.
    """
    answered = dict.fromkeys(SIZES_MIB, 0)
    taken: list[int] = []
    failures: list[Exception] = []

    def ask(first: int) -> None:
        names = list(SIZES_MIB)
        try:
            with daemon.impatient() as client:
                for turn in range(len(names) * ROUNDS):
                    name = names[(first + turn) % len(names)]
                    y = client.infer(name, {"x": np.ones((1, 1024), np.float32)})["y"]
                    assert (y == 1024 * SIZES_MIB[name]).all()
                    answered[name] += 1
        except (EdgeError, AssertionError) as error:  # told to the test, which fails with it
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        workers: list[dict[str, Any]] = daemon.control("ps")["workers"]
        taken.append(sum(one["private_bytes"] for one in workers))
        time.sleep(0.02)  # the rate of sampling
    assert not failures, failures[0]
    return answered, taken
