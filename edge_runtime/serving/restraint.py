"""What a worker may still do while the device is held back.

Law of this file: pure; times in, verdict out. The loop asks before it lets a request wait and tells
what runs took; what is allowed comes from the supervisor (`channel.Restrain`).

`run_share` is a budget of computing time: it grows by the share of each second that passes, a run
takes what it took. So it means the same for a model of microseconds and one of seconds, a model
that is asked less often than its share never notices, and heat, which follows the time that is
computed, falls by the same share.
"""

from __future__ import annotations

# What may be saved up while nobody asks: a burst as long as a person waits without noticing, and
# far below the seconds in which a chip heats up.
BURST_NS = 250_000_000
# Heat and shortage last longer than this; whoever asks more often costs work for nothing.
PRIORITY_RETRY_NS = 1_000_000_000
# Sooner nobody needs to come back: about the time of one turn of the loop under load.
RETRY_NS_MIN = 1_000_000


class Restraint:
    """The budget of one worker.

    Args:
        run_share: of the time of each lane, 0 < share <= 1; 1: no limit.
        priority_min: requests below it are refused.
        reason: why, for those who are refused.
        lanes: runs that go on at the same time.
        now_ns: CLOCK_MONOTONIC, as everywhere here.
    """

    def __init__(
        self, run_share: float, priority_min: int, reason: str, lanes: int, now_ns: int
    ) -> None:
        assert 0 < run_share <= 1
        assert lanes > 0
        self.reason = reason
        self.priority_min = priority_min
        self._rate = run_share * lanes if run_share < 1 else 0.0  # 0: no limit
        self._saved_ns = self._rate * BURST_NS
        self._seen_ns = now_ns

    def ran(self, run_ns: int) -> None:
        """Note what a run took."""
        self._saved_ns -= run_ns

    def wait_ns(self, priority: int, ahead_ns: float, now_ns: int) -> float:
        """0: the request may wait for its turn. Otherwise it is refused and may come back then.

        Args:
            ahead_ns: what those that wait or run already will take.
        """
        if priority < self.priority_min:
            return PRIORITY_RETRY_NS
        if not self._rate:
            return 0
        earned_ns = self._rate * (now_ns - self._seen_ns)
        self._saved_ns = min(self._saved_ns + earned_ns, self._rate * BURST_NS)
        self._seen_ns = now_ns
        lacking_ns = ahead_ns - self._saved_ns
        return max(lacking_ns / self._rate, RETRY_NS_MIN) if lacking_ns >= 0 else 0
