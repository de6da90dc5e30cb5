"""A strict little parser of the text format 0.0.4, written from its description.

Law of this file: whatever the format does not promise is an error. (Prometheus documentation,
"Exposition formats": HELP and TYPE once and before their samples, samples of a metric together,
escapes in label values and help, histograms with cumulative buckets that end in +Inf.)
"""

from __future__ import annotations

import re
from typing import NamedTuple

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(,|$)')
LINE = re.compile(rf"({NAME})(?:\{{(.*)\}})? ([-+]?[0-9.]+(?:e[-+]?[0-9]+)?|[+-]Inf|NaN)")
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}

Labels = tuple[tuple[str, str], ...]


class Family(NamedTuple):
    """One metric: its kind, help, and samples by (name, labels)."""

    kind: str
    help: str
    samples: dict[tuple[str, Labels], float]

    def values(self, **labels: str) -> list[float]:
        """Values of the samples that have these labels."""
        wanted = set(labels.items())
        return [value for (_, have), value in self.samples.items() if wanted <= set(have)]


def parse(text: str) -> dict[str, Family]:
    """Families by name, in order. Raises AssertionError on anything that is not strictly right."""
    assert text.endswith("\n") and "\n\n" not in text
    families: dict[str, Family] = {}
    current, helps = "", {}
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            _, _, name, meaning = line.split(" ", 3)
            assert re.fullmatch(NAME, name) and name not in helps, line
            helps[name] = meaning
            current = ""
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name in helps and name not in families and kind in SUFFIXES, line
            families[name] = Family(kind, helps[name], {})
            current = name
        else:
            _sample(line, current, families)
    assert set(helps) == set(families)
    for name, family in families.items():
        assert family.samples, f"{name} has no sample"
        if family.kind == "histogram":
            _check_histogram(name, family)
    return families


def _sample(line: str, current: str, families: dict[str, Family]) -> None:
    match = LINE.fullmatch(line)
    assert match, f"not a sample: {line!r}"
    name, labels, value = match.groups()
    assert current, f"a sample outside of its metric: {line!r}"
    family = families[current]
    assert name in [current + suffix for suffix in SUFFIXES[family.kind]], line
    key = name, _labels(labels or "")
    assert key not in family.samples, f"twice: {line!r}"
    family.samples[key] = float(value)
    assert family.kind == "gauge" or float(value) >= 0, line


def _labels(text: str) -> Labels:
    found = []
    at = 0
    while at < len(text):
        match = LABEL.match(text, at)
        assert match, f"not labels: {text!r}"
        name, value, _ = match.groups()
        plain = re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), value)
        found.append((name, plain))
        at = match.end()
    assert not text.endswith(",") and len({name for name, _ in found}) == len(found), text
    return tuple(found)


def _check_histogram(name: str, family: Family) -> None:
    buckets: dict[Labels, list[tuple[float, float]]] = {}
    for (sample, labels), value in family.samples.items():
        if sample == f"{name}_bucket":
            (bound,) = [text for label, text in labels if label == "le"]
            rest = tuple(pair for pair in labels if pair[0] != "le")
            buckets.setdefault(rest, []).append((float(bound), value))
    for labels, pairs in buckets.items():
        bounds, counts = [bound for bound, _ in pairs], [count for _, count in pairs]
        assert bounds == sorted(set(bounds)) and bounds[-1] == float("inf"), labels
        assert counts == sorted(counts), f"{name} {labels}: not cumulative"
        assert family.samples[f"{name}_count", labels] == counts[-1]
        assert (f"{name}_sum", labels) in family.samples
