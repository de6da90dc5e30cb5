"""A small world for the store's proofs: three versions of a model, what may be seen of it, faults.

Law of this file: helpers only; it runs under pytest and inside the scripts that are killed.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime.clock import ManualClock
from edge_runtime.errors import StorageError
from edge_runtime.files import TEMPORARY_PREFIX, Entry, Files, SystemFiles
from edge_runtime.store import BlobSource, Store

NAME = "camera"
SHARED = b"labels shared by every version\n" * 40


def artifacts(version: int) -> tuple[bytes, ...]:
    return SHARED, f"weights of version {version}\n".encode() * 200


def manifest(version: int) -> bytes:
    return f"schema: 1\nname: {NAME}\nversion: {version}\n".encode()


def sources(*datas: bytes, piece_bytes: int = 1500) -> list[BlobSource]:
    def pieces(data: bytes) -> Iterator[bytes]:
        return (data[i : i + piece_bytes] for i in range(0, len(data), piece_bytes))

    return [BlobSource(hashlib.sha256(d).hexdigest(), len(d), pieces(d)) for d in datas]


def install(store: Store, version: int, name: str = NAME) -> None:
    store.install(name, version, manifest(version), sources(*artifacts(version)))


def activate(store: Store, version: int, name: str = NAME) -> None:
    """The switch and its copy, as the daemon makes them."""
    switch(store, version, name)
    store.settle(name)


def switch(store: Store, version: int, name: str = NAME) -> None:
    """Without the copy: one slot has it, as when power went just then."""
    store.activate(name, store.find(name, version).number)


@contextmanager
def opened(
    root: Path, files: Files | None = None, byte_budget: int | None = None
) -> Iterator[Store]:
    store = Store(root, files or SystemFiles(), ManualClock(), byte_budget)
    store.open()
    try:
        yield store
    finally:
        store.close()


class View(NamedTuple):
    """What a user of the store can see of it."""

    active: int | None  # versions
    previous: int | None
    installed: frozenset[int]


def view(store: Store) -> View:
    """What is seen now. Everything listed must be complete and hash to its names."""
    known = {generation.number: generation for generation in store.generations(NAME)}
    for generation in known.values():
        assert store.read_manifest(generation) == manifest(generation.version)
        verification = store.verify(NAME, generation.version)
        assert not verification.damaged, verification.damaged
    installed = frozenset(generation.version for generation in known.values())
    if not known:
        return View(None, None, installed)
    switch = store.current(NAME)
    return View(
        None if switch.active is None else known[switch.active].version,
        None if switch.previous is None else known[switch.previous].version,
        installed,
    )


def seen(root: Path) -> View:
    """What a fresh store sees."""
    with opened(root) as store:
        return view(store)


def check_between(found: View, old: View, new: View) -> None:
    """Old or new, never neither; while several versions go, some of them may be gone."""
    assert found[:2] in (old[:2], new[:2]), f"{found} is neither {old} nor {new}"
    at_least, at_most = old.installed & new.installed, old.installed | new.installed
    assert at_least <= found.installed <= at_most, f"{found} is neither {old} nor {new}"


def check_tidy(root: Path) -> None:
    """Nothing temporary is left anywhere."""
    assert not [path for path in root.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]


class Operation(NamedTuple):
    """Something done to a store, and the state that it is done to."""

    prepare: Callable[[Store], None]
    act: Callable[[Store], Any]


def _nothing(_store: Store) -> None:
    pass


def _one(store: Store) -> None:
    install(store, 1)


def _serving(store: Store) -> None:
    for version in (1, 2):
        install(store, version)
        activate(store, version)


def _waiting(store: Store) -> None:
    _serving(store)
    install(store, 3)


def _switched(store: Store) -> None:
    _waiting(store)
    activate(store, 3)


def _one_slot(store: Store) -> None:
    _waiting(store)
    switch(store, 3)


def _unloaded(store: Store) -> None:
    _switched(store)
    store.deactivate(NAME)


def _rollback(store: Store) -> None:
    if store.current(NAME).previous is not None:  # a retry of one that was done
        store.rollback(NAME)


def _remove(store: Store) -> None:
    if 1 in {generation.version for generation in store.generations(NAME)}:
        store.remove(NAME, 1)


def _collect(store: Store) -> None:
    store.collect_garbage(byte_budget=0)


def _update(store: Store) -> None:
    install(store, 3)
    activate(store, 3)
    _collect(store)


OPERATIONS = {
    "first install": Operation(_nothing, lambda store: install(store, 1)),
    "install": Operation(_serving, lambda store: install(store, 3)),
    "install again": Operation(_serving, lambda store: install(store, 2)),
    "first activate": Operation(_one, lambda store: activate(store, 1)),
    "activate": Operation(_waiting, lambda store: activate(store, 3)),
    "rollback": Operation(_switched, _rollback),
    "settle": Operation(_one_slot, lambda store: store.settle(NAME)),
    "activate before it was settled": Operation(_one_slot, lambda store: activate(store, 2)),
    "rollback before it was settled": Operation(_one_slot, _rollback),
    "remove before it was settled": Operation(_one_slot, _remove),
    "deactivate": Operation(_switched, lambda store: store.deactivate(NAME)),
    "remove": Operation(_switched, _remove),
    "collect garbage": Operation(_switched, _collect),
    "collect everything": Operation(_unloaded, _collect),
    "whole update": Operation(_serving, _update),
}


class Step(NamedTuple):
    """One call that went through `WatchedFiles`."""

    verb: str
    path: Path


CHANGES = frozenset({"write", "sync", "sync_directory", "rename", "unlink", "mkdir", "rmdir"})


class WatchedFiles:
    """Files whose every step goes through `around`, which does it, fails it or spoils it."""

    def __init__(self, around: Callable[[Step, Callable[[], Any]], Any]) -> None:
        self._files = SystemFiles()
        self._around = around

    def _go(self, verb: str, path: Path, *more: Any) -> Any:
        return self._around(Step(verb, path), lambda: getattr(self._files, verb)(path, *more))

    def entry(self, path: Path) -> Entry | None:
        return self._go("entry", path)  # type: ignore[no-any-return]

    def names(self, path: Path) -> list[str]:
        return self._go("names", path)  # type: ignore[no-any-return]

    def read(self, path: Path, size_max: int) -> bytes:
        return self._go("read", path, size_max)  # type: ignore[no-any-return]

    def chunks(self, path: Path) -> Iterator[bytes]:
        return self._go("chunks", path)  # type: ignore[no-any-return]

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        self._go("write", path, chunks)

    def sync(self, path: Path) -> None:
        self._go("sync", path)

    def sync_directory(self, path: Path) -> None:
        self._go("sync_directory", path)

    def rename(self, source: Path, target: Path) -> None:
        self._go("rename", source, target)

    def unlink(self, path: Path) -> None:
        self._go("unlink", path)

    def mkdir(self, path: Path) -> None:
        self._go("mkdir", path)

    def rmdir(self, path: Path) -> None:
        self._go("rmdir", path)

    def free_bytes(self, path: Path) -> int:
        return self._go("free_bytes", path)  # type: ignore[no-any-return]

    def lock(self, path: Path) -> Callable[[], None]:
        return self._go("lock", path)  # type: ignore[no-any-return]


def truncate_to_half(path: Path) -> None:
    """What a torn write leaves."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)


