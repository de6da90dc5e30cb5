"""Compiled models that outlive their worker: sealed, read, and handed to the supervisor.

Law of this file: bytes in a file or a memfd; it knows no library. A worker may read the directory
of its own artifact and may not write; what it compiled goes to the supervisor through its channel,
and the supervisor keeps it without looking inside. What is read is believed only when it carries
the checksum of its bytes together with the key that was asked for: a torn, rotten or foreign file
is as good as none, and is replaced.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from edge_runtime import digests
from edge_runtime.serving import channel

MAGIC = b"edge-runtime compiled 1\n"
_DIGEST_BYTES = 32
SUFFIX = ".blob"
_NAME = re.compile(r"[0-9a-f]{64}\.blob")
# A blob for an NPU is about as large as the weights it holds. A larger one is compiled each time.
BYTES_MAX = 1 << 30


def name_of(key: str) -> str:
    """The file name of a key."""
    return digests.sha256_hex(key.encode()) + SUFFIX


def is_name(name: str) -> bool:
    """Whether a worker's word for a file name is one."""
    return _NAME.fullmatch(name) is not None


def seal(key: str, blob: bytes) -> bytes:
    """What stands before the blob in its file."""
    return MAGIC + _digest(key, blob)


def unseal(key: str, data: bytes) -> bytes | None:
    """The blob of a file, if the file is whole and of this key."""
    start = len(MAGIC) + _DIGEST_BYTES
    blob = data[start:]
    return blob if len(data) >= start and data[:start] == seal(key, blob) else None


def _digest(key: str, blob: bytes) -> bytes:
    import hashlib  # large, in a worker; the daemon imports this file, too, and not libcrypto

    whole = hashlib.sha256(len(key).to_bytes(8, "little") + key.encode())
    whole.update(blob)
    return whole.digest()


class Cache:
    """What a worker's backend is given (protocol.BlobCache)."""

    def __init__(self, directory: Path, control: socket.socket) -> None:
        self._directory = directory
        self._control = control

    def get(self, key: str) -> bytes | None:
        """The blob that was kept for this key; None: there is none that can be believed."""
        path = self._directory / name_of(key)
        try:
            if path.stat().st_size > BYTES_MAX:
                return None
            return unseal(key, path.read_bytes())
        except OSError:
            return None  # the usual case: it was never compiled here

    def put(self, key: str, blob: bytes) -> None:
        """Give a blob to the supervisor to keep. Failing costs the next load a compilation."""
        head = seal(key, blob)
        if len(head) + len(blob) > BYTES_MAX:
            return
        try:
            fd = os.memfd_create("compiled", os.MFD_CLOEXEC)
        except OSError:
            return
        try:
            with os.fdopen(fd, "wb", closefd=False) as file:
                file.write(head)
                file.write(blob)
            message = channel.Compiled(name_of(key), len(head) + len(blob))
            channel.send(self._control, message, [fd])
        except OSError:
            pass  # no memory for the copy: nothing is kept
        finally:
            os.close(fd)
