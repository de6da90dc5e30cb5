"""`bench` against the real daemon, with models of known capacity."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.cli import bench
from edge_runtime.client.load import plot
from edge_runtime.client.load.campaign import Plan, Report
from edge_runtime.client.load.statistics import Load, Quantiles
from edge_runtime.errors import UsageError
from tests.daemon.world import WIDTH, Daemon, running

from .conftest import Done

Edge = Callable[..., Done]
RUN_MS = 5  # sleeping: one runner answers at most 200/s, however busy the machine is
PEAK_PER_S = 1000 / RUN_MS


@pytest.fixture(scope="module")
def world() -> Iterator[Daemon]:
    # One run at a time, each of one request: the capacity is known.
    config = {
        "workers": {"runners": 1, "batch_rows_max": 1},
        "models": {"short": {"queue_requests_max": 2}},
    }
    with running(config) as started:
        for name in ("known", "short"):
            started.add(name, options={"run_ms": RUN_MS})
        yield started


@pytest.fixture
def run(world: Daemon, edge: Edge) -> Callable[..., dict[str, Any]]:
    """Runs `bench` and gives its JSON."""

    def bench(name: str, *words: object) -> dict[str, Any]:
        done = edge("--run-dir", world.run_dir, "bench", name, *words, "--json")
        assert done.code == 0, done.out
        assert done.err == ""
        document: dict[str, Any] = json.loads(done.out)
        for load in document["loads"]:
            accounted(load)
        return document

    return bench


def accounted(load: dict[str, Any]) -> None:
    assert load["offered"] == load["sent"] + load["unsent"]
    single = ("good", "late", "expired", "unanswered")
    by_code = sum(load["refused"].values()) + sum(load["errors"].values())
    assert load["sent"] == sum(load[name] for name in single) + by_code


def test_at_five_times_the_peak_most_is_refused_and_the_rest_is_served(
    run: Callable[..., dict[str, Any]],
) -> None:
    report = run("known", "--load", "5x", "--duration", 0.8)
    peak = report["peak"]["goodput_per_s"]
    assert 0.3 * PEAK_PER_S < peak < 1.1 * PEAK_PER_S
    (worst,) = report["loads"]
    assert worst["offered_per_s"] > 3 * peak
    assert worst["goodput_per_s"] > 0.4 * peak
    assert worst["refused"]["overloaded"] > 0.4 * worst["sent"]
    assert set(worst["refused"]) == {"overloaded"} and not worst["errors"]
    assert worst["refusal_ms"]["p50"] < worst["latency_ms"]["p50"]
    assert worst["recovery_watched_s"] > 1


def test_a_short_queue_does_not_hide_the_peak(run: Callable[..., dict[str, Any]]) -> None:
    report = run("short", "--load", "1x", "--duration", 0.5)
    assert report["peak"]["goodput_per_s"] > 0.3 * PEAK_PER_S


def test_requests_that_cannot_be_answered_in_time_are_expired_and_not_run(
    run: Callable[..., dict[str, Any]],
) -> None:
    load = run("known", "--rate", 800, "--deadline", 60, "--duration", 0.5)["loads"][0]
    assert load["expired"] > 0


def test_a_closed_loop_a_file_and_shared_memory(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, WIDTH), np.float32))
    words = ("--npy", tmp_path / "x.npy", "--shared-memory", "--clients", 2)
    report = run("known@1", "--concurrency", "1,4", "--duration", 0.3, *words)
    assert report["peak"] is None and report["shared_memory"]
    assert [load["name"] for load in report["loads"]] == ["1 in flight", "4 in flight"]
    assert all(load["good"] == load["offered"] > 2 for load in report["loads"])


def test_people_get_a_table_and_the_steps_on_stderr(world: Daemon, edge: Edge) -> None:
    done = edge("bench", "known", "--run-dir", world.run_dir, "--load", "1", "--duration", 0.3)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert "known, 64 bytes of input" in lines[0] and "peak:" in lines[1]
    for title in ("LOAD  OFFERED/s", "LOAD "):
        assert any(line.startswith(title) for line in lines)
    assert sum(line.startswith("1x") for line in lines) >= 2
    assert "1x: " in done.err and "48 in flight" in done.err


def test_ctrl_c_prints_what_was_measured(world: Daemon) -> None:
    command = [sys.executable, "-m", "edge_runtime", "--run-dir", str(world.run_dir)]
    command += ["bench", "known", "--rate", "50", "--duration", "300"]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.readline()  # the load begins
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "50/s" in out and "interrupted" in out


def test_what_goes_wrong_is_said_as_elsewhere(world: Daemon, edge: Edge, tmp_path: Path) -> None:
    def code(*words: object) -> int:
        return edge("--run-dir", world.run_dir, "bench", *words).code

    np.save(tmp_path / "wide.npy", np.ones((1, 99), np.float32))
    assert code("absent") == 3
    assert code("known", "--npy", tmp_path / "wide.npy") == 11
    assert code("known", "--npy", tmp_path / "none.npy") == 3
    assert edge("--run-dir", tmp_path, "bench", "known").code == 6  # no daemon


@pytest.mark.parametrize(
    "words",
    [
        ("--load", "0"),
        ("--load", "x"),
        ("--load", "1x,,2x"),
        ("--load", "nan"),
        ("--load", ",".join(["1"] * 21)),
        ("--rate", "-1"),
        ("--rate", "1e9"),
        ("--rate", "150000", "--duration", "60"),
        ("--concurrency", "1.5"),
        ("--concurrency", "100000"),
        ("--load", "1x", "--rate", "5"),
        ("--duration", "700"),
        ("--clients", "257"),
        ("--arrivals", "never"),
        ("--seed", "-3"),
        ("--plot", "out.bmp"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_sent(
    words: tuple[str, ...], edge: Edge, run_dir: Path
) -> None:
    done = edge("--run-dir", run_dir, "bench", "known", *words)  # nobody listens there
    assert done.code == 2, done.err


# --- what is printed ----------------------------------------------------------------------------


def load_row(**given: Any) -> Load:
    values: dict[str, Any] = {
        "name": "5x",
        "open_loop": True,
        "duration_s": 1.0,
        "offered": 100,
        "sent": 90,
        "unsent": 10,
        "good": 40,
        "late": 1,
        "refused": {"overloaded": 45},
        "expired": 2,
        "errors": {"closed": 1},
        "unanswered": 1,
        "offered_per_s": 100.0,
        "sent_per_s": 90.0,
        "goodput_per_s": 40.0,
        "latency_ms": Quantiles(41, 1.0, 2.0, 3.0, 4.0, 5.0),
        "refusal_ms": Quantiles(45, 0.1, 0.2, 0.3, 0.4, 0.5),
        "lag_ms": Quantiles(100),
        "generator_cpu": 0.5,
        "latency_curve_ms": ((0.5, 1.0), (0.9, 2.0), (1.0, 5.0)),
    }
    return Load(**{**values, **given})


def report_of(*loads: Load) -> Report:
    peak = load_row(name="16 in flight", goodput_per_s=50.0)
    return Report(Plan(), peak, None, loads, False)


def test_remarks_say_whose_fault_a_figure_may_be() -> None:
    late = load_row(lag_ms=Quantiles(100, 1.0, 5.0, 80.0, 90.0, 99.0))
    said = bench.text(report_of(late), "m", 8)
    assert "the generator itself was late (p99 80.0 ms" in said
    assert "10 requests could not be sent" in said
    assert "45 overloaded, 1 closed" in said
    quiet = load_row(unsent=0, sent=100, errors={}, refused={})
    assert "5x:" not in bench.text(report_of(quiet), "m", 8)


@pytest.mark.parametrize(
    ("recovery_s", "watched_s", "says"),
    [(None, 0.0, "-"), (None, 2.0, "> 2 s"), (0.0, 2.0, "at once"), (0.25, 2.0, "250 ms")],
)
def test_a_recovery_that_was_not_seen_is_not_called_quick(
    recovery_s: float | None, watched_s: float, says: str
) -> None:
    row = load_row(recovery_s=recovery_s, recovery_watched_s=watched_s)
    assert says in bench.text(report_of(row), "m", 8).split("RECOVERY")[1]


def test_a_plot_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"edge-runtime\[plot\]"):
        plot.check(tmp_path / "out.png")


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_a_plot_is_drawn_also_of_loads_without_an_answer(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra plot")
    path = tmp_path / f"out{suffix}"
    plot.check(path)
    empty = load_row(name="2x", good=0, latency_curve_ms=(), goodput_per_s=0.0)
    plot.draw(report_of(load_row(), empty), "a model", path)
    assert path.stat().st_size > 1000