def fault(step: Step) -> StorageError:
    error = StorageError(f"injected into {step.verb}", where=str(step.path))
    error.__cause__ = OSError(errno.EIO, "injected")
    return error


class Fault:
    """Spoils the n-th step (from 1) in one of several ways; `fired` tells whether it came to that.

    `modes`: once: refused; after: done, then refused all the same; torn: a write half done, then
    refused; lies: a write half done and called good; full: from here on nothing can be written or
    made, but removed; dead: from here on nothing can be changed at all.
    """

    MODES = ("once", "after", "torn", "lies", "full", "dead")

    def __init__(self, nth: int, mode: str) -> None:
        assert mode in self.MODES
        self._left = nth
        self._mode = mode
        self.fired = False
        self.armed = False

    def around(self, step: Step, do: Callable[[], Any]) -> Any:
        if not self.armed:
            return do()
        if self._mode in ("torn", "lies") and step.verb != "write":
            return do()
        self._left -= 1
        if self._left == 0:
            self.fired = True
            return self._spoil(step, do)
        if self.fired and self._refused_for_good(step):
            raise fault(step)
        return do()

    def _refused_for_good(self, step: Step) -> bool:
        if self._mode == "full":
            return step.verb in ("write", "mkdir")
        return self._mode == "dead" and step.verb in CHANGES

    def _spoil(self, step: Step, do: Callable[[], Any]) -> Any:
        if self._mode in ("after", "torn", "lies") and step.verb != "lock":
            answer = do()
            if self._mode != "after":
                truncate_to_half(step.path)
            if self._mode == "lies":
                return answer
        raise fault(step)
