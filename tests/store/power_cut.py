"""Power cuts on a real ext4: run as root in a mount namespace of its own, by test_power_cut.py:
`unshare --mount python -m tests.store.power_cut DIRECTORY SYNCING BROKEN`.

A life of the store on a file-backed ext4 that commits its journal only when asked. After every step
that changes something the backing file is copied: what the medium would hold if power went now.
Each copy is mounted (the journal replays) and looked at. Prints JSON; exit code 77: not possible.

SYNCING is `plain` (the least that is on the medium: what the store synced itself) or `journal` (the
most: an unrelated fsync commits the names of everything so far, but not the bytes of files that
were not synced). BROKEN names a step that is left out, to see that this is noticed; `-`: none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_runtime.store import Store
from tests.store import world
from tests.store.world import CHANGES, NAME, Step, View, WatchedFiles

LIFE: tuple[Callable[[Store], object], ...] = (
    lambda store: world.install(store, 1),
    lambda store: world.activate(store, 1),
    lambda store: world.install(store, 2),
    lambda store: world.activate(store, 2),
    lambda store: store.rollback(NAME),
    lambda store: store.settle(NAME),
    lambda store: store.remove(NAME, 2),
    lambda store: store.deactivate(NAME),
    lambda store: store.collect_garbage(byte_budget=0),
)

# noauto_da_alloc: ext4 must not paper over a missing fsync before a rename.
MOUNT_OPTIONS = "loop,commit=300,noauto_da_alloc"
IMAGE_BYTES = 6 * 1024 * 1024
NOT_POSSIBLE = 77


class Rig:
    """The live file system, its images and what is found in them."""

    def __init__(self, base: Path, syncing: str, broken: str) -> None:
        self._image = base / "disk.img"
        self._copy = base / "copy.img"
        self._live = base / "live"
        self._looked = base / "looked"
        self._syncing = syncing
        self._broken = broken
        self.root = self._live / "state"
        self.allowed: tuple[View, View]
        self.images = 0
        self.failures: list[str] = []

    def start(self) -> None:
        self._live.mkdir()
        self._looked.mkdir()
        with self._image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        make = ["mkfs.ext4", "-q", "-F", "-b", "1024", "-J", "size=1", str(self._image)]
        subprocess.run(make, check=True)
        mount(self._image, self._live)

    def around(self, step: Step, do: Callable[[], Any]) -> Any:
        if step.verb == self._broken:
            return None
        answer = do()
        if step.verb in CHANGES:
            self.look(f"{step.verb} {step.path.name}")
        return answer

    def look(self, when: str, exactly: bool = False) -> None:
        """Cut the power here."""
        if self._syncing == "journal":
            with (self._live / "unrelated").open("ab") as file:
                file.write(b".")
                os.fsync(file.fileno())
        shutil.copyfile(self._image, self._copy)
        self.images += 1
        mount(self._copy, self._looked)
        try:
            found = world.seen(self._looked / "state")
            world.check_between(found, self.allowed[1 if exactly else 0], self.allowed[1])
        except Exception as e:  # noqa: BLE001 - whatever is wrong with the image is the finding
            self.failures.append(f"after {when}: {type(e).__name__}: {e}"[:300])
        finally:
            subprocess.run(["umount", str(self._looked)], check=True)

    def stop(self) -> None:
        subprocess.run(["umount", str(self._live)], check=False)


def mount(image: Path, target: Path) -> None:
    command = ["mount", "-t", "ext4", "-o", MOUNT_OPTIONS, str(image), str(target)]
    subprocess.run(command, check=True, capture_output=True)


def live(rig: Rig) -> None:
    nothing = View(None, None, frozenset())
    with world.opened(Path(rig.root.parent.parent) / "model") as model:
        views = [world.view(model)]
        for act in LIFE:
            act(model)
            views.append(world.view(model))
    rig.allowed = (nothing, nothing)
    with world.opened(rig.root, WatchedFiles(rig.around)) as store:
        for act, old, new in zip(LIFE, views, views[1:], strict=False):
            rig.allowed = (old, new)
            act(store)
            rig.look("the call returned", exactly=True)


def main() -> None:
    rig = Rig(Path(sys.argv[1]), syncing=sys.argv[2], broken=sys.argv[3])
    try:
        rig.start()
    except (OSError, subprocess.CalledProcessError) as e:
        print(e, file=sys.stderr)
        sys.exit(NOT_POSSIBLE)
    try:
        live(rig)
    finally:
        rig.stop()
    print(json.dumps({"images": rig.images, "failures": rig.failures}))


if __name__ == "__main__":
    main()
