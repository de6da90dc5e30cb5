"""A quick run of the cheapest scenario: real daemon, real worker, a report that can be read."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

from bench import backends, latency, models, proc
from bench.__main__ import SCENARIOS, chosen_scenarios
from bench.child import Child
from bench.peers import PEERS, Order
from bench.scenario import BenchError
from edge_runtime.backends import BACKENDS, backend

ROOT = Path(__file__).resolve().parents[2]


def test_a_quick_run_leaves_a_whole_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--json"]
    command += ["--only", "tiny-one-core", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    document = msgspec.json.decode(done.stdout)
    assert document == msgspec.json.decode((tmp_path / "report.json").read_bytes())
    scenario = document["scenarios"]["tiny-one-core"]
    assert not scenario["problem"]
    assert [one["peer"] for one in scenario["latencies"]][:4] == list(latency.TINY_PEERS)
    assert all(len(scenario["samples"][peer]) == 3 for peer in latency.TINY_PEERS)
    assert all(one["p50_us"][0] > 0 for one in scenario["latencies"])
    assert scenario["figures"][0]["target"] == {"value": 3.0, "at_most": True, "of": "median"}
    assert "tiny-one-core" in (tmp_path / "report.md").read_text()


def test_a_peer_that_fails_says_what_it_printed(tmp_path: Path) -> None:
    order = Order("in_process", 0, 0, "tiny", "x", (1, 16), str(tmp_path / "no.onnx"), "", 0, 0)
    order = msgspec.structs.replace(order, core=proc.cores()[0])
    with pytest.raises(BenchError, match=r"no\.onnx"), Child(order) as child:
        child.wait_until_ready()


def test_every_scenario_names_models_and_peers_that_exist() -> None:
    assert {name for one in SCENARIOS for name in one.models} <= models.MODELS.keys()
    assert {peer for case in latency.CASES.values() for peer in case.peers} <= PEERS.keys()
    assert len({one.name for one in SCENARIOS}) == len(SCENARIOS)


def test_every_case_of_a_backend_has_its_file_and_its_library_calls() -> None:
    for case in backends.CASES.values():
        assert case.backend in BACKENDS and case.backend in backends.LIBRARIES
        assert (backends.FASHION_MNIST / case.file).exists()


def test_a_plain_call_of_each_library_that_is_installed_gives_the_same_classes() -> None:
    classes = set()
    for case in backends.CASES.values():
        if case.file.startswith("fp32") and find_spec(case.library):
            backend(case.backend).version()
            call = backends.LIBRARIES[case.backend](backends.FASHION_MNIST / case.file)
            classes.add(int(call().argmax()))
    assert len(classes) == 1


def test_what_takes_minutes_is_run_only_by_name() -> None:
    assert "soak" not in {one.name for one in chosen_scenarios(())}
    assert [one.name for one in chosen_scenarios(("soak",))] == ["soak"]


def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--json", "--only", "soak"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    scenario = msgspec.json.decode(done.stdout)["scenarios"]["soak"]
    told = {one["name"]: one for one in scenario["figures"]}
    for what in ("8 swaps under load", "4 rollbacks under load"):
        assert told[f"{what}: requests"]["median"] > 100
        for loss in ("lost or refused", "answered twice", "answered by neither version"):
            assert told[f"{what}: {loss}"]["median"] == 0, told


def test_the_memory_of_this_process_is_read_in_bytes() -> None:
    memory = proc.memory(os.getpid())
    assert 0 < memory.private <= memory.pss <= memory.rss < 2**40
