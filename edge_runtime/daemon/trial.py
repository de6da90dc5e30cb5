"""A candidate beside the version that serves: what the supervisor holds of it.

Law of this file: it makes the memory and the connection that the two workers share, hands them out,
and reads the counts. When a trial begins and ends is `candidate`'s. Nothing of it is on disk: a
daemon that starts again has no candidate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from edge_runtime import tensors
from edge_runtime.clock import Clock
from edge_runtime.daemon.processes import WorkerProcess
from edge_runtime.errors import RequestError
from edge_runtime.metrics import Sample
from edge_runtime.serving import channel, page, routing, trial
from edge_runtime.wire import regions

# The queue of samples: four of the largest kind, so that one can be written while another is run.
# Small ones are many: a millisecond's worth of the fastest model's fits into the least.
RING_SAMPLES = 4
RING_BYTES_MIN = 1024 * 1024
RING_BYTES_MAX = 64 * 1024 * 1024
# After the end of a trial its numbers are final: requests that were at the candidate are answered.
LINGER_S = 2.0


class Trial:
    """A candidate, from its load to its promotion, its end, or its death; then its numbers."""

    def __init__(self, candidate: WorkerProcess, stable_version: int, clock: Clock) -> None:
        self.candidate = candidate
        self.shadow_share = self.split_share = 0.0
        self.ended = ""  # why
        self._stable_version = stable_version
        self._clock = clock
        self._began_ns = clock.monotonic_ns()
        self._ended_ns = 0
        self._stable: WorkerProcess | None = None
        self._fds = [page.create(), page.create()]
        self._pages = [page.words(fd) for fd in self._fds]

    @property
    def version(self) -> int:
        """The candidate's."""
        return self.candidate.spec.version

    @property
    def live(self) -> bool:
        """Whether it goes on."""
        return not self.ended

    def link(self, stable: WorkerProcess) -> None:
        """Introduce the candidate to the worker that serves, be it the first one or its successor.

        Raises:
            StorageError: no memory or descriptor for what they share.
            OSError: the same, from the socket pair.
        """
        spec = self.candidate.spec
        size = ring_bytes(spec.inputs, spec.outputs)
        seed = routing.seed_of(spec.model, spec.version)
        mine: list[int] = []
        try:
            mine.append(regions.create_region(size, "edge-ring"))
            mine.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            ours, theirs = channel.stream_pair()
            mine += [ours.detach(), theirs.detach()]
            ring, bell, near, far = mine
            self._tell(self.candidate, channel.Shadow(size), [ring, bell, self._fds[1]])
            self._adopt(far)
            self._tell(
                stable,
                channel.Accompany(self.version, seed, size, self.shadow_share, self.split_share),
                [ring, bell, near, self._fds[0]],
            )
        finally:
            for fd in mine:
                os.close(fd)
        self._stable = stable

    def _tell(self, worker: WorkerProcess, message: channel.Message, fds: list[int]) -> None:
        worker.tell(message, [os.dup(fd) for fd in fds])

    def _adopt(self, fd: int) -> None:
        """The splitter is a client of the candidate like any other."""
        peer = (os.getpid(), os.geteuid(), os.getegid())
        self.candidate.adopt(channel.Adopt(own=False, peer=peer), [os.dup(fd)])

    def share(self, shadow: float | None, split: float | None) -> None:
        """Other shares of the traffic, from the next request on; None: as it is."""
        self.shadow_share = self.shadow_share if shadow is None else shadow
        self.split_share = self.split_share if split is None else split
        if self._stable is not None:
            self._stable.tell(channel.Shares(self.shadow_share, self.split_share))

    def end(self, reason: str) -> None:
        """No more samples and requests; the numbers stay. Once only."""
        if not self.live:
            return
        self.ended = reason
        self._ended_ns = self._clock.monotonic_ns()
        if self._stable is not None:
            self._stable.tell(channel.Alone())
        self.candidate.tell(channel.Unshadow())

    def tidy(self) -> None:
        """Once, some time after the end: `close`."""
        ended_for_s = (self._clock.monotonic_ns() - self._ended_ns) / 1e9
        if not self.live and ended_for_s > LINGER_S:
            self.close()

    def close(self) -> None:
        """Keep the numbers as they are, give memory and descriptors back."""
        if self._fds:
            self._pages = [page.freeze(words) for words in self._pages]
            for fd in self._fds:
                os.close(fd)
            self._fds = []

    def describe(self) -> dict[str, Any]:
        """The candidate, for `models`."""
        return {
            "version": self.version,
            "generation": self.candidate.spec.generation,
            "variant": self.candidate.spec.variant,
            "shadow_share": self.shadow_share,
            "split_share": self.split_share,
        }

    def summary(self) -> str:
        """The numbers in a line, for events."""
        found = self.report()
        shadow, split = found["shadow"], found["split"]
        return (
            f"{shadow['compared']} answers compared, {shadow['disagreed']} disagreed,"
            f" {shadow['errors']} errors, {shadow['dropped']} dropped;"
            f" {split['answered']} of {split['chosen']} requests answered"
        )

    def report(self) -> dict[str, Any]:
        """State and numbers, as documented in docs/shadow.md."""
        spec = self.candidate.spec
        until_ns = self._ended_ns or self._clock.monotonic_ns()
        return {
            "name": spec.model,
            "candidate": spec.version,
            "variant": spec.variant,
            "stable": self._stable_version,
            "state": "running" if self.live else "ended",
            "reason": self.ended,
            "shadow_share": self.shadow_share,
            "split_share": self.split_share,
            "duration_s": (until_ns - self._began_ns) / 1e9,
            **trial.report(
                self._pages[0], self._pages[1], [output.name for output in spec.outputs]
            ),
        }

    def samples(self) -> Iterator[Sample]:
        """State and numbers, for Prometheus."""
        labels = self.candidate.spec.model, str(self.version)
        yield Sample("edge_trial_running", labels, int(self.live))
        yield Sample("edge_trial_share", (*labels, "shadow"), self.shadow_share * self.live)
        yield Sample("edge_trial_share", (*labels, "split"), self.split_share * self.live)
        yield from trial.samples(self._pages[0], self._pages[1], labels)


def check_share(share: float) -> float:
    """The share, if it is one.

    Raises:
        RequestError: it is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise RequestError(f"share {share:g}", where="arguments.share", expected="0 to 1")
    return share


def ring_bytes(
    inputs: tuple[tensors.TensorSpec, ...], outputs: tuple[tensors.TensorSpec, ...]
) -> int:
    """How large the queue of samples is; a free dimension counts as 1."""
    sample = sum(_size_bytes(spec) for spec in (*inputs, *outputs))
    wanted = min(max(RING_SAMPLES * sample, RING_BYTES_MIN), RING_BYTES_MAX)
    return 1 << math.ceil(math.log2(wanted))


def _size_bytes(spec: tensors.TensorSpec) -> int:
    item = tensors.DATATYPES[spec.datatype][1] or 1
    return item * math.prod(max(dim, 1) for dim in spec.shape)
