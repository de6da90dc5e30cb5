"""Frames over AF_UNIX: codec, headers, incremental reader, shared-memory regions, sockets.

Law of this package: no numpy, no model, no policy beyond the protocol's own limits. `frames`,
`messages` and `reader` do no I/O at all; `regions` and `sockets` are the thin doors to the kernel.
The contract they hold is docs/protocol.md.
"""
