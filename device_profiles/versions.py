"""Version locks: is 1.20.3 within ">=1.20,<2"?

Law of this file: pure; numbers only. What follows the numbers (`rc1`, `+cpu`, `-generic`) is not
compared: vendors do not agree what it means.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from itertools import zip_longest

_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def satisfies(version: str, lock: str) -> bool:
    """Whether a version keeps every comparison of a lock; "" locks nothing.

    A version without any number keeps no lock but the empty one.
    """
    if not lock:
        return True
    mine = _numbers(version)
    return bool(mine) and all(_keeps(mine, rule) for rule in lock.split(",") if rule)


def _keeps(mine: tuple[int, ...], rule: str) -> bool:
    match = re.fullmatch(r"(>=|<=|==|!=|>|<)([0-9.]+)", rule.strip())
    assert match, f"the schema let {rule!r} through"
    return _COMPARISONS[match[1]](_compared(mine, _numbers(match[2])), 0)


def _numbers(text: str) -> tuple[int, ...]:
    match = re.search(r"[0-9]+(?:\.[0-9]+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _compared(mine: tuple[int, ...], other: tuple[int, ...]) -> int:
    """-1, 0 or 1; 1.2 equals 1.2.0."""
    for left, right in zip_longest(mine, other, fillvalue=0):
        if left != right:
            return 1 if left > right else -1
    return 0
