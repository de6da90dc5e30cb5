"""AF_UNIX stream sockets: listen, connect, who is there, descriptors beside bytes.

Law of this file: the thin door to the socket calls; no frame is looked at. Descriptors that arrive
are close-on-exec and are closed on every path that does not return them.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edge_runtime.errors import (
    ConflictError,
    ConnectionClosedError,
    DeadlineError,
    EdgeError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
    UnavailableError,
    UsageError,
)

PATH_SIZE_MAX = 107  # bytes; sun_path has 108 with its final zero (unix(7)): the kernel's limit
FDS_MAX = 16  # descriptors in one message; the protocol sends one, control commands a few
BACKLOG = 128  # connections waiting for accept: a gateway's whole pool that reconnects at once

_SO_PEERGROUPS = 59  # <asm-generic/socket.h>; not in Python's socket
_UCRED = struct.Struct("iII")
_TIMEVAL = struct.Struct("ll")


class PeerCredentials(NamedTuple):
    """Who connected, as the kernel saw it at connect time. `groups` includes `gid`."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int]


def check_path(path: str | os.PathLike[str]) -> str:
    """The path as text, if a socket can have it.

    Raises:
        UsageError: longer than the kernel's limit.
    """
    text = os.fspath(path)
    size = len(os.fsencode(text))
    if size > PATH_SIZE_MAX:
        raise UsageError(
            f"socket path of {size} bytes",
            where=text,
            expected=f"<= {PATH_SIZE_MAX} bytes (limit of AF_UNIX)",
            remedy="use a shorter run directory",
        )
    return text


def listen_unix(
    path: str | os.PathLike[str], mode: int = 0o600, *, backlog: int = BACKLOG
) -> socket.socket:
    """A listening, non-blocking socket at `path`, which nobody may use beyond `mode`.

    A socket file that nobody answers on is removed first.

    Raises:
        UsageError: the path is too long.
        ConflictError: somebody answers there, or it is a file that is not a socket.
        StorageError: the directory is missing, read-only or full.
    """
    text = check_path(path)
    _remove_stale(text)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The mode is set before the name exists (Linux gives the file the socket's own mode less
        # the umask) and once more after it, so that at no moment it is wider than asked.
        os.fchmod(listener.fileno(), mode)
        listener.bind(text)
        Path(text).chmod(mode)
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as e:
        listener.close()
        raise StorageError(f"cannot listen: {e.strerror}", where=text) from e
    return listener


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as e:
        raise StorageError(f"cannot look at the path: {e.strerror}", where=path) from e
    if not stat.S_ISSOCK(mode):
        raise ConflictError(
            "a file that is not a socket is in the way", where=path, remedy="move it away"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        error = probe.connect_ex(path)
    if error in (errno.ECONNREFUSED, errno.ENOENT):
        Path(path).unlink(missing_ok=True)
        return
    # 0, and EAGAIN: its queue is full; anything else we cannot judge, so it stays.
    raise ConflictError(
        "another process answers here" if error in (0, errno.EAGAIN) else os.strerror(error),
        where=path,
        remedy="stop it, or use another run directory",
    )


def connect_unix(path: str | os.PathLike[str], timeout_s: float = 5.0) -> socket.socket:
    """A connected blocking socket whose sends and receives give up after `timeout_s`.

    Raises:
        UsageError: the path is too long.
        UnavailableError: nobody listens there (yet).
        PermissionDeniedError: the file's mode does not let this user in.
        DeadlineError: its queue of new connections stayed full.
    """
    text = check_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        set_timeout(sock, timeout_s)
        sock.connect(text)
    except OSError as e:
        sock.close()
        raise _connect_error(e, text) from e
    return sock


def _connect_error(error: OSError, path: str) -> EdgeError:
    if isinstance(error, PermissionError):
        return PermissionDeniedError("the socket is not open to this user", where=path)
    if isinstance(error, BlockingIOError):
        return DeadlineError("the server does not accept connections", where=path)
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return UnavailableError("nobody listens here", where=path, remedy="start the daemon")
    return NotFoundError(f"cannot connect: {error.strerror}", where=path)


def set_timeout(sock: socket.socket, timeout_s: float) -> None:
    """Let blocking calls give up (BlockingIOError) after `timeout_s`; <= 0: at once, nearly.

    By SO_RCVTIMEO and SO_SNDTIMEO and not by `settimeout`, which polls before every call.
    """
    microseconds = max(1, int(timeout_s * 1e6))
    value = _TIMEVAL.pack(microseconds // 1_000_000, microseconds % 1_000_000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """Who is at the other end.

    Raises:
        ConnectionClosedError: nobody is, any more.
    """
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    except OSError as e:
        raise ConnectionClosedError("the peer is gone") from e
    pid, uid, gid = _UCRED.unpack(data)
    try:
        packed = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    except OSError:
        # More groups than fit (256), or an old kernel: only the primary one counts, which can
        # refuse somebody but never let anybody in.
        packed = b""
    groups = array.array("I", packed[: len(packed) // 4 * 4])
    return PeerCredentials(pid, uid, gid, frozenset((gid, *groups)))


def send_with_fds(
    sock: socket.socket, data: bytes | bytearray | memoryview, fds: Sequence[int]
) -> int:
    """One send with the descriptors attached to the first byte; returns the bytes sent (>= 1).

    The caller sends the rest without them. OSError is the caller's.
    """
    assert 1 <= len(fds) <= FDS_MAX and len(data)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    return sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def send_all_with_fds(
    sock: socket.socket, data: bytes | bytearray | memoryview, fds: Sequence[int] = ()
) -> None:
    """As send_with_fds, on a blocking socket, until everything is sent."""
    view = memoryview(data)
    if fds:
        view = view[send_with_fds(sock, view, fds) :]
    if view:
        sock.sendall(view)


def close_fds(fds: Sequence[int]) -> None:
    """Close descriptors that nobody took."""
    for fd in fds:
        os.close(fd)
