"""Messages between supervisor, templates and workers.

Law of this file: message types and the two functions that move them. A channel is an AF_UNIX
SOCK_SEQPACKET pair: one message is one packet, descriptors ride with it, the end of the peer is the
end of file. What does not fit a packet (bytes already read of a large frame) rides as a memfd.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import time
from typing import Any

import msgspec

from edge_runtime.errors import UnavailableError

# One packet must fit the default socket buffer (net.core.wmem_default, 208 KiB) with room to spare.
PACKET_SIZE_MAX = 96 * 1024
RESIDUAL_INLINE_MAX = 32 * 1024  # more goes by memfd
# Too many descriptors are on their way: the kernel does not tell when there are fewer. A receiver
# that lives takes a message within microseconds.
CROWDED_PAUSE_S = 0.001
CROWDED_S_MAX = 5.0
TEMPLATE_FD = 3  # where a template finds its end
# A connection, its 16 regions and a residual; the kernel's own limit is 253 (SCM_MAX_FD).
DESCRIPTORS_MAX = 32
_ANCILLARY = socket.CMSG_SPACE(DESCRIPTORS_MAX * 4)


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Supervisor to template: fork a worker.

    Descriptors: the worker's channel, its status page, a memfd with its WorkerSpec (msgpack).
    With `host`: fork a host (serving.host); its channel, a memfd with its HostSpec.
    """

    token: int
    host: bool = False


class Join(msgspec.Struct, frozen=True, tag="join"):
    """Supervisor to host: run a worker in a thread of yours. Descriptors: as of `Fork`."""

    token: int


class Left(msgspec.Struct, frozen=True, tag="left"):
    """Host to supervisor: that worker has ended; what it held is given back.

    `exit_code`: what it would have been, had it been a process.
    """

    token: int
    exit_code: int


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    """Template to supervisor: the worker's process id (0: fork failed, `reason` says why).

    The template's own: it is the worker from now on, and this is its last message as a template.
    """

    token: int
    pid: int
    reason: str = ""


class TemplateReady(msgspec.Struct, frozen=True, tag="template_ready"):
    """Template to supervisor: the library is imported."""

    version: str
    import_ms: float
    fork_safe: bool = True  # false: it makes one worker, by becoming it


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """Worker to supervisor: what it is doing now (`load`, `warmup`, `goldens`)."""

    name: str


class Compiled(msgspec.Struct, frozen=True, tag="compiled"):
    """Worker to supervisor: keep this for the next load of the same artifact.

    Descriptors: a memfd with the file (serving.compiled).
    """

    name: str
    size: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker to supervisor: loaded, warm, goldens equal; serving from now on."""

    load_ms: float
    warmup_ms: float
    run_ms_p50: float
    goldens: int
    runners: int
    placement: list[dict[str, Any]]
    cpu_fallback: str = ""  # what runs on the CPU although an accelerator was asked for
    golden_deviation: float = 0.0  # largest |got - want| / (atol + rtol |want|); <= 1 passes
    sandbox: list[str] = []
    batch_rows_max: int = 1  # 1: requests run alone, `batch_reason` says why
    batch_reason: str = ""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Worker or template to supervisor: it will exit; `error` is `EdgeError.document()`.

    From a worker that served (phase `heartbeat`): it answers nothing any more, gives its
    connections back, and then exits.
    """

    phase: str
    error: dict[str, Any]


class Adopt(msgspec.Struct, frozen=True, tag="adopt"):
    """Supervisor to worker: serve this connection.

    Descriptors: the connection, one per region in the order of `regions`, then the bytes already
    read as a memfd when `residual_size` is not 0.
    """

    own: bool
    residual: bytes = b""
    residual_size: int = 0
    regions: tuple[tuple[int, int], ...] = ()  # (number, byte size)
    stray: int = 0  # descriptors received with the residual, not yet claimed by a frame
    skip: int = 0  # body bytes still to be thrown away
    peer: tuple[int, int, int] = (0, 0, 0)  # pid, uid, gid


class Returned(msgspec.Struct, frozen=True, tag="returned"):
    """Worker to supervisor: this connection is yours again, at a frame boundary.

    Fields and descriptors as in `Adopt`.
    """

    own: bool
    residual: bytes = b""
    residual_size: int = 0
    regions: tuple[tuple[int, int], ...] = ()
    stray: int = 0
    skip: int = 0
    peer: tuple[int, int, int] = (0, 0, 0)


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Supervisor to worker: answer what you have, hand every connection back, stay loaded.

    From then on it answers only requests that name its version, or `label` ("": no label).
    """

    label: str = ""


class Promote(msgspec.Struct, frozen=True, tag="promote"):
    """Supervisor to worker: you are the active version (again).

    A worker is, from its start until it is told to drain. One that is not answers only requests
    that name its version; the others go back to the supervisor.
    """


class Accompany(msgspec.Struct, frozen=True, tag="accompany"):
    """Supervisor to the active worker: a candidate runs beside you.

    Descriptors: ring, bell, a connection to the candidate, a page (serving.trial).
    """

    version: int
    seed: int
    ring_bytes: int
    shadow_share: float
    split_share: float


class Shares(msgspec.Struct, frozen=True, tag="shares"):
    """Supervisor to the active worker: other shares for the same candidate."""

    shadow_share: float
    split_share: float


class Alone(msgspec.Struct, frozen=True, tag="alone"):
    """Supervisor to the active worker: there is no candidate any more.

    What the candidate has been asked is still waited for.
    """


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Supervisor to a worker that serves nobody: run a recorded input so often, and say how long
    each run took. It answers nothing else meanwhile.
    """

    runs: int
    time_ms_max: float  # then no further run is begun


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    """Worker to supervisor: the time of each run; or `error` (`EdgeError.document()`), and none."""

    times_ns: list[int]
    error: dict[str, Any] = {}


