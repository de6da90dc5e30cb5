"""Other people's servers, where they are installed: started on a core, and ended.

Law of this file: the table SERVERS says how each is started and whether it can be had; nothing is
installed here. A server that cannot be had is left out, and the report says which.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import msgspec

from bench.peers import PEERS, Order
from bench.scenario import BenchError

START_TIMEOUT_S = 60.0  # Triton takes ten seconds on a loaded machine
STOP_TIMEOUT_S = 15.0
POLL_S = 0.05
# An interpreter that has nvidia-pytriton and onnxruntime; where it is not set, ours is asked.
TRITON_PYTHON = "EDGE_BENCH_TRITON_PYTHON"


class Kind(NamedTuple):
    """A row of the table: what must be importable, and the command."""

    available: Callable[[], bool]
    command: Callable[[Order], list[str]]


def _has(*modules: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in modules)


def _fastapi(order: Order) -> list[str]:
    shape = ",".join(str(size) for size in order.shape)
    module = [sys.executable, "-m", "bench.http_server"]
    return [*module, str(order.port), order.artifact, order.input, shape]


def _triton(order: Order) -> list[str]:
    shape = ",".join(str(size) for size in order.shape)
    python = os.environ.get(TRITON_PYTHON) or sys.executable
    script = [python, "-P", str(Path(__file__).parent / "triton_server.py")]
    return [*script, str(order.port), order.model, order.artifact, order.input, shape]


SERVERS: Mapping[str, Kind] = {
    "fastapi": Kind(lambda: _has("fastapi", "uvicorn", "uvloop", "httptools"), _fastapi),
    "triton": Kind(lambda: bool(os.environ.get(TRITON_PYTHON)) or _has("pytriton"), _triton),
}


class Servers:
    """The servers of one scenario; each is started once, and runs until the stack ends.

    Attributes:
        remark: on those that could not be had, and why; empty: there is none such.
    """

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._stack = stack
        self._directory = directory
        self._ports: dict[str, int] = {}
        self._problems: dict[str, str] = {}

    def complete(self, order: Order, core: int) -> Order | None:
        """The order with its server's port; None: the server cannot be had."""
        peer = order.peer
        if peer not in SERVERS:
            return order
        if peer not in self._ports and peer not in self._problems:
            try:
                self._ports[peer] = self._start(order, core)
            except BenchError as e:
                self._problems[peer] = str(e)
        if peer in self._problems:
            return None
        return msgspec.structs.replace(order, port=self._ports[peer])

    @property
    def remark(self) -> str:
        found = [f"{PEERS[peer].label}: {problem}" for peer, problem in self._problems.items()]
        return f"left out: {'; '.join(found)}" if found else ""

    def _start(self, order: Order, core: int) -> int:
        if not SERVERS[order.peer].available():
            raise BenchError("not installed here")
        order = msgspec.structs.replace(order, port=_free_port())
        server = _Server(order, core, self._directory / f"{order.peer}.log")
        self._stack.enter_context(server).wait_until_it_answers()
        return order.port


class _Server:
    def __init__(self, order: Order, core: int, log: Path) -> None:
        self._order = order
        self._log = log
        command = ["taskset", "-c", str(core), *SERVERS[order.peer].command(order)]
        with log.open("ab") as file:
            # A group of its own: Triton is several processes, which end together.
            self._process = subprocess.Popen(
                command, stdout=file, stderr=file, start_new_session=True
            )

    def __enter__(self) -> _Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end_group(self._process.pid)
            self._process.wait()

    def wait_until_it_answers(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            try:
                PEERS[self._order.peer].make(self._order)()
                return
            except (OSError, RuntimeError):
                time.sleep(POLL_S)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        raise BenchError(f"does not answer: {lines[-1] if lines else 'it printed nothing'}")


def _end_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all ended by themselves


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
