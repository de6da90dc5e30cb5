"""Tables, units, ages and the error paragraph."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.cli import output
from edge_runtime.errors import OverloadedError, UsageError


def test_a_table_aligns_text_left_and_numbers_right() -> None:
    text = output.table(("NAME", ">SIZE"), [("a", 5), ("longer", 12345)])
    assert text.split("\n") == ["NAME     SIZE", "a           5", "longer  12345"]


def test_a_table_cuts_the_widest_text_to_fit_the_terminal() -> None:
    rows = [("short", "x" * 200, 7)]
    lines = output.table(("A", "B", ">N"), rows, width=40).split("\n")
    assert max(len(line) for line in lines) == 40
    assert "…" in lines[1] and lines[1].endswith("7")
    assert "x" * 200 in output.table(("A", "B", ">N"), rows, width=None)


@settings(deadline=None)  # the machine may be busy with other tests
@given(
    st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60), st.integers()), max_size=5),
    st.integers(1, 200),
)
def test_any_table_has_a_line_per_row_and_nothing_that_drives_a_terminal(
    rows: list[tuple[str, str, int]], width: int
) -> None:
    lines = output.table(("A", "B", ">N"), rows, width).split("\n")
    assert len(lines) == len(rows) + 1
    assert all(line.isprintable() for line in lines)


def test_a_label_with_an_escape_sequence_is_shown_and_not_obeyed() -> None:
    assert output.printable("\x1b[2Jboot\n") == "\\x1b[2Jboot\\n"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (300 << 20, "300 MiB"),
        (8 << 30, "8.0 GiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_sizes_have_binary_units(size_bytes: int | None, text: str) -> None:
    assert output.size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0007, "0.7 ms"),
        (0.25, "250 ms"),
        (1, "1 s"),
        (119, "119 s"),
        (180, "3 min"),
        (7200, "2 h"),
        (172800, "2 d"),
        (1e7, "116 d"),
    ],
)
def test_durations_have_the_unit_that_people_would_use(seconds: float | None, text: str) -> None:
    assert output.duration(seconds) == text


def test_an_age_survives_a_clock_that_jumped() -> None:
    assert output.age(100.0, 280.0) == "3 min ago"
    assert output.age(100.0, 100.2) == "just now"
    assert output.age(280.0, 100.0) == "3 min ahead of this clock"
    assert output.moment(1e30).startswith("@")


def test_an_error_says_what_where_expected_and_what_to_do() -> None:
    error = UsageError("bad \x1b[31m", where="f.yaml: a.b", expected="good", remedy="fix it")
    assert output.error_text("edge-runtime", error).split("\n") == [
        "edge-runtime: error: bad \\x1b[31m",
        "  where:    f.yaml: a.b",
        "  expected: good",
        "  do:       fix it",
    ]
    assert "retry:    in 500 ms" in output.error_text("x", OverloadedError("no", retry_after_s=0.5))
