"""One measuring process: `python -m bench.child ORDER`, told and asked over its standard streams.

Law of this file: it pins itself, makes its call, warms it up, and then, for each line with a
number on stdin, does that many calls and writes their nanoseconds as one line of JSON. `Child` is
the other end of the two pipes.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from types import TracebackType
from typing import Any

import msgspec

from bench.scenario import BenchError

WARMUP_CALLS = 20
ANSWER_TIMEOUT_S = 60.0  # a round takes a tenth of a second


class Child:
    """A measuring process, ready. Raises BenchError from every method when it fails.

    Args:
        order: what it is told on its command line; has `peer`.
        module: what is run.
    """

    def __init__(self, order: Any, module: str = "bench.child") -> None:
        command = [sys.executable, "-m", module, msgspec.json.encode(order).decode()]
        self._name = order.peer
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()

    def wait_until_ready(self) -> None:
        """Until the model is loaded and warm."""
        self._line()

    def measure(self, calls: int) -> list[int]:
        """Nanoseconds of each of `calls` calls in a row."""
        self.tell(str(calls))
        return msgspec.json.decode(self._line(), type=list[int])

    def tell(self, text: str) -> None:
        """One line for it, and no wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()

    def ask(self, text: str) -> Any:
        """One line for it, and the JSON that it answers."""
        self.tell(text)
        return msgspec.json.decode(self._line())

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_TIMEOUT_S)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self._process.kill()
            _, stderr = self._process.communicate()
            raise BenchError(f"{self._name}: {stderr.decode(errors='replace').strip()[-1500:]}")
        return line


def timed(call: Any, calls: int) -> list[int]:
    """Nanoseconds of each call. The clock itself costs some 50 ns of each."""
    clock = time.perf_counter_ns
    times = []
    for _ in range(calls):
        began = clock()
        call()
        times.append(clock() - began)
    return times


def main(order_json: str) -> None:
    """Serve measurements until stdin ends."""
    core = msgspec.json.decode(order_json)["core"]
    os.sched_setaffinity(0, {core})
    from bench.peers import PEERS, Order

    order = msgspec.json.decode(order_json, type=Order)
    call = PEERS[order.peer].make(order)
    timed(call, WARMUP_CALLS)
    print("ready", flush=True)
    for line in sys.stdin:
        print(msgspec.json.encode(timed(call, int(line))).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
