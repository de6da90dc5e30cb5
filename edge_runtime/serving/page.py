"""The status page: what a worker tells without being asked.

Law of this file: the layout of one page of shared memory. A worker writes aligned 8-byte words in
place (no lock, no message); the supervisor reads them when it likes. A word is read whole or not at
all on the machines we run on; two words may be from different moments.
"""

from __future__ import annotations

import mmap
import os

PAGE_SIZE = 4096
RUNNERS_MAX = 32  # one word each for "this run began at"

# Word numbers.
REQUESTS = 0  # answered with outputs
ERRORS = 1  # answered with an error, refusals and expiries not counted
REFUSED = 2  # overloaded
EXPIRED = 3  # deadline passed before the run
CONNECTIONS = 4  # open now
WAITING = 5  # admitted, not yet running
RUN_NS = 6  # sum of run times
LOOP_NS = 7  # CLOCK_MONOTONIC at the newest turn of the loop
BATCHES = 8  # runs of more than one request
BATCHED = 9  # requests in them
CACHE_HITS = 10
CACHE_MISSES = 11
RUN_BEGAN = 16  # .. 16 + RUNNERS_MAX: CLOCK_MONOTONIC at which runner i began its run, 0: idle


def create() -> int:
    """A new page of zeros: a memfd that cannot change its size."""
    import fcntl

    fd = os.memfd_create("edge-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def words(fd: int) -> memoryview:
    """The page as 512 unsigned 64-bit words."""
    return memoryview(mmap.mmap(fd, PAGE_SIZE)).cast("Q")


def freeze(live: memoryview) -> memoryview:
    """The words as they are now; unmaps the page, and with it ends mmap's own descriptor."""
    copy = memoryview(live.tobytes()).cast("Q")
    mapping = live.obj
    live.release()
    assert isinstance(mapping, mmap.mmap)
    mapping.close()
    return copy


def oldest_run_ns(page: memoryview) -> int:
    """When the longest-running run began, CLOCK_MONOTONIC; 0: nothing runs."""
    began = [word for word in page[RUN_BEGAN : RUN_BEGAN + RUNNERS_MAX] if word]
    return min(began, default=0)
