"""What systemd and the daemon say to each other: ready, alive, here are your sockets.

Law of this file: the four interfaces of sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3) and
sd_booted(3), spoken directly; the environment and the process id are arguments. Nothing here keeps
state, and without systemd every call is a no-op with an honest answer. What deserves a READY=1 or a
WATCHDOG=1 is decided by the daemon.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

from edge_runtime.errors import UsageError

LISTEN_FDS_START = 3  # sd_listen_fds(3): the first passed descriptor
# More than we have sockets for by far; a bound on a wrong environment.
LISTEN_FDS_MAX = 64
# A notify socket that does not take a datagram within this is stuck; serving goes on without it.
NOTIFY_TIMEOUT_S = 1.0


def notify(state: str, environ: Mapping[str, str]) -> bool:
    """Tell the service manager `state` (`READY=1`, `WATCHDOG=1`, `STATUS=...`; newline between).

    Returns:
        True when it was sent; False without a manager (no NOTIFY_SOCKET), or when the manager does
        not take it: telling must never stop serving.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(NOTIFY_TIMEOUT_S)
        try:
            sender.connect(address)
            sender.sendall(state.encode())
        except OSError:
            return False
    return True


def watchdog_interval_s(environ: Mapping[str, str], pid: int) -> float | None:
    """How often `WATCHDOG=1` is due: half of what the unit allows (sd_watchdog_enabled(3)).

    Returns:
        Seconds, or None where no watchdog is set or it watches another process (a forked worker
        inherits the variables).

    Raises:
        UsageError: a variable is not a number.
    """
    if "WATCHDOG_USEC" not in environ:
        return None
    if "WATCHDOG_PID" in environ and _number(environ, "WATCHDOG_PID") != pid:
        return None
    limit_us = _number(environ, "WATCHDOG_USEC")
    return limit_us / 2e6 if limit_us else None


def listen_sockets(environ: MutableMapping[str, str], pid: int) -> dict[str, socket.socket]:
    """The listening sockets that systemd opened for us, by FileDescriptorName=.

    Takes LISTEN_* out of `environ`, so that no child believes they are its own, and makes the
    descriptors close-on-exec. Without socket activation: an empty dict.

    Raises:
        UsageError: a descriptor is not a listening AF_UNIX stream socket, two have one name, or a
            variable is malformed. The unit files are wrong then, and the message says how.
    """
    if _number(environ, "LISTEN_PID") != pid:
        return {}
    count = _number(environ, "LISTEN_FDS")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(key, None)
    if count > LISTEN_FDS_MAX:
        raise UsageError(
            f"{count} sockets were passed", where="LISTEN_FDS", expected=f"at most {LISTEN_FDS_MAX}"
        )
    if count and len(names) != count:
        raise UsageError(
            f"{count} sockets but {len(names)} names",
            where="LISTEN_FDNAMES",
            expected="FileDescriptorName= in every socket unit",
        )
    found: dict[str, socket.socket] = {}
    for name, descriptor in zip(
        names, range(LISTEN_FDS_START, LISTEN_FDS_START + count), strict=False
    ):
        if name in found:
            raise UsageError(f"two sockets are named {name!r}", where="LISTEN_FDNAMES")
        found[name] = _listening(name, descriptor)
    return found


def _listening(name: str, descriptor: int) -> socket.socket:
    """The descriptor as a socket of ours, close-on-exec, checked to be what we serve on."""
    try:
        taken = socket.socket(fileno=descriptor)
        os.set_inheritable(descriptor, False)
        listening = taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise UsageError(
            f"descriptor {descriptor} is not a socket: {error}", where=f"socket {name!r}"
        ) from error
    if taken.family != socket.AF_UNIX or taken.type != socket.SOCK_STREAM or not listening:
        kind = f"{taken.family.name} {taken.type.name}"
        taken.close()
        raise UsageError(
            f"it is {kind}" + ("" if listening else ", not listening"),
            where=f"socket {name!r}",
            expected="a listening AF_UNIX stream socket (ListenStream=/path)",
        )
    return taken


def _number(environ: Mapping[str, str], key: str) -> int:
    """A variable as a number >= 0; 0 when it is not set."""
    text = environ.get(key, "0")
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"{text!r} is not a number", where=key, expected="digits, set by systemd")
    return int(text)
