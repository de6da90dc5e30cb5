"""The report of a run, without a run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench import report
from bench.report import Measured
from bench.scenario import Curve, Latency, Panel, Result
from bench.summary import Figure, Target, spread

LATENCY = Latency("edge", "Edge Runtime", spread([20.0, 21.0]), 25.0, 30.0)
RESULT = Result(
    [
        Figure("fast", spread([2.4, 2.5, 2.6]), "x", Target(3.0)),
        Figure("slow", spread([1.2]), "x", Target(1.05), "a note"),
        Figure("size", spread([12345.6]), "us"),
    ],
    [LATENCY],
    {"edge": [20.0, 21.0]},
    [
        Panel("rates", "clients", "calls/s", [Curve("edge", [1, 4], [9, 20], [(8, 9), (19, 21)])]),
        Panel("times", "offered", "ms", [Curve("p50", [1.0], [2.0])], True),
        Panel("nothing answered", "offered", "ms", []),
    ],
)
MEASURED = [
    Measured("one", "first", RESULT, 1.0),
    Measured("two", "second", None, 0.0, "lite0 is not built on this machine"),
]
MACHINE = {"cpu": "some", "cores": 2}


def test_missed_targets_are_said_in_the_first_table() -> None:
    text = report.markdown(MACHINE, MEASURED)
    targets = text[: text.index("## one")]
    assert "| one | fast | 2.5 x | <= 3 | met |" in targets
    assert "| one | slow | 1.2 x | <= 1.05 | **missed** |" in targets
    assert "size" not in targets


def test_what_was_not_measured_says_why() -> None:
    text = report.markdown(MACHINE, MEASURED)
    assert "Not measured: lite0 is not built on this machine" in text


def test_verdicts_count_promised_figures_only() -> None:
    assert report.verdicts(MEASURED) == (1, 2)


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    for block in report.markdown(MACHINE, MEASURED).split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_the_document_survives_json_with_its_figures() -> None:
    document = msgspec.json.decode(msgspec.json.encode(report.document(MACHINE, MEASURED)))
    one = document["scenarios"]["one"]
    assert one["figures"][0]["median"] == 2.5
    assert one["figures"][1]["met"] is False
    assert one["latencies"][0]["p50_us"] == [20.5, 20.25, 20.75, 2]
    assert document["scenarios"]["two"]["problem"]


def test_the_plot_is_a_png_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    path = tmp_path / "report.png"
    assert report.plot(MEASURED, path, tmp_path / "load.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert report.plot([MEASURED[1]], tmp_path / "a.png", tmp_path / "b.png")  # nothing to draw
