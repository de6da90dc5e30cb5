"""What of a decision still stands: is it out of date, which variants may serve, which must go.

Law of this file: pure. Decisions and deaths in, names and verdicts out. How a decision is made is
`selection`'s.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import structs

from edge_runtime.serving.health import Cause
from edge_runtime.store.decisions import Decision, Left


def changed(decision: Decision, fingerprint: Mapping[str, str]) -> str:
    """What a decision depended on and is different now, as a sentence; "": nothing."""
    names = sorted(decision.fingerprint.keys() | fingerprint.keys())
    parts = [
        f"{name}: {decision.fingerprint.get(name) or 'none'} -> {fingerprint.get(name) or 'none'}"
        for name in names
        if decision.fingerprint.get(name) != fingerprint.get(name)
    ]
    return "; ".join(parts)


def remaining(decision: Decision) -> tuple[str, ...]:
    """The variants that may serve, best first, without those that were left."""
    gone = {one.variant for one in decision.left}
    return tuple(name for name in decision.order if name not in gone)


def to_load(decision: Decision) -> tuple[str, ...]:
    """The variants to load, in order.

    When every one was left, they are all tried again, those that gave wrong answers last: each load
    compares the goldens, and a device that serves what passes is better than one that serves none.
    """
    left = remaining(decision)
    if left:
        return left
    wrong = {one.variant for one in decision.left if one.cause == Cause.GOLDEN}
    return tuple(sorted(decision.order, key=lambda name: name in wrong))


def without(decision: Decision, left: Left) -> Decision:
    """The decision after a variant was left."""
    others = tuple(one for one in decision.left if one.variant != left.variant)
    return structs.replace(decision, left=(*others, left))


# Deaths that say enough: the next run or answer of this variant would be as bad.
AT_ONCE = frozenset({Cause.GOLDEN, Cause.HANG})


def must_leave(cause: Cause, deaths: int, deaths_max: int) -> bool:
    """Whether a variant is to be left after so many deaths within the window, for another one.

    A hang has cost `run_time_max_ms` of service, a wrong answer cannot be taken back: once is
    enough. Other deaths may be one poisoned request or a passing lack of memory.
    """
    return cause in AT_ONCE or deaths >= deaths_max
