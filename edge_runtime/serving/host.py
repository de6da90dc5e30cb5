"""A host: one process for all models of a device that only one process may open.

Law of this file: it starts workers as threads when the supervisor says so, confines them, and
cleans up after them; what a worker does is `process`'s and `worker`'s, as in a process of its own.
Here too the supervisor decides; if the host dies, all its workers do, and the supervisor tells who
was using the device.

What differs from workers with a process each: they see each other's memory, limits on memory do not
bind a single one, and one that crashes takes the others with it. Files and system calls are
confined twice: the host to the store's blobs and its device, each worker's threads to their own
files. Runs take turns; loads do not wait for runs, nor runs for loads.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from edge_runtime.backends import heap
from edge_runtime.errors import EdgeError
from edge_runtime.serving import channel, process, sandbox
from edge_runtime.serving.spec import HostSpec, WorkerSpec, read_spec
from edge_runtime.serving.turns import SharedModel, Turns

if TYPE_CHECKING:
    from edge_runtime.backends.protocol import Backend, Model

# What a worker's thread does before it applies all measures: where it runs, and how nicely.
SETTLING_CALLS = ("sched_setaffinity", "setpriority")


def become_host(backend: Backend, spec: HostSpec, control: socket.socket) -> int:
    """Start a worker for each Join until the channel closes; returns the exit code."""
    try:
        process.belong_to(spec.supervisor_pid)
        _confine(spec)
    except EdgeError as error:
        channel.send(control, channel.Failed("start", error.document()))
        return process.EXIT_FAILED
    host = Host(backend, spec, control)
    while True:
        message, fds = channel.receive(control)
        if not isinstance(message, channel.Join):
            break  # Stop, or the supervisor is gone
        threading.Thread(target=host.run, args=(message.token, fds), daemon=True).start()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not through the interpreter's end, which threads of libraries may not survive


def _confine(spec: HostSpec) -> None:
    """The bounds of the whole process."""
    sandbox.set_name(f"edge-h:{spec.name}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the supervisor's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if spec.sandbox:
        sandbox.apply(map(Path, spec.readable), map(Path, spec.devices), SETTLING_CALLS)


def _among_others(spec: WorkerSpec) -> WorkerSpec:
    """What a worker has to do differently.

    A loop that spins would keep the interpreter from the others; one that waited for its model's
    turn would neither read nor refuse anything meanwhile, so that a runner waits for it.
    """
    return structs.replace(spec, spin_us=0.0, runners=1 if spec.runners < 0 else spec.runners)


class Host:
    """The workers of one process."""

    def __init__(self, backend: Backend, spec: HostSpec, control: socket.socket) -> None:
        self._backend = backend
        self._spec = spec
        self._control = control
        self._turns = Turns()
        self._open_files: dict[int, int] = {}  # by token: how many each may have
        self._guard = threading.Lock()  # of what is the whole process's

    def run(self, token: int, fds: list[int]) -> None:
        """A worker, from its start to its end, in the calling thread; takes over `fds`."""
        code = process.EXIT_FAILED
        try:
            code = self._worker(token, fds)
        except Exception:  # noqa: BLE001 - a fault of ours; this is its only trace
            traceback.print_exc()
        finally:
            gc.collect()  # loop and model refer to each other: nothing else would end them now
            heap.give_back()
            with contextlib.suppress(OSError):  # the supervisor is gone, and we are next
                channel.send(self._control, channel.Left(token, code))

    def _worker(self, token: int, fds: list[int]) -> int:
        channel_fd, page_fd, spec_fd = fds
        spec = _among_others(read_spec(spec_fd, WorkerSpec))
        control = socket.socket(fileno=channel_fd)
        self._allow_files(token, spec.limits.open_files_max)

        def share(model: Model, status: memoryview) -> Model:
            return SharedModel(model, self._turns, status)

        try:
            return process.become_worker(self._backend, spec, control, page_fd, self._settle, share)
        finally:
            self._allow_files(token, 0)
            os.close(page_fd)
            control.close()

    def _settle(self, spec: WorkerSpec) -> list[str]:
        measures = process.confine(spec)
        return [*measures, f"shares its process with all models on {self._spec.name}"]

    def _allow_files(self, token: int, count: int) -> None:
        """As many descriptors as all workers may have together, and those of the host."""
        with self._guard:
            if count:
                self._open_files[token] = count
            else:
                self._open_files.pop(token, None)
            total = sum(self._open_files.values())
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            soft = total if hard == resource.RLIM_INFINITY else min(total, hard)
            if soft:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
