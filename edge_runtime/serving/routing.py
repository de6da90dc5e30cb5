"""Which requests a candidate answers, which answers it is shown, and when it is too late for it.

Law of this file: pure. Numbers and keys in, verdicts out; no clock, no counter of its own. A choice
depends on the seed and on the number or key only, so it is the same on every device and after every
restart, and raising the share keeps everybody who was chosen before.
"""

from __future__ import annotations

from edge_runtime import digests

_MASK = (1 << 64) - 1
EVERYBODY = 1 << 64  # the limit of a share of 1
# Without an answer of the candidate for so long, the active version runs the request itself. A
# client without a deadline waits that much longer, and no more.
PATIENCE_NS_MAX = 1_000_000_000


def seed_of(model: str, version: int) -> int:
    """The seed of one candidate: the next one does not get the same clients again."""
    digest = digests.blake2b(f"{model}@{version}".encode(), 8)
    return int.from_bytes(digest, "little")


def mix(number: int, seed: int) -> int:
    """64 bits that depend on every bit of both (SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def mix_key(key: str, seed: int) -> int:
    """The same for a routing key."""
    salt = seed.to_bytes(8, "little")
    return int.from_bytes(digests.blake2b(key.encode(), 8, salt), "little")


def limit_of(share: float) -> int:
    """What a mixed number must be below to be chosen; `share` is 0 (nobody) to 1 (everybody)."""
    assert 0 <= share <= 1
    return round(share * EVERYBODY)


def patience_until_ns(now_ns: int, deadline_ns: int, run_ns: float) -> int:
    """Until when the candidate's answer is waited for.

    Half of the time that the request has left is the active version's, and two of its runs in any
    case.

    Args:
        deadline_ns: of the request; 0: it has none.
        run_ns: a usual run of the active version.
    """
    until_ns = now_ns + PATIENCE_NS_MAX
    if deadline_ns:
        half_ns = (deadline_ns - now_ns) // 2
        until_ns = min(until_ns, now_ns + half_ns, deadline_ns - 2 * round(run_ns))
    return until_ns
