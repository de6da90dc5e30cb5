"""The golden heartbeat: a served model gives a recorded answer again, now and then.

Law of this file: when a golden is due (pure), and running one. Whether the loop has a moment for
it, and what becomes of a worker that answers wrongly, is `worker`'s. A model that was right at load
can go wrong: a driver after a suspend, an accelerator after an error, memory that rots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edge_runtime.errors import GoldenError
from edge_runtime.serving import goldens
from edge_runtime.serving.goldens import Run
from edge_runtime.serving.spec import GoldenFile, GoldenPair, WorkerSpec

# A clock that counts suspends and one that does not drift apart by microseconds; a suspend is
# longer than this.
SUSPEND_NS_MIN = 100_000_000
# When every request fails, goldens after errors take at most this share of the time.
ERROR_SHARE = 0.05
# So many goldens in a row that fail are no bad moment of the library: it answers nothing any more.
FAILURES_MAX = 3


class Beats(NamedTuple):
    """What has been: times in ns of CLOCK_MONOTONIC.

    Attributes:
        checked_ns: end of the newest golden; at first, of the load.
        took_ns: how long it took.
        failed: the library failed since then.
        slept_ns: what CLOCK_BOOTTIME was ahead at the newest golden.
    """

    checked_ns: int
    took_ns: int = 0
    failed: bool = False
    slept_ns: int = 0


def alarm(beats: Beats, now_ns: int, slept_ns: int) -> str:
    """What has happened that a golden is to be run for now; "": nothing.

    Args:
        slept_ns: CLOCK_BOOTTIME minus CLOCK_MONOTONIC: how long the machine was suspended in all.
    """
    if beats.failed and now_ns - beats.checked_ns >= beats.took_ns / ERROR_SHARE:
        return "the library failed"
    if slept_ns - beats.slept_ns > SUSPEND_NS_MIN:
        return "the machine was suspended"
    return ""


def overdue(beats: Beats, now_ns: int, idle_s: float) -> str:
    """Whether there was none for `idle_s` (0: that does not matter), in words."""
    late = 0 < idle_s * 1e9 <= now_ns - beats.checked_ns
    return f"none for {idle_s:g} s" if late else ""


class Heart:
    """Runs the goldens of one loaded model, one at a time, in turn.

    Attributes:
        reason: why one is due; "": none is. The loop runs it between requests.
        pressing: it is due because something happened, so it does not wait for a quiet moment.
    """

    def __init__(
        self, run: Run, spec: WorkerSpec, now_ns: int, slept_ns: Callable[[], int]
    ) -> None:
        """See above.

        Args:
            slept_ns: as `clock.suspended_ns`.
        """
        self._run = run
        # A state that is kept from one request to the next is the clients': no golden touches it.
        self._pairs = () if spec.options.get("stateful") == "keep" else spec.goldens
        self._tolerance = spec.rtol, spec.atol
        self._idle_s = spec.heartbeat_idle_s
        self._slept_ns = slept_ns
        self._next = 0
        self._failures = 0  # in a row
        self._beats = Beats(now_ns, slept_ns=slept_ns())
        self.reason = ""
        self.pressing = False

    def note_failure(self, now_ns: int) -> None:
        """A run ended with an error of the library's."""
        if not self._beats.failed:
            self._beats = self._beats._replace(failed=True)
        self.look(now_ns)

    def look(self, now_ns: int) -> None:
        """See whether one is due: about once a second, and after a failure."""
        if not self._pairs or self.pressing:
            return
        what = alarm(self._beats, now_ns, self._slept_ns())
        self.reason = what or overdue(self._beats, now_ns, self._idle_s)
        self.pressing = bool(what)

    def beat(self, clock: Callable[[], int]) -> GoldenError | None:
        """Run the next golden: the error when the answer is not the recorded one.

        A model that fails once is not wrong: nothing is said here then, and the next golden comes
        soon; one that fails so often in a row has lost its device. A golden that cannot be read any
        more, or has rotted on the disk, is passed over.
        """
        index = self._next
        self._next = (index + 1) % len(self._pairs)
        began_ns = clock()
        failed, wrong = "", None
        try:
            goldens.check(self._run, self._pairs[index : index + 1], *self._tolerance, first=index)
        except GoldenError as error:
            wrong = error if all(map(_intact, _files(self._pairs[index]))) else None
        except OSError:
            pass  # the recording is gone, which says nothing of the model
        except Exception as failure:  # noqa: BLE001 - a worker must live, whatever a model raises
            failed = str(failure) or type(failure).__name__
        now_ns = clock()
        self._beats = Beats(now_ns, now_ns - began_ns, bool(failed), self._slept_ns())
        self.reason, self.pressing = "", False
        self._failures = self._failures + 1 if failed else 0
        if self._failures >= FAILURES_MAX:
            return _lost(self._failures, failed)
        return wrong


def _lost(failures: int, failed: str) -> GoldenError:
    return GoldenError(
        f"the newest {failures} goldens all failed: {failed}",
        remedy="see `edge-runtime doctor`: the library or its device does not answer any more",
    )


def _files(pair: GoldenPair) -> tuple[GoldenFile, ...]:
    return (*pair.inputs, *pair.outputs)


def _intact(golden: GoldenFile) -> bool:
    """Whether the recording is still what was installed (nothing is known of one without a sum)."""
    try:
        data = Path(golden.path).read_bytes()
    except OSError:
        return False
    return not golden.sha256 or hashlib.sha256(data).hexdigest() == golden.sha256
