"""Frames that are no inference: is the model ready, what is it, regions come and go.

Law of this file: a frame's header in, header and body of the answer out. It changes the regions of
the connection that asked and nothing else; who sends the answer is not its business.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from edge_runtime.errors import OverloadedError, RequestError, TooLargeError
from edge_runtime.serving.connection import Connection
from edge_runtime.serving.spec import Limits, WorkerSpec
from edge_runtime.wire import frames, messages
from edge_runtime.wire.frames import HEADER_SIZE_MAX, Kind

# Of a worker's descriptors (workers.open_files_max), what one user's connections and regions may
# take: the rest is for others.
USER_SHARE = 0.75


def reply(
    spec: WorkerSpec,
    owner: Connection,
    kind: int,
    header: bytes,
    descriptors_of: Callable[[int], int],
) -> tuple[bytes, bytes]:
    """Header and body of the answer to a frame of `frames.MODEL_KINDS`. Raises EdgeError.

    Args:
        descriptors_of: how many descriptors a user, by its uid, holds here.
    """
    if kind == Kind.MODEL_READY:
        return messages.encode_header({"name": spec.model, "ready": True}), b""
    if kind == Kind.MODEL_METADATA:
        padded = frames.pad_header(spec.metadata)
        if len(padded) <= HEADER_SIZE_MAX:
            return padded, b""
        return frames.pad_header(b'{"in_body":true}'), padded
    if kind == Kind.REGION_ADD:
        held = descriptors_of(owner.peer[1])
        _add_region(spec.limits, owner, messages.decode_region_add(header), held)
    else:
        number = messages.decode_region_drop(header).region
        if not owner.drop_region(number):
            raise RequestError(f"region {number} was not added", where="header $.region")
    return messages.encode_header({}), b""


def _add_region(limits: Limits, owner: Connection, region: messages.RegionAdd, held: int) -> None:
    """`held`: the descriptors that this user has here already."""
    fds, owner.stray = owner.stray, []
    try:
        if len(fds) != 1:
            raise RequestError(
                f"{len(fds)} descriptors came with REGION_ADD",
                expected="exactly one memfd, attached to the frame",
            )
        if region.byte_size > limits.region_bytes_max:
            raise TooLargeError(
                f"region of {region.byte_size} bytes",
                where="header $.byte_size",
                expected=f"<= {limits.region_bytes_max}",
            )
        if (
            region.region not in owner.regions
            and len(owner.regions) >= limits.regions_per_connection_max
        ):
            raise RequestError(
                f"{len(owner.regions)} regions on this connection",
                expected=f"<= {limits.regions_per_connection_max}",
            )
        if held >= limits.open_files_max * USER_SHARE:
            raise OverloadedError(
                f"user {owner.peer[1]} has too many connections and shared memory regions",
                expected=f"<= {USER_SHARE:.0%} of {limits.open_files_max} (workers.open_files_max)",
                remedy="drop regions that are not used, or send tensors in frames",
                retry_after_s=1.0,
            )
        owner.add_region(region.region, region.byte_size, fds.pop())
    finally:
        for fd in fds:
            os.close(fd)
