"""What a scenario is: a name, a promise to stay within its time, figures out.

Law of this file: the types that the table of scenarios (`__main__`), the scenarios and the report
share; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.summary import Figure, Spread


class BenchError(Exception):
    """A scenario could not be measured: says which part failed and what it printed."""


@dataclass(frozen=True)
class Setting:
    """What a scenario is given.

    Attributes:
        directory: scratch space of this scenario; short, because sockets live in it.
        bundles: model name -> (model file, bundle file).
        quick: measure just enough to see that everything works.
        long: measure for as long as it takes to be sure (`reload`).
        say: shows progress to a person.
    """

    directory: Path
    bundles: Mapping[str, tuple[Path, Path]]
    quick: bool
    say: Callable[[str], None]
    long: bool = False


class Latency(NamedTuple):
    """What one peer took: the spread of the rounds' p50s, p95 and p99 of all calls."""

    peer: str
    label: str
    p50_us: Spread
    p95_us: float
    p99_us: float


class Curve(NamedTuple):
    """A line of a panel; each `y` may have where half of the rounds lie. Style and colour are
    matplotlib's; no colour: the next one.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    between: Sequence[tuple[float, float]] = ()
    style: str = "-"
    colour: str | None = None


class Panel(NamedTuple):
    """A picture of curves that share their axes."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    logarithmic: bool = False


@dataclass(frozen=True)
class Result:
    """What a scenario found."""

    figures: Sequence[Figure]
    latencies: Sequence[Latency] = ()
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)  # for the JSON
    panels: Sequence[Panel] = ()  # for the second picture
    remark: str = ""  # what the reader must know to judge the figures


@dataclass(frozen=True)
class Scenario:
    """A row of the table of scenarios.

    Attributes:
        models: names of those it needs; it is left out where one is missing.
        run: measures; bounded in time.
        cores: processors it needs; left out on a smaller machine.
        by_name: it takes minutes, and is run only when it is named.
    """

    name: str
    title: str
    models: tuple[str, ...]
    run: Callable[[Setting], Result]
    cores: int = 1
    by_name: bool = False
