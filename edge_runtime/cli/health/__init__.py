"""What `edge-runtime doctor` looks at, and what it makes of it.

Law of this package: `facts.py` and `reach.py` look (reads below a root that is an argument, bounded
in time), `verdicts.py` and `hardware.py` judge (pure: a fact in, a verdict out), `examination.py`
says which look belongs to which judgement and runs them side by side. What cannot be seen is an
`Unknown` with its reason, never a guess and never a crash.
Law of this file: the words that they share.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

# pass: as it should be; warn: works, but; fail: something does not work; skip: does not apply here;
# unknown: could not be seen.
Verdict = Literal["pass", "warn", "fail", "skip", "unknown"]
VERDICTS: tuple[Verdict, ...] = ("pass", "warn", "fail", "skip", "unknown")

EXIT_CODES = {"fail": 2, "warn": 1}  # as monitoring plug-ins have them; everything else is 0


class Check(msgspec.Struct, frozen=True):
    """One line of the report.

    Attributes:
        group: the heading that it stands below.
        remedy: what to do; empty where there is nothing to do.
    """

    group: str
    name: str
    verdict: Verdict
    summary: str
    remedy: str = ""


class Finding(NamedTuple):
    """A verdict without its place in the report."""

    verdict: Verdict
    summary: str
    remedy: str = ""


class Unknown(NamedTuple):
    """What could not be seen, and why."""

    why: str


def counts(checks: list[Check]) -> dict[str, int]:
    """How many checks came to each verdict."""
    return {verdict: sum(c.verdict == verdict for c in checks) for verdict in VERDICTS}


def overall(checks: list[Check]) -> Verdict:
    """The worst verdict: fail, warn or pass."""
    found = {check.verdict for check in checks}
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"


def exit_code(checks: list[Check]) -> int:
    """0: nothing wrong was seen; 1: warnings; 2: something failed."""
    return EXIT_CODES.get(overall(checks), 0)