class Shadow(msgspec.Struct, frozen=True, tag="shadow"):
    """Supervisor to the candidate: compare yourself with what comes through this ring.

    Descriptors: ring, bell, a page (serving.trial).
    """

    ring_bytes: int


class Unshadow(msgspec.Struct, frozen=True, tag="unshadow"):
    """Supervisor to a worker that was the candidate: no more comparing."""


class Restrain(msgspec.Struct, frozen=True, tag="restrain"):
    """Supervisor to worker: the device holds back; in place of what was said before.

    The defaults are no restraint (serving.restraint).
    """

    run_share: float = 1.0  # of the time, 0 < share <= 1
    priority_min: int = 0  # requests below it are refused
    reason: str = ""  # why, for clients


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """Worker to supervisor: of the connections at the time of Drain none is left."""

    connections: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Supervisor to worker or template: exit now, cleanly."""


Message = (
    Fork
    | Join
    | Left
    | Forked
    | TemplateReady
    | Phase
    | Compiled
    | Ready
    | Failed
    | Adopt
    | Returned
    | Drain
    | Promote
    | Accompany
    | Shares
    | Alone
    | Measure
    | Measured
    | Shadow
    | Unshadow
    | Restrain
    | Drained
    | Stop
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a new channel; neither is inheritable."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def stream_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection for frames, as a client's; neither is inheritable."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def send(sock: socket.socket, message: Message, fds: list[int] | None = None) -> None:
    """Send one message and duplicates of `fds`; the caller keeps its own.

    Raises:
        BlockingIOError: a non-blocking channel is full. With errno ETOOMANYREFS: the kernel allows
            this user no more descriptors on their way (RLIMIT_NOFILE), until others are received.
        OSError: the peer is gone, or a blocking channel was crowded for CROWDED_S_MAX.
    """
    packet = _encoder.encode(message)
    assert len(packet) <= PACKET_SIZE_MAX, f"{type(message).__name__} of {len(packet)} bytes"
    ancillary = []
    if fds:
        assert len(fds) <= DESCRIPTORS_MAX
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    give_up_s = time.monotonic() + CROWDED_S_MAX
    while True:
        try:
            sock.sendmsg([packet], ancillary)
            return
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            if not sock.getblocking():
                raise BlockingIOError(error.errno, error.strerror) from error
            if time.monotonic() >= give_up_s:
                raise
            time.sleep(CROWDED_PAUSE_S)


def receive(sock: socket.socket) -> tuple[Message | None, list[int]]:
    """The next message with its descriptors (the caller closes them); None at the end.

    Raises:
        BlockingIOError: the channel is non-blocking and empty.
    """
    try:
        packet, ancillary, _, _ = sock.recvmsg(PACKET_SIZE_MAX, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None, []
    fds = descriptors(ancillary)
    if not packet:
        for fd in fds:
            os.close(fd)
        return None, []
    return _decoder.decode(packet), fds


def descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in a recvmsg's ancillary data."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def check_complete(message: Adopt | Returned, fds: list[int]) -> None:
    """Whether every descriptor of a connection arrived.

    Raises:
        UnavailableError: some did not; the kernel drops what a process may not open any more.
    """
    wanted = 1 + len(message.regions) + message.stray + bool(message.residual_size)
    if len(fds) != wanted:
        raise UnavailableError(
            f"{len(fds)} of {wanted} descriptors of a connection arrived",
            remedy="raise open_files_max or LimitNOFILE",
        )


def pack_residual(data: bytes | bytearray | memoryview) -> tuple[bytes, int, int | None]:
    """Bytes for a message: (inline bytes, size of the memfd, memfd or None)."""
    size = memoryview(data).nbytes
    if size <= RESIDUAL_INLINE_MAX:
        return bytes(data), 0, None
    fd = os.memfd_create("residual", os.MFD_CLOEXEC)
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]
    return b"", size, fd


def unpack_residual(residual: bytes, residual_size: int, fds: list[int]) -> bytes:
    """The reverse; takes the memfd off the end of `fds` and closes it."""
    if not residual_size:
        return residual
    fd = fds.pop()
    try:
        parts, offset = [], 0
        while offset < residual_size:
            part = os.pread(fd, residual_size - offset, offset)
            assert part, "residual memfd shorter than announced"
            parts.append(part)
            offset += len(part)
        return b"".join(parts)
    finally:
        os.close(fd)
