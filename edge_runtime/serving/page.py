"""The status page: what a worker tells without being asked.

Law of this file: the layout of a few pages of shared memory. A worker writes aligned 8-byte words
in place (no lock, no message; only its loop, but for RUN_BEGAN); the supervisor reads them when it
likes. A word is read whole or not at all on the machines we run on; two words may be from different
moments. Counters only grow; what a worker that ended had counted is added to its successor's.
"""

from __future__ import annotations

import mmap
import os

from edge_runtime import metrics

PAGE_SIZE = 8192
RUNNERS_MAX = 32  # one word each for "this run began at"

# Word numbers.
REQUESTS = 0  # answered with outputs
ERRORS = 1  # answered with an error, refusals and expiries not counted: INVALID + FAILED
REFUSED = 2  # overloaded or held back
EXPIRED = 3  # deadline passed before the run
CONNECTIONS = 4  # open now
WAITING = 5  # admitted, not yet running
HELD = 6  # of REFUSED: because the device holds back
LOOP_NS = 7  # CLOCK_MONOTONIC at the newest turn of the loop
BATCHES = 8  # runs of more than one request
BATCHED = 9  # requests in them
CACHE_HITS = 10
CACHE_MISSES = 11
BATCH_ROWS_MAX = 12  # rows of a batch at most, now: less than at load when batches failed
INVALID = 13  # of ERRORS: the client's mistake
FAILED = 14  # of ERRORS: the model, its library, or we
CANCELLED = 15  # the client left before its answer
RUN_BEGAN = 16  # .. 16 + RUNNERS_MAX: CLOCK_MONOTONIC at which runner i began its run, 0: idle
GOLDENS = RUN_BEGAN + RUNNERS_MAX  # run while it served (serving.heartbeat)
TURN = GOLDENS + 1  # CLOCK_MONOTONIC since when it uses a device that it shares, 0: it does not
# Histograms of durations, metrics.WORDS words each: the sum in ns, then the buckets.
REQUEST = 64  # of requests answered with outputs: read to answered
QUEUE = REQUEST + metrics.WORDS  # of requests that ran: read to run
COMPUTE = QUEUE + metrics.WORDS  # of runs; a batch is one
END = COMPUTE + metrics.WORDS
# Who is connected: pairs of (uid + 1, connections open now). More users at once than there are on a
# device; the connections of one who finds no place are counted in CONNECTIONS only.
USERS = END
USERS_MAX = 32
_USERS = range(USERS, USERS + 2 * USERS_MAX, 2)
assert _USERS.stop * 8 <= PAGE_SIZE

_WORD_MAX = (1 << 64) - 1
# What only grows; the rest is about now.
COUNTERS = (
    *(REQUESTS, ERRORS, REFUSED, EXPIRED, BATCHES, BATCHED, CACHE_HITS, CACHE_MISSES),
    *(INVALID, FAILED, CANCELLED, HELD, GOLDENS),
    *range(REQUEST, END),
)

# Bucket of a duration by its 128 ns: as exact as the buckets, and half the price of computing it.
# Up to 2 ms, where the price shows.
_NARROW_BITS = metrics.OCTAVE_MIN - metrics.SUB_BITS
_NARROW_NS_MAX = 1 << 21
_NARROW = b"".join(
    bytes([index]) * ((metrics.lower_ns(index + 1) - metrics.lower_ns(index)) >> _NARROW_BITS)
    for index in range(metrics.bucket(_NARROW_NS_MAX))
)


def create() -> int:
    """A new page of zeros: a memfd that cannot change its size."""
    import fcntl

    fd = os.memfd_create("edge-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def words(fd: int) -> memoryview:
    """The pages as PAGE_SIZE / 8 unsigned 64-bit words."""
    return memoryview(mmap.mmap(fd, PAGE_SIZE)).cast("Q")


def freeze(live: memoryview) -> memoryview:
    """The words as they are now; unmaps the page, and with it ends mmap's own descriptor."""
    copy = memoryview(live.tobytes()).cast("Q")
    mapping = live.obj
    live.release()
    assert isinstance(mapping, mmap.mmap)
    mapping.close()
    return copy


def observe(words: memoryview, histogram: int, value_ns: int) -> None:
    """Count a duration in the histogram at that word (0.1 us: three of them a request)."""
    try:
        words[histogram + 1 + _NARROW[value_ns >> _NARROW_BITS]] += 1
    except IndexError:
        words[histogram + 1 + metrics.bucket(value_ns)] += 1
    words[histogram] += value_ns


def add(into: memoryview, words: memoryview) -> None:
    """Add the counters of a page to those of another.

    Whatever a worker wrote there: a sum that is too large begins at 0 again, and nothing fails.
    """
    for word in COUNTERS:
        into[word] = (into[word] + words[word]) & _WORD_MAX


def count_user(words: memoryview, uid: int, change: int) -> None:
    """A connection of a user came (1) or went (-1)."""
    free = None
    for word in _USERS:
        if words[word] == uid + 1:
            words[word + 1] = max(words[word + 1] + change, 0)
            return
        if free is None and not words[word + 1]:
            free = word
    if change > 0 and free is not None:
        words[free], words[free + 1] = uid + 1, change


def connections_of(words: memoryview, uid: int) -> int:
    """The connections that a user has now."""
    for word in _USERS:
        if words[word] == uid + 1:
            count: int = words[word + 1]
            return count
    return 0


def oldest_run_ns(page: memoryview) -> int:
    """When the longest-running run began, CLOCK_MONOTONIC; 0: nothing runs."""
    began = [word for word in page[RUN_BEGAN : RUN_BEGAN + RUNNERS_MAX] if word]
    return min(began, default=0)
