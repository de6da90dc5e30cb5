"""Commands that change what serves: install, activate, rollback, unload, remove, gc.

Law of this file: one control call per command; its answer in one or two lines, or as JSON.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cli import arguments as args
from edge_runtime.cli import output
from edge_runtime.cli.control import call
from edge_runtime.cli.progress import Progress
from edge_runtime.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping


def add_parser(subparsers: Any) -> None:
    """Add the parsers of this file's commands."""
    install = subparsers.add_parser("install", help="install a bundle")
    install.add_argument("bundle", metavar="BUNDLE", type=Path, help="a .bundle file or directory")
    install.add_argument("--activate", action="store_true", help="serve it once it is installed")
    install.set_defaults(handler=_install)

    for name, handler in (("activate", _activate), ("remove", _remove)):
        parser = subparsers.add_parser(name)
        parser.add_argument("target", metavar="NAME@VERSION", type=args.name_at_version)
        parser.set_defaults(handler=handler)
    for name, handler in (("rollback", _rollback), ("unload", _unload)):
        parser = subparsers.add_parser(name)
        parser.add_argument("name", metavar="NAME")
        parser.set_defaults(handler=handler)
    subparsers.add_parser("gc").set_defaults(handler=_gc)
    for parser in subparsers.choices.values():
        args.add_global(parser)


def _install(arguments: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        fd = stack.enter_context(_opened(arguments.bundle))
        payload = {"activate": arguments.activate, "filename": arguments.bundle.name}
        reply = call_with_progress(arguments, "install", payload, (fd,))
    verb = "installed" if reply.get("new", True) else "already installed:"
    target = f"{reply['name']}@{reply['version']}"
    text = f"{verb} {target} ({output.size(reply.get('size_bytes'))})\n"
    if reply.get("activated"):
        text += served(target, reply)
    else:
        text += f"to serve it: edge-runtime activate {target}"
    return answer(arguments, reply, text)


def served(target: str, reply: Mapping[str, Any]) -> str:
    """What a change of the serving version came to."""
    facts = [f"variant {reply['variant']}"] if reply.get("variant") else []
    if reply.get("swap_ms") is not None:
        facts.append(f"switched in {output.duration(float(reply['swap_ms']) / 1000)}")
    return f"{target} is active" + (f" ({', '.join(facts)})" if facts else "")


def _activate(arguments: argparse.Namespace) -> int:
    name, version = arguments.target
    reply = call_with_progress(arguments, "activate", {"name": name, "version": version})
    return answer(arguments, reply, served(f"{name}@{version}", reply))


def _rollback(arguments: argparse.Namespace) -> int:
    reply = call_with_progress(arguments, "rollback", {"name": arguments.name})
    return answer(arguments, reply, served(f"{arguments.name}@{reply['version']}", reply))


def _unload(arguments: argparse.Namespace) -> int:
    reply = call(arguments, "unload", {"name": arguments.name})
    freed = output.size(reply.get("freed_bytes"))
    return answer(arguments, reply, f"unloaded {arguments.name}: {freed} of memory came back")


def _remove(arguments: argparse.Namespace) -> int:
    name, version = arguments.target
    reply = call(arguments, "remove", {"name": name, "version": version})
    freed = output.size(reply.get("freed_bytes"))
    return answer(arguments, reply, f"removed {name}@{version}: {freed} of disk came back")


def _gc(arguments: argparse.Namespace) -> int:
    reply = call(arguments, "gc")
    lines = [f"removed {target}" for target in reply.get("removed") or []]
    lines.append(f"{output.size(reply.get('freed_bytes'))} of disk came back")
    return answer(arguments, reply, "\n".join(lines))


def answer(arguments: argparse.Namespace, reply: Mapping[str, Any], text: str) -> int:
    """Print a reply, as JSON or as this text."""
    if arguments.json:
        output.print_json(reply)
    else:
        print("\n".join(output.printable(line) for line in text.split("\n")))
    return 0


def call_with_progress(
    arguments: argparse.Namespace, command: str, payload: dict[str, Any], fds: tuple[int, ...] = ()
) -> dict[str, Any]:
    """As `call`; what the daemon is doing meanwhile is shown."""
    with Progress(sys.stderr, quiet=arguments.json) as progress:

        def show(event: Mapping[str, Any]) -> None:
            text, done, total = (event.get(key) for key in ("text", "done", "total"))
            progress.update(str(text or ""), int(done or 0), int(total or 0))

        return call(arguments, command, payload, fds=fds, on_event=show)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of the bundle file; a directory is packed into a nameless file first.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it cannot be read, or is neither a file nor a directory.
        BundleError: the directory is no bundle.
    """
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            path = _packed(path, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        try:
            # Non-blocking, so that a FIFO by mistake is refused and not waited for.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise NotFoundError("there is no such bundle", where=str(path)) from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"the bundle cannot be read: {reason}", where=str(path)) from error
        stack.callback(os.close, fd)
        if not path.is_file():
            raise UsageError("is not a bundle", where=str(path), expected="a file or directory")
        yield fd


def _packed(directory: Path, into: Path) -> Path:
    from edge_runtime.bundle import archive

    target = into / f"{directory.resolve().name}.bundle"
    with archive.open_bundle(directory) as bundle:
        archive.pack(bundle, target)
    return target
