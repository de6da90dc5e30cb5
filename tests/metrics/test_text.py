"""The Prometheus text: what a strict reader makes of it, and the names that it promises."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import metrics
from edge_runtime.metrics import METRICS, Sample
from tests.metrics import parser, table

values = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
series = st.tuples(values, values, values, values)


def histogram(*durations_ns: int) -> list[int]:
    made = [0] * metrics.WORDS
    for value_ns in durations_ns:
        made[0] += value_ns
        made[1 + metrics.bucket(value_ns)] += 1
    return made


def test_the_document_lists_the_names_of_the_code() -> None:
    assert table.documented() == table.table(), "run: python -m tests.metrics.table"


def test_names_have_the_prefix_and_tell_kind_and_base_unit() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"edge_[a-z_]+", name), name
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert not re.search(r"_(ms|us|ns|kb|mb|percent|milli)", name), name
        assert name.endswith("_seconds") or metric.kind != "histogram", name
        assert metric.meaning and metric.meaning.isprintable() and "|" not in metric.meaning
        assert "\\" not in metric.meaning, "help has no escapes"
        assert "le" not in metric.labels and len(set(metric.labels)) == len(metric.labels)


@given(st.lists(series, unique=True, max_size=5), st.integers(0, 1 << 60))
def test_any_label_is_read_back_as_it_was(names: list[tuple[str, ...]], value: int) -> None:
    text = metrics.render(
        [
            *(Sample("edge_batches_total", one, value) for one in names),
            Sample("edge_uptime_seconds", (), 0.1),
        ]
    )
    families = parser.parse(text)
    found = families["edge_batches_total"].samples if names else {}
    labels = METRICS["edge_batches_total"].labels
    assert found == {
        ("edge_batches_total", tuple(zip(labels, one, strict=True))): float(value) for one in names
    }
    assert families["edge_uptime_seconds"].values() == [0.1]


@given(st.lists(st.integers(0, 1 << 40), max_size=30))
def test_a_histogram_is_told_exactly_at_its_borders(durations_ns: list[int]) -> None:
    one = ("m", "1", "fp32", "reference")
    made = histogram(*durations_ns)
    text = metrics.render([Sample("edge_queue_duration_seconds", one, made)])
    (family,) = parser.parse(text).values()
    for bound_ns in metrics.BOUNDS_NS:
        (count,) = family.values(le=repr(bound_ns / 1e9))
        assert count == sum(value < bound_ns for value in durations_ns)
    assert family.values(le="+Inf") == [len(durations_ns)]
    sums = [value for (name, _), value in family.samples.items() if name.endswith("_sum")]
    assert sums == [sum(durations_ns) / 1e9]


def test_samples_of_a_name_stand_together_in_the_order_of_the_table() -> None:
    mixed = [
        Sample("edge_store_bytes", (), 1),
        Sample("edge_model_ready", ("b",), 1),
        Sample("edge_uptime_seconds", (), 2.5),
        Sample("edge_model_ready", ("a",), 0),
    ]
    families = parser.parse(metrics.render(mixed))
    assert list(families) == ["edge_uptime_seconds", "edge_model_ready", "edge_store_bytes"]
    assert len(families["edge_model_ready"].samples) == 2


def test_what_is_not_in_the_table_cannot_be_told() -> None:
    with pytest.raises(KeyError):
        metrics.render([Sample("edge_secret_total", (), 1)])
    for labels in ((), ("a", "b")):
        with pytest.raises(ValueError, match="zip"):
            metrics.render([Sample("edge_model_ready", labels, 1)])


def test_prometheus_own_parser_reads_the_same() -> None:
    client = pytest.importorskip("prometheus_client.parser", reason="a second opinion (extra dev)")
    one = ('a \\ "b"\n', "1", "fp32", "reference")
    text = metrics.render(
        [
            Sample("edge_requests_total", (*one, "ok"), 7),
            Sample("edge_request_duration_seconds", one, histogram(5_000, 90_000_000)),
            Sample("edge_uptime_seconds", (), 1e-7),
        ]
    )
    ours = {key: value for one in parser.parse(text).values() for key, value in one.samples.items()}
    theirs = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in client.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert theirs == {
        (name, tuple(sorted(labels))): value for (name, labels), value in ours.items()
    }


def test_the_strict_parser_refuses_what_is_not_the_format() -> None:
    head = "# HELP a x\n# TYPE a counter\n"
    parser.parse(head + 'a{b="c\\"\\\\\\n"} 1\n')
    for wrong in (
        "a 1\n",
        head,
        head + "a 1",
        head + "a 1\na 2\n",
        head + "b 1\n",
        head + 'a{b="c} 1\n',
        head + 'a{b="c",} 1\n',
        head + 'a{b="c\\d"} 1\n',
        head + "a -1\n",
        head + "a one\n",
        '# HELP a x\n# TYPE a histogram\na_bucket{le="+Inf"} 1\na_sum 1\na_count 2\n',
        '# HELP a x\n# TYPE a histogram\na_bucket{le="1"} 1\na_sum 1\na_count 1\n',
    ):
        with pytest.raises((AssertionError, KeyError)):
            parser.parse(wrong)
