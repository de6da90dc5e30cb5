"""From measured times to a profile: threads, order of backends, memory budget.

Law of this file: pure. Times, sizes and the date come as values, a YAML document goes out; who runs
the models is `edge_runtime.cli.learning`. What it writes is only what was measured; all else is
inherited from the profile of the board.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from device_profiles.loading import Resolved
from device_profiles.schema import BackendChoice

# A further thread takes a core from other models: it must buy at least this much. Below it is also
# where two measurements of the same thing differ on a machine that others use.
THREAD_GAIN_MIN = 0.10
# Of the memory that was available while the machine did what it does otherwise: the rest is for
# what comes later, and for the page cache that keeps the disk from being asked for everything.
AVAILABLE_SHARE = 0.8


class Measured(NamedTuple):
    """A variant with so many threads on this machine. `error`: why it was not measured."""

    variant: str
    backend: str
    device_class: str
    threads: int | None  # None: its backend, or its own options, leave no choice
    run_ns: tuple[int, ...] = ()  # one median for each round
    private_bytes: int = 0
    version: str = ""
    device: str = ""
    error: str = ""

    @property
    def p50_ms(self) -> float:
        """The median of the rounds' medians, in ms."""
        return statistics.median(self.run_ns) / 1e6 if self.run_ns else float("inf")

    @property
    def spread(self) -> float:
        """Half of the rounds differ by no more than this share of the median."""
        if len(self.run_ns) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.run_ns, n=4)
        return (high - low) / statistics.median(self.run_ns)


class Found(NamedTuple):
    """The best of one backend on one class of device."""

    backend: str
    device_class: str
    best: Measured
    tried: tuple[Measured, ...]  # the same variant with other numbers of threads, fewest first


def thread_counts(cpu_count: int) -> list[int]:
    """What is tried: every number on a small machine, powers of two and all on a large one."""
    if cpu_count <= 8:
        return list(range(1, max(cpu_count, 1) + 1))
    powers = [1 << exponent for exponent in range(cpu_count.bit_length())]
    return sorted({*(one for one in powers if one < cpu_count), cpu_count})


def fewest_threads(tried: Sequence[Measured]) -> Measured:
    """The measurement to go by: more threads only where each step up pays.

    Args:
        tried: one variant, any order; all were measured.
    """
    ordered = sorted(tried, key=lambda one: one.threads or 0)
    best = ordered[0]
    for one in ordered[1:]:
        if one.p50_ms < best.p50_ms * (1 - THREAD_GAIN_MIN):
            best = one
    return best


def found(measured: Sequence[Measured]) -> list[Found]:
    """The backends that ran something, quickest first; each by its quickest variant."""
    groups: dict[tuple[str, str], dict[str, list[Measured]]] = {}
    for one in measured:
        if not one.error:
            variants = groups.setdefault((one.backend, one.device_class), {})
            variants.setdefault(one.variant, []).append(one)
    each = []
    for (backend, device_class), variants in groups.items():
        best = min((fewest_threads(tried) for tried in variants.values()), key=_p50)
        tried = sorted(variants[best.variant], key=lambda one: one.threads or 0)
        each.append(Found(backend, device_class, best, tuple(tried)))
    return sorted(each, key=lambda one: one.best.p50_ms)


def budget_bytes(available_bytes: int) -> int:
    """For all models, of what is available; whole MiB."""
    return int(available_bytes * AVAILABLE_SHARE) >> 20 << 20


def document(
    name: str,
    base: Resolved,
    measured: Sequence[Measured],
    *,
    model: str,
    available_bytes: int,
    date: str,
    where: str,
) -> dict[str, Any]:
    """The profile to write.

    Args:
        base: the profile of the board, which it extends.
        model: what was run, such as `fashion-mnist@1`.
        date: ISO, of the measurement.
        where: the machine, as people call it.
    """
    results = found(measured)
    assert results, "somebody looked at the errors before"
    stamp = f"measured {date} on {where} with {model}"
    budget = budget_bytes(available_bytes)
    profile: dict[str, Any] = {
        "name": name,
        "title": f"{base.profile.title}, learned {date}",
        "extends": base.profile.name,
        "backends": [
            *(_choice(one, base.profile.backends) for one in results),
            *(_plain(one) for one in base.profile.backends if not _measured(one, results)),
        ],
    }
    sources = {"backends": f"{stamp}: " + "; ".join(_said(one) for one in results)}
    if budget:
        profile["memory"] = {"budget_bytes": f"{budget >> 20} MiB"}
        sources["memory"] = (
            f"{stamp}: {available_bytes >> 20} MiB were available, "
            f"of which models may have {AVAILABLE_SHARE:.0%}"
        )
    unknown = {f"backends.{one.backend}.{one.variant}": one.error for one in measured if one.error}
    return {**profile, "sources": sources, **({"unknown": unknown} if unknown else {})}


def _p50(one: Measured) -> float:
    return one.p50_ms


def _measured(choice: BackendChoice, results: Sequence[Found]) -> bool:
    return (choice.backend, choice.device_class) in {
        (one.backend, one.device_class) for one in results
    }


def _choice(one: Found, base: Sequence[BackendChoice]) -> dict[str, Any]:
    """The line of a backend: the board's own, with what was learned."""
    known = next(
        (
            line
            for line in base
            if (line.backend, line.device_class) == (one.backend, one.device_class)
        ),
        BackendChoice(one.backend, one.device_class),
    )
    line = _plain(known)
    if one.best.threads is not None:
        line["options"] = {**known.options, "threads": one.best.threads}
    return line


def _plain(choice: BackendChoice) -> dict[str, Any]:
    """What is not a default, as it is written."""
    fields: Mapping[str, Any] = {
        "device_class": choice.device_class if choice.device_class != "cpu" else "",
        "options": dict(choice.options),
        "versions": choice.versions,
        "accelerator": choice.accelerator,
    }
    return {"backend": choice.backend, **{key: value for key, value in fields.items() if value}}


def _said(one: Found) -> str:
    """The figures that a line of the profile rests on."""
    times = ", ".join(
        f"{tried.p50_ms:.3g} ms" + (f" with {tried.threads}" if tried.threads else "")
        for tried in one.tried
    )
    threads = " threads" if one.best.threads is not None else ""
    return f"{one.backend} {one.best.version} {one.best.variant} {times}{threads}"
