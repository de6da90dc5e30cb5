"""Whether a model, or the daemon, answers: asked on the wire without numpy.

Law of this file: one MODEL_READY or SERVER_LIVE question, and its repetition. It uses frames
directly, not `Client`, because a health check runs every few seconds and must not cost an import of
numpy.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ConnectionClosedError, DeadlineError, EdgeError, UnavailableError
from edge_runtime.wire import frames, messages, sockets
from edge_runtime.wire.reader import FrameReader, TooLarge

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from edge_runtime.clock import Clock

TIMEOUT_S = 5.0  # a worker that is up answers in microseconds; this is for a machine that is not
POLL_S = 0.05  # between questions of --wait: below what a person or a script notices
BODY_SIZE_MAX = 64 * 1024  # the answer is one short header


def ask(path: Path, name: str, timeout_s: float, *, wait: bool, clock: Clock) -> None:
    """Return when the model is ready.

    Args:
        wait: ask again while it is not, until `timeout_s` has passed.

    Raises:
        UnavailableError: it is not ready, or nobody listens on `path`.
        NotFoundError: there is no such model.
        EdgeError: whatever else the daemon answered.
    """
    deadline_ns = clock.monotonic_ns() + round(timeout_s * 1e9)
    while True:
        left_s = max((deadline_ns - clock.monotonic_ns()) / 1e9, 0.001)
        try:
            return _ask_once(path, name, left_s, deadline_ns)
        except UnavailableError:
            if not wait or clock.monotonic_ns() + POLL_S * 1e9 >= deadline_ns:
                raise
        time.sleep(POLL_S)


def ask_live(path: Path, timeout_s: float) -> None:
    """Return when the daemon behind `path` said that it lives.

    Raises:
        EdgeError: nobody listens, this user may not ask, or there was no such answer in time.
    """
    request = messages.encode_document(frames.Kind.SERVER_LIVE, {}, request_id=1)
    if _answer(path, request, timeout_s).get("live") is not True:
        raise UnavailableError("the daemon does not say that it lives", where=str(path))


def _ask_once(path: Path, name: str, timeout_s: float, deadline_ns: int) -> None:
    header = messages.encode_header(messages.ModelRef(model_name=name))
    request = messages.encode_frame(
        frames.Kind.MODEL_READY, header, request_id=1, time_ns=deadline_ns
    )
    if _answer(path, request, timeout_s).get("ready") is not True:
        raise UnavailableError(
            f"{name} is not ready", where=str(path), remedy=f"`edge-runtime why {name}` says why"
        )


def _answer(path: Path, request: bytes, timeout_s: float) -> dict[str, Any]:
    with sockets.connect_unix(path, timeout_s) as sock:
        try:
            sock.sendall(request)
            kind, answer = _receive(sock)
        except BlockingIOError as error:  # SO_RCVTIMEO
            raise DeadlineError(f"no answer within {timeout_s:.1f} s", where=str(path)) from error
        except OSError as error:
            raise ConnectionClosedError("the connection broke", where=str(path)) from error
    if kind == frames.Kind.ERROR:
        raise messages.decode_error(answer)
    return messages.decode_document(answer)


def _receive(sock: socket.socket) -> tuple[int, bytes]:
    reader = FrameReader(body_size_max=BODY_SIZE_MAX)
    while True:
        frame = reader.next_frame()
        if isinstance(frame, TooLarge):
            raise EdgeError("the answer is larger than any answer to this question")
        if frame is not None:
            return frame.prefix.kind, frame.header
        size = sock.recv_into(reader.get_buffer())
        if size == 0:
            raise ConnectionClosedError("the daemon closed the connection without an answer")
        reader.advance(size)
