"""The quickest HTTP client that a careful user would write: one kept connection, bytes made once.

Law of this file: sockets and bytes; nothing is parsed beyond what it takes to find the end of an
answer. A slower client would make the servers that we compare with look slower than they are.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

ANSWER_TIMEOUT_S = 30.0
_LENGTH = b"content-length:"


def call(port: int, path: str, headers: Mapping[str, str], body: bytes) -> Callable[[], memoryview]:
    """A function that posts `body` and gives the body of the answer.

    Raises:
        OSError: nobody listens, or the connection ended.
        RuntimeError: the answer is not 200.
    """
    sock = socket.create_connection(("127.0.0.1", port), ANSWER_TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    request = "\r\n".join([*lines, "", ""]).encode() + body
    inbox = bytearray(1 << 16)
    view = memoryview(inbox)

    def post() -> memoryview:
        sock.sendall(request)
        have, begin, end = 0, 0, 0
        while not end or have < end:
            size = sock.recv_into(view[have:])
            if not size:
                raise OSError("the server closed the connection")
            have += size
            if not end:
                begin, end = _bounds(inbox, have)
        return view[begin:end]

    return post


def _bounds(inbox: bytearray, have: int) -> tuple[int, int]:
    """Where the body begins and ends; (0, 0): the head is not all here."""
    head_end = inbox.find(b"\r\n\r\n", 0, have)
    if head_end < 0:
        return 0, 0
    head = bytes(inbox[:head_end]).lower()
    if b" 200 " not in head[:16]:
        raise RuntimeError(bytes(inbox[:have]).decode(errors="replace")[:500])
    at = head.index(_LENGTH) + len(_LENGTH)
    end_of_line = head.find(b"\r", at)
    length = int(head[at : end_of_line if end_of_line >= 0 else None])
    return head_end + 4, head_end + 4 + length
