"""A disk that keeps nothing but what was synced, or anything else it likes: POSIX at its worst.

Law of this file: a model beside the real directory. A file's bytes are kept when the file was
synced; a name in a directory, when the directory was synced. Whatever was not synced may be kept or
lost, each change by itself. ext4's journal keeps names in order, so it forgives mistakes that this
does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.store.world import Step

# Undecided changes at one moment are tried in all combinations up to this many, then only
# all-kept, all-lost, and each one alone the other way.
COMBINED_MAX = 7


class File:
    """Bytes now, and bytes on the medium."""

    def __init__(self) -> None:
        self.now = self.kept = b""


class Directory:
    """Names now, and names on the medium."""

    def __init__(self) -> None:
        self.now: dict[str, Node] = {}
        self.kept: dict[str, Node] = {}


Node = File | Directory
# A change that is not on the medium yet: a name in a directory, or a file's bytes (name: None).
Open = tuple[Node, str | None]


class StrictDisk:
    """Follows steps made below `base`, and tells what a power cut may leave."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._top = Directory()

    def follow(self, step: Step, do: Callable[[], Any]) -> Any:
        """Do the step, for real and in the model."""
        node = self._find(step.path)
        parent = self._find(step.path.parent if step.path != self._base else self._base)
        answer = do()
        if step.verb == "write":
            node = parent.now.setdefault(step.path.name, File())
            node.now = step.path.read_bytes()
        elif step.verb == "mkdir":
            parent.now[step.path.name] = Directory()
        elif step.verb in ("unlink", "rmdir"):
            del parent.now[step.path.name]
        elif step.verb == "rename":
            self._rename(parent, step.path)
        elif step.verb == "sync":
            node.kept = node.now
        elif step.verb == "sync_directory":
            node.kept = dict(node.now)
        return answer

    def _rename(self, parent: Any, source: Path) -> None:
        """The target is the name that is there now and was another, or none, before."""
        node = parent.now.pop(source.name)
        parent.now[source.name.removeprefix(".tmp-")] = node
        there = {path.name for path in source.parent.iterdir()}
        if set(parent.now) != there:  # renamed away, not into place
            del parent.now[source.name]
            parent.now[".tmp-" + source.name] = node
        assert set(parent.now) == there

    def _find(self, path: Path) -> Any:
        node: Node | None = self._top
        for part in path.relative_to(self._base).parts:
            node = node.now.get(part) if isinstance(node, Directory) else None
        return node

    def outcomes(self) -> Iterator[dict[str, bytes | None]]:
        """Every tree that a power cut may leave now: path -> bytes, or None for a directory."""
        undecided = sorted(
            self._undecided(self._top), key=lambda each: (id(each[0]), each[1] or "")
        )
        if len(undecided) <= COMBINED_MAX:
            choices = list(itertools.product((False, True), repeat=len(undecided)))
        else:
            alone = [[i == j for j in range(len(undecided))] for i in range(len(undecided))]
            choices = [tuple(row) for row in alone]
            choices += [tuple(not kept for kept in row) for row in alone]
            choices += [(False,) * len(undecided), (True,) * len(undecided)]
        for choice in choices:
            lucky = {
                (id(n), name) for (n, name), kept in zip(undecided, choice, strict=True) if kept
            }
            tree: dict[str, bytes | None] = {}
            self._grow(self._top, "", lucky, tree)
            yield tree

    def _undecided(self, node: Node) -> set[Open]:
        if isinstance(node, File):
            return {(node, None)} if node.now != node.kept else set()
        names = set(node.now) | set(node.kept)
        found: set[Open] = {(node, n) for n in names if node.now.get(n) is not node.kept.get(n)}
        for below in {*node.now.values(), *node.kept.values()}:
            found |= self._undecided(below)
        return found

    def _grow(
        self,
        directory: Directory,
        at: str,
        lucky: set[tuple[int, str | None]],
        tree: dict[str, bytes | None],
    ) -> None:
        for name in set(directory.now) | set(directory.kept):
            names = directory.now if (id(directory), name) in lucky else directory.kept
            node = names.get(name)
            if isinstance(node, Directory):
                tree[f"{at}{name}"] = None
                self._grow(node, f"{at}{name}/", lucky, tree)
            elif node is not None:
                tree[f"{at}{name}"] = node.now if (id(node), None) in lucky else node.kept
