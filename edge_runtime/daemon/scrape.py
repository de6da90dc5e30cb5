"""The optional loopback port for Prometheus: `GET /metrics` over HTTP, and nothing else.

Law of this file: one request a connection, few connections, little time. It is imported only when
`metrics.port` is set, and it binds 127.0.0.1 only: who may read is who is on this machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from edge_runtime.errors import ConflictError
from edge_runtime.metrics import CONTENT_TYPE

HOST = "127.0.0.1"
# A request of a scraper has some 300 bytes.
HEAD_BYTES_MAX = 8192
# One scraper needs one; more than this is not scraping.
CONNECTIONS_MAX = 8
# From accept to the last byte: a scraper's own limit is 10 s.
CONNECTION_S_MAX = 5.0

Text = Callable[[], Awaitable[str]]


class ScrapeServer:
    """Answers on the loopback port."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._open = 0
        self._server: asyncio.Server | None = None

    async def start(self, port: int) -> int:
        """Listen; the port (as given, or chosen for 0).

        Raises:
            ConflictError: the port is taken, or this service may have no network sockets.
        """
        try:
            self._server = await asyncio.start_server(
                self._serve, HOST, port, limit=HEAD_BYTES_MAX, backlog=CONNECTIONS_MAX
            )
        except OSError as error:
            raise ConflictError(
                f"cannot listen: {error.strerror or error}",
                where=f"metrics.port {HOST}:{port}",
                remedy="use another port; under systemd see docs/metrics.md for the drop-in",
            ) from error
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop listening; what is being answered is cut off."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= CONNECTIONS_MAX:  # at once and without a word: words would need a limit
            writer.transport.abort()
            return
        self._open += 1
        writer.transport.set_write_buffer_limits(high=0)  # drained: the kernel has all of it
        try:
            async with asyncio.timeout(CONNECTION_S_MAX):
                writer.write(await self._answer(reader))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            writer.transport.abort()  # too slow, or gone
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response("431 Request Header Fields Too Large", "the request is too long\n")
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        path, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            return _response("400 Bad Request", "this is not HTTP/1\n")
        if path.partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", "only /metrics is here\n")
        if method != b"GET":
            return _response("405 Method Not Allowed", "only GET\n", "Allow: GET\r\n")
        return _response("200 OK", await self._text(), content_type=CONTENT_TYPE)


def _response(status: str, text: str, headers: str = "", content_type: str = "text/plain") -> bytes:
    body = text.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{headers}Connection: close\r\n\r\n".encode() + body
