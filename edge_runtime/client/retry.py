"""When to try again, and when to stop.

Law of this file: values in, verdict out; no clock, no sleep, no socket.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from edge_runtime.errors import (
    ConnectionClosedError,
    DeadlineError,
    EdgeError,
    OverloadedError,
    UnavailableError,
    from_document,
)

# What may pass by itself. `infer` has no side effects, so sending it again is always allowed.
RETRYABLE = (UnavailableError, OverloadedError)


def plain(error: EdgeError) -> EdgeError:
    """The error without its traceback, which would keep the connection's memory alive."""
    return from_document(error.document())


def out_of_time(late: DeadlineError, before: EdgeError | None) -> DeadlineError:
    """The error of an attempt that got no answer in time, after one that failed with `before`."""
    if before is None:
        return late
    message = f"{late.message}; the attempt before: {before.message}"
    return DeadlineError(message, where=late.where, remedy=before.remedy)


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter, inside the caller's deadline.

    Args:
        delay_s_first: pause after the first failure, seconds. 10 ms: about a worker's start.
        delay_s_max: longest pause, seconds, so that a daemon that is back is noticed.
        factor: growth from one pause to the next.
        jitter: share of a pause that is random, so that many clients do not return at once.
        enabled: false raises the first failure as it is.
    """

    delay_s_first: float = 0.01
    delay_s_max: float = 1.0
    factor: float = 2.0
    jitter: float = 0.5
    enabled: bool = True

    def delay_s(
        self, error: EdgeError, failures: int, remaining_s: float, rng: random.Random
    ) -> float:
        """How long to wait before trying again, seconds.

        Args:
            failures: how many attempts of this call failed before this one.
            remaining_s: until the deadline.

        Raises:
            EdgeError: `error` itself when retries are off, a DeadlineError that names it when the
                next attempt would come after the deadline.
        """
        if not self.enabled:
            raise error
        delay_s = self._delay_s(error, failures, rng)
        if delay_s >= remaining_s:
            raise DeadlineError(
                f"gave up after {failures + 1} attempts; the last: {error.message}",
                where=error.where,
                remedy=error.remedy,
                retry_after_s=error.retry_after_s,
            ) from error
        return delay_s

    def _delay_s(self, error: EdgeError, failures: int, rng: random.Random) -> float:
        if isinstance(error, ConnectionClosedError) and failures == 0:
            return 0.0  # an idle connection whose worker was swapped: the next one is there already
        back_off_s = min(self.delay_s_max, self.delay_s_first * self.factor ** min(failures, 30))
        jittered_s = back_off_s * (1 - self.jitter * rng.random())
        return max(jittered_s, error.retry_after_s or 0.0)
