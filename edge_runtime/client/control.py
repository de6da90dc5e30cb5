"""`ControlClient`: commands to the daemon over control.sock.

Law of this file: no numpy (the command line imports it), no command known by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from edge_runtime.errors import ConnectionClosedError, DeadlineError, EdgeError
from edge_runtime.wire import messages, sockets
from edge_runtime.wire.frames import RESPONSE, Kind
from edge_runtime.wire.reader import Frame, FrameReader, TooLarge

EventHandler = Callable[[dict[str, Any]], None]


class ControlClient:
    """One connection to `control.sock`, made at the first call; one thread uses it.

    Args:
        path: of the socket.
        timeout_s: longest silence, not longest command: each event starts it anew. Ten minutes,
            because the first compile of a model for an accelerator takes minutes.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout_s: float = 600.0) -> None:
        self.path = os.fspath(path)
        self.timeout_s = timeout_s
        self._next_id = 0
        self._socket: Any = None
        self._reader = FrameReader()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def call(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        on_event: EventHandler | None = None,
    ) -> dict[str, Any]:
        """Do a command and return its answer. Commands are never sent twice.

        Args:
            fds: descriptors that go with it (a bundle's file); they stay the caller's.
            on_event: called with each EVENT (progress) before the answer.

        Raises:
            UnavailableError: nobody listens.
            ConnectionClosedError, DeadlineError: no answer; the command may have happened.
            EdgeError: what the daemon answered.
        """
        assert "command" not in (arguments or {})
        header = messages.encode_header({"command": command, **(arguments or {})})
        self._next_id += 1
        frame = messages.encode_frame(Kind.CONTROL, header, request_id=self._next_id)
        try:
            self._connect()
            sockets.send_all_with_fds(self._socket, frame, fds)
            answer = self._answer(on_event)
        except BlockingIOError as e:
            self.close()
            raise DeadlineError(
                f"no answer to {command!r} within {self.timeout_s} s", where=self.path
            ) from e
        except OSError as e:
            self.close()
            raise ConnectionClosedError(
                f"the connection broke during {command!r}: {e.strerror or e}", where=self.path
            ) from e
        except BaseException:
            self.close()  # interrupted: the answer may still come
            raise
        if isinstance(answer, EdgeError):
            raise answer
        return answer

    def _connect(self) -> None:
        if self._socket is None:
            self._socket = sockets.connect_unix(self.path, self.timeout_s)
            self._reader = FrameReader()

    def _answer(self, on_event: EventHandler | None) -> dict[str, Any] | EdgeError:
        while True:
            frame = self._next_frame()
            if frame.prefix.request_id not in (0, self._next_id):
                continue
            if isinstance(frame, TooLarge):
                return frame.error
            if frame.prefix.kind == Kind.EVENT:
                if on_event is not None:
                    on_event(messages.decode_document(frame.header, frame.body))
            elif frame.prefix.kind == Kind.ERROR:
                return messages.decode_error(frame.header)
            elif frame.prefix.kind == Kind.CONTROL | RESPONSE:
                return messages.decode_document(frame.header, frame.body)

    def _next_frame(self) -> Frame | TooLarge:
        while (frame := self._reader.next_frame()) is None:
            size = self._socket.recv_into(self._reader.get_buffer())
            if not size:
                raise ConnectionClosedError("the daemon closed the connection", where=self.path)
            self._reader.advance(size)
        return frame
