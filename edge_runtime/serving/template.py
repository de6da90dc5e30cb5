"""A template: a process that has imported one backend's library and does nothing but fork.

Law of this file: it never loads a user's model, opens no file of a user, holds no descriptor but
its channel, and keeps no thread of its making: what is forked from a process with threads may wait
for ever for a lock that one of them held. Started by the supervisor as
`python -m edge_runtime.serving.template BACKEND` with the channel as descriptor 3; ends when the
channel does. If the library dies at import, it is this process that dies, and the supervisor knows
which library it was.

Where the backend says that its library does not survive a fork, or its import has left a thread,
the template becomes the one worker that it is asked for; the next one gets a fresh process.

A fork is made twice over, so that the worker becomes a child of the supervisor (which is a
subreaper): the supervisor alone then learns how every worker ended.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from edge_runtime.backends import backend as backend_named
from edge_runtime.backends.protocol import Backend, Preparing
from edge_runtime.clock import monotonic_ns
from edge_runtime.errors import BackendError, EdgeError
from edge_runtime.serving import channel, sandbox
from edge_runtime.serving.spec import HostSpec, WorkerSpec, read_spec


def main(name: str) -> int:
    """Import the library, then fork on demand until the channel closes."""
    control = socket.socket(fileno=channel.TEMPLATE_FD)
    _close_inherited()
    sandbox.set_name(f"edge-t:{name}")
    sandbox.die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    began_ns = monotonic_ns()
    try:
        backend = backend_named(name)
        version = backend.version()
        import edge_runtime.serving.host  # noqa: F401 - numpy and the loop, before any fork
    except EdgeError as error:
        channel.send(control, channel.Failed("import", error.document()))
        return 70
    except Exception as error:  # noqa: BLE001 - foreign imports raise anything
        failure = BackendError(f"{type(error).__name__}: {error}", where=name)
        channel.send(control, channel.Failed("import", failure.document()))
        return 70
    _prepare(backend)
    import_ms = (monotonic_ns() - began_ns) / 1e6
    # What is alive now stays: keep the collector from touching (and so copying) its pages in
    # workers.
    gc.collect()
    gc.freeze()
    may_fork = backend.fork_safe and threads() == 1
    channel.send(control, channel.TemplateReady(version, import_ms, may_fork))
    while True:
        message, fds = channel.receive(control)
        if not isinstance(message, channel.Fork):
            return 0  # Stop, or the supervisor is gone
        if not may_fork:
            channel.send(control, channel.Forked(message.token, os.getpid()))
            control.close()
            return _become(backend, message, fds)
        _fork(backend, control, message, fds)


def _prepare(backend: Backend) -> None:
    """Let the backend do once what every worker would do again, if a rehearsal in a child shows
    that it works and leaves no thread. A template without it serves as well, with more memory.
    """
    if not isinstance(backend, Preparing) or not backend.fork_safe:
        return
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            backend.prepare()
            code = 0 if threads() == 1 else 1
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1] == 0:
        backend.prepare()


def threads() -> int:
    """Of this process, as the kernel counts them."""
    return len(list(Path("/proc/self/task").iterdir()))


def _close_inherited() -> None:
    """What whoever started the daemon left open is no model's business."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) > channel.TEMPLATE_FD:
            try:
                os.close(int(entry.name))
            except OSError:
                pass  # the descriptor of this very listing


def _fork(backend: Backend, control: socket.socket, order: channel.Fork, fds: list[int]) -> None:
    """Fork a worker for `order` and report its process id; descriptors: channel, page, spec."""
    pid, reason = 0, "fork failed"
    try:
        read_fd, write_fd = os.pipe()
        with os.fdopen(read_fd, "rb", 0) as told, os.fdopen(write_fd, "wb", 0) as tell:
            intermediate = os.fork()
            if intermediate == 0:
                _intermediate(backend, control, order, fds, read_fd, write_fd)
            tell.close()
            pid = int(told.read(32) or b"0")
            os.waitpid(intermediate, 0)
    except OSError as error:
        reason = error.strerror or str(error)
    for fd in fds:
        os.close(fd)
    channel.send(control, channel.Forked(order.token, pid, "" if pid else reason))


def _intermediate(
    backend: Backend,
    control: socket.socket,
    order: channel.Fork,
    fds: list[int],
    read_fd: int,
    write_fd: int,
) -> None:
    """Fork once more and end, so that the worker is orphaned to the supervisor. Never returns."""
    try:
        pid = os.fork()
    except OSError:
        os._exit(1)
    if pid:
        os.write(write_fd, b"%d" % pid)
        os._exit(0)
    code = 70
    try:
        os.close(read_fd)
        os.close(write_fd)
        control.close()
        code = _become(backend, order, fds)
    except Exception:  # noqa: BLE001 - a fault of ours; this is its only trace
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become(backend: Backend, order: channel.Fork, fds: list[int]) -> int:
    """Be what was ordered, to its end; the exit code."""
    from edge_runtime.serving import host, process

    if order.host:
        channel_fd, spec_fd = fds
        ordered = read_spec(spec_fd, HostSpec)
        return host.become_host(backend, ordered, socket.socket(fileno=channel_fd))
    channel_fd, page_fd, spec_fd = fds
    spec = read_spec(spec_fd, WorkerSpec)
    return process.become_worker(backend, spec, socket.socket(fileno=channel_fd), page_fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
