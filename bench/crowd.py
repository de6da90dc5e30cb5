"""Several clients at once: `python -m bench.crowd ORDER`, told and asked over its standard streams.

Law of this file: clients are processes, because applications are; those that share memory with
the model (in process) are threads. For each line with a number of seconds on stdin all of them call
for that long, and one line of JSON says how many calls ended and how long each took.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import msgspec

from bench.child import WARMUP_CALLS, timed

if TYPE_CHECKING:
    from bench.peers import Call, Order

# Of one client and round: enough for its p99, few enough to pass on quickly.
TIMES_MAX = 4000
START_S = 0.02  # from the order to the first call: everybody has heard of it


class Tally(msgspec.Struct):
    """What came of some seconds: calls that ended in time, and nanoseconds of each (a sample)."""

    calls: int
    times_ns: list[int]


def main(order_json: str) -> None:
    """Serve measurements until stdin ends."""
    cores = {msgspec.json.decode(order_json)["core"]}
    if -1 not in cores:
        os.sched_setaffinity(0, cores)
    from bench.peers import PEERS, Order

    order = msgspec.json.decode(order_json, type=Order)
    peer = PEERS[order.peer]
    crowd: _Threads | _Processes = (_Threads if peer.threads else _Processes)(order, peer.make)
    print("ready", flush=True)
    for line in sys.stdin:
        begin_ns = time.monotonic_ns() + round(START_S * 1e9)
        tallies = crowd.run(begin_ns, begin_ns + round(float(line) * 1e9))
        total = sum(one.calls for one in tallies)
        times = [ns for one in tallies for ns in one.times_ns]
        print(msgspec.json.encode(Tally(total, times)).decode(), flush=True)


class _Threads:
    def __init__(self, order: Order, make: Any) -> None:
        self._call = make(order)
        timed(self._call, WARMUP_CALLS)
        self._count = order.clients

    def run(self, begin_ns: int, end_ns: int) -> list[Tally]:
        tallies: list[Tally] = []
        work = [
            threading.Thread(target=lambda: tallies.append(_until(self._call, begin_ns, end_ns)))
            for _ in range(self._count)
        ]
        for one in work:
            one.start()
        for one in work:
            one.join()
        return tallies


class _Processes:
    def __init__(self, order: Order, make: Any) -> None:
        self._pipes = [_forked(order, make) for _ in range(order.clients)]
        for _, answers in self._pipes:
            answers.readline()

    def run(self, begin_ns: int, end_ns: int) -> list[Tally]:
        for orders, _ in self._pipes:
            orders.write(b"%d %d\n" % (begin_ns, end_ns))
            orders.flush()
        return [msgspec.json.decode(answers.readline(), type=Tally) for _, answers in self._pipes]


def _forked(order: Order, make: Any) -> tuple[Any, Any]:
    """A client's pipes: orders to it, answers from it."""
    orders_out, orders_in = os.pipe()
    answers_out, answers_in = os.pipe()
    if os.fork() == 0:
        os.close(orders_in)
        os.close(answers_out)
        _client(order, make, os.fdopen(orders_out, "rb"), os.fdopen(answers_in, "wb"))
    os.close(orders_out)
    os.close(answers_in)
    return os.fdopen(orders_in, "wb"), os.fdopen(answers_out, "rb")


def _client(order: Order, make: Any, orders: Any, answers: Any) -> None:
    """Call when told. Never returns."""
    try:
        call = make(order)
        timed(call, WARMUP_CALLS)
        answers.write(b"ready\n")
        answers.flush()
        for line in orders:
            tally = _until(call, *(int(part) for part in line.split()))
            answers.write(msgspec.json.encode(tally) + b"\n")
            answers.flush()
    except Exception:  # noqa: BLE001 - told on stderr, which the parent shows
        traceback.print_exc()
    finally:
        os._exit(0)


def _until(call: Call, begin_ns: int, end_ns: int) -> Tally:
    """Call until the time is over; a call that ends later does not count."""
    clock, times = time.monotonic_ns, []
    time.sleep(max(0, begin_ns - clock()) / 1e9)
    began = clock()
    while began < end_ns:
        call()
        now = clock()
        times.append(now - began)
        began = now
    if began > end_ns and times:
        times.pop()
    step = len(times) // TIMES_MAX + 1
    return Tally(len(times), times[::step])


if __name__ == "__main__":
    main(sys.argv[1])
