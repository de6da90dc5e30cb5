"""Bytes and the descriptors that came with them, for tests that play the other side."""

from __future__ import annotations

import socket

from edge_runtime.serving import channel
from edge_runtime.wire import sockets

ANCILLARY = socket.CMSG_SPACE(4 * sockets.FDS_MAX)


def received(sock: socket.socket, buffer: memoryview) -> tuple[int, list[int]]:
    """How many bytes came into `buffer`, and the descriptors, which are the caller's to close."""
    size, ancillary, _, _ = sock.recvmsg_into([buffer], ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    return size, channel.descriptors(ancillary)
