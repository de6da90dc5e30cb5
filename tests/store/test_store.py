"""What a store does when nothing goes wrong, and what it refuses."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.errors import (
    BundleError,
    ConflictError,
    EdgeError,
    NotFoundError,
    RequestError,
    StorageError,
    TooLargeError,
)
from edge_runtime.files import SystemFiles
from edge_runtime.store import BlobSource, Store, driver
from tests.store import world
from tests.store.world import CHANGES, NAME, Fault, Step, WatchedFiles


def contents(root: Path) -> dict[str, bytes]:
    """Every file below the root."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


class TestInstall:
    def test_what_was_installed_is_read_back(self, store: Store) -> None:
        world.install(store, 1)
        generation = store.find(NAME, 1)
        assert store.models() == (NAME,)
        assert store.read_manifest(generation) == world.manifest(1)
        for blob, data in zip(generation.blobs, world.artifacts(1), strict=True):
            assert store.blob_path(blob.sha256, blob.size_bytes).read_bytes() == data
        assert not store.verify(NAME, 1).damaged

    def test_it_does_not_serve_yet(self, store: Store) -> None:
        world.install(store, 1)
        assert store.current(NAME).active is None

    def test_progress_counts_every_byte_once_also_of_blobs_that_are_there(
        self, store: Store
    ) -> None:
        world.install(store, 1)
        told: list[tuple[int, int]] = []
        datas = world.artifacts(2)
        store.install(NAME, 2, world.manifest(2), world.sources(*datas), lambda *t: told.append(t))
        total = sum(map(len, datas))
        assert told[-1] == (total, total)
        assert [done for done, _ in told] == sorted({done for done, _ in told})

    def test_a_blob_that_is_there_is_not_written_again(self, store: Store) -> None:
        world.install(store, 1)
        shared = store.find(NAME, 1).blobs[0].sha256
        inode = store.blob_path(shared).stat().st_ino
        world.install(store, 2)
        assert store.blob_path(shared).stat().st_ino == inode

    def test_the_same_again_changes_nothing(self, store: Store, root: Path) -> None:
        world.install(store, 1)
        before = contents(root)

        unread = iter([b"a blob that is there is not asked for"])
        blobs = [(b.sha256, b.size_bytes, unread) for b in store.find(NAME, 1).blobs]
        again = store.install(NAME, 1, world.manifest(1), blobs)
        assert again == store.find(NAME, 1)
        assert contents(root) == before
        assert next(unread)

    def test_the_same_version_with_other_content_is_refused(self, store: Store) -> None:
        world.install(store, 1)
        with pytest.raises(ConflictError, match="already installed with other content"):
            store.install(NAME, 1, b"another manifest", [])

    def test_numbers_rise_and_are_not_given_out_again(self, store: Store) -> None:
        for version in (5, 3, 9):
            world.install(store, version)
        assert [g.number for g in store.generations(NAME)] == [1, 2, 3]
        store.remove(NAME, 9)
        world.install(store, 9)
        assert store.find(NAME, 9).number == 4
        store.collect_garbage(byte_budget=0)
        assert store.models() == ()
        world.install(store, 9)
        assert store.find(NAME, 9).number == 5

    def test_a_blob_named_twice_is_stored_once(self, store: Store) -> None:
        data = b"same"
        store.install(NAME, 1, b"m", [*world.sources(data), *world.sources(data)])
        assert len(store.find(NAME, 1).blobs) == 1

    def test_an_empty_blob_and_a_model_without_blobs_are_fine(self, store: Store) -> None:
        store.install("empty", 1, b"m", world.sources(b""))
        store.install("none", 1, b"m", [])
        assert not store.verify("empty", 1).damaged
        assert not store.verify("none", 1).damaged

    def test_a_large_blob_does_not_pass_through_memory(self, store: Store) -> None:
        piece = bytes(1 << 20)
        sha256 = hashlib.sha256(piece * 48).hexdigest()
        tracemalloc.start()
        try:
            store.install(NAME, 1, b"m", [(sha256, 48 << 20, itertools.repeat(piece, 48))])
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak_bytes < 4 << 20


class TestRefusals:
    @pytest.mark.parametrize(
        "name", ["", ".", "..", "../x", "a/b", "/a", ".a", "-a", "A", "ä", "a\n", "a\0", "a" * 65]
    )
    def test_a_name_that_is_no_name_never_reaches_the_disk(
        self, store: Store, root: Path, name: str
    ) -> None:
        before = contents(root)
        calls: list[Callable[[], object]] = [
            lambda: store.install(name, 1, b"m", []),
            lambda: store.current(name),
            lambda: store.generations(name),
            lambda: store.generation(name, 1),
            lambda: store.find(name, 1),
            lambda: store.activate(name, 1),
            lambda: store.rollback(name),
            lambda: store.deactivate(name),
            lambda: store.verify(name, 1),
            lambda: store.remove(name, 1),
        ]
        for call in calls:
            with pytest.raises(RequestError, match="is not a model name"):
                call()
        assert contents(root) == before

    @pytest.mark.parametrize("version", [0, -1, True, 1.0, "1"])
    def test_a_version_that_is_no_counter_is_refused(self, store: Store, version: Any) -> None:
        with pytest.raises(RequestError, match="is not a version"):
            store.install(NAME, version, b"m", [])

    @pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, "a" * 63])
    def test_a_digest_that_is_none_never_reaches_the_disk(self, store: Store, sha256: str) -> None:
        with pytest.raises(BundleError, match="not a SHA-256"):
            store.install(NAME, 1, b"m", [(sha256, 1, [b"x"])])
        with pytest.raises(BundleError, match="not a SHA-256"):
            store.blob_path(sha256)

    @pytest.mark.parametrize(
        ("data", "size_bytes", "message"),
        [
            (b"other bytes", 9, "longer than stated"),
            (b"short", 9, "ends after 5 bytes"),
            (b"nine byte", 9, "artifact has SHA-256"),
        ],
    )
    def test_a_blob_that_is_not_what_it_says_leaves_nothing(
        self, store: Store, root: Path, data: bytes, size_bytes: int, message: str
    ) -> None:
        world.install(store, 1)
        before = contents(root)
        good, bad = b"good", BlobSource("ab" * 32, size_bytes, [data])
        with pytest.raises(BundleError, match=message):
            store.install(NAME, 2, b"m", [*world.sources(good), bad])
        assert contents(root) == before

    def test_endless_data_ends_at_the_stated_size(self, store: Store) -> None:
        with pytest.raises(BundleError, match="longer than stated"):
            store.install(NAME, 1, b"m", [("ab" * 32, 5000, itertools.repeat(b"x" * 1000))])

    def test_an_error_of_the_source_passes_through_and_leaves_nothing(
        self, store: Store, root: Path
    ) -> None:
        before = contents(root)

        def broken() -> Iterator[bytes]:
            yield b"a"
            raise BundleError("the archive ends here")

        with pytest.raises(BundleError, match="the archive ends here"):
            store.install(NAME, 1, b"m", [*world.sources(b"good"), ("ab" * 32, 9, broken())])
        assert contents(root) == before

    def test_two_sizes_for_one_digest_are_refused(self, store: Store) -> None:
        with pytest.raises(BundleError, match="two sizes"):
            store.install(NAME, 1, b"m", [("ab" * 32, 1, []), ("ab" * 32, 2, [])])
        with pytest.raises(BundleError, match="expected 0 or more"):
            store.install(NAME, 1, b"m", [("ab" * 32, -1, [])])

    def test_what_is_too_large_is_refused(self, store: Store) -> None:
        with pytest.raises(TooLargeError, match="manifest"):
            store.install(NAME, 1, bytes(driver.MANIFEST_SIZE_MAX + 1), [])
        many = [(f"{n:064x}", 1, [b"x"]) for n in range(12_000)]
        with pytest.raises(TooLargeError, match="list of blobs"):
            store.install(NAME, 1, b"m", many)

    def test_what_is_not_there_is_not_found(self, store: Store) -> None:
        world.install(store, 1)
        for call in (
            lambda: store.current("other"),
            lambda: store.rollback("other"),
            lambda: store.activate("other", 1),
            lambda: store.activate(NAME, 2),
            lambda: store.find(NAME, 2),
            lambda: store.remove(NAME, 2),
            lambda: store.verify(NAME, 2),
            lambda: store.blob_path("ab" * 32),
        ):
            with pytest.raises(NotFoundError):
                call()
        assert store.generations("other") == ()

    def test_a_second_daemon_is_refused_and_may_come_after_the_first(
        self, store: Store, root: Path
    ) -> None:
        second = Store(root, SystemFiles(), ManualClock())
        with pytest.raises(ConflictError, match="another daemon uses this state directory"):
            second.open()
        store.close()
        second.open()
        second.close()


def _active(root: Path) -> list[bytes]:
    """What each slot says is active."""
    slots = [(root / "models" / NAME / slot).read_bytes() for slot in ("switch.a", "switch.b")]
    return [data[data.index(b'"active"') :].partition(b",")[0] for data in slots]


class TestSwitching:
    @pytest.fixture(autouse=True)
    def three_versions(self, store: Store) -> None:
        for version in (1, 2, 3):
            world.install(store, version)

    def test_what_served_becomes_previous(self, store: Store, clock: ManualClock) -> None:
        assert store.activate(NAME, 1).previous is None
        clock.advance_s(60)
        switch = store.activate(NAME, 2, "update 17")
        assert (switch.active, switch.previous, switch.reason) == (2, 1, "update 17")
        assert switch.since_wall_s == clock.wall_s()
        assert store.current(NAME) == switch

    def test_activating_what_serves_changes_nothing(self, store: Store, clock: ManualClock) -> None:
        first = store.activate(NAME, 1)
        clock.advance_s(60)
        assert store.activate(NAME, 1) == first

    def test_a_rollback_leads_back_once(self, store: Store) -> None:
        store.activate(NAME, 1)
        store.activate(NAME, 2)
        switch = store.rollback(NAME, "died five times")
        assert (switch.active, switch.previous, switch.reason) == (1, None, "died five times")
        with pytest.raises(ConflictError, match="no previous generation"):
            store.rollback(NAME)

    def test_an_unloaded_model_stays_unloaded(self, store: Store, root: Path) -> None:
        store.activate(NAME, 1)
        store.deactivate(NAME)
        store.close()
        with world.opened(root) as again:
            assert again.current(NAME).active is None
            with pytest.raises(ConflictError):
                again.rollback(NAME)
            again.activate(NAME, 1)

    def test_sequences_rise_and_models_do_not_meet(self, store: Store) -> None:
        world.install(store, 1, "other")
        sequences = [store.activate(NAME, n).sequence for n in (1, 2, 3)]
        assert sequences == [1, 2, 3]
        assert store.current("other").active is None
        assert store.activate("other", 1).sequence == 1

    def test_one_slot_holds_the_switch_and_both_when_it_is_settled(
        self, store: Store, root: Path
    ) -> None:
        store.activate(NAME, 1)
        store.settle(NAME)
        store.activate(NAME, 2)
        assert _active(root) == [b'"active":2', b'"active":1']
        store.settle(NAME)
        assert _active(root) == [b'"active":2', b'"active":2']

    def test_switches_that_nobody_settled_take_turns_in_the_slots(
        self, store: Store, root: Path
    ) -> None:
        store.activate(NAME, 1)
        store.activate(NAME, 2)
        assert _active(root) == [b'"active":1', b'"active":2']
        store.activate(NAME, 3)
        assert _active(root) == [b'"active":3', b'"active":2']

    def test_a_copy_that_fails_leaves_the_switch_and_is_made_later(
        self, store: Store, root: Path
    ) -> None:
        world.activate(store, 1)
        store.close()
        fault = Fault(1, "torn")
        with world.opened(root, WatchedFiles(fault.around)) as watched:
            watched.activate(NAME, 2)
            fault.armed = True
            with pytest.raises(StorageError):
                watched.settle(NAME)
            fault.armed = False
            assert watched.current(NAME).active == 2
            watched.activate(NAME, 2)  # the same again: what is missing is done
            assert _active(root) == [b'"active":2', b'"active":2']

    def test_the_slot_that_does_not_count_is_written_first(self, store: Store, root: Path) -> None:
        world.activate(store, 1)
        older = (root / "models" / NAME / "switch.a").read_bytes()
        world.activate(store, 2)
        store.close()
        for stale in ("switch.a", "switch.b"):
            written: list[str] = []

            def around(step: Step, do: Callable[[], Any], written: list[str] = written) -> Any:
                if step.verb == "write":
                    written.append(step.path.name)
                return do()

            with world.opened(root, WatchedFiles(around)) as watched:
                (root / "models" / NAME / stale).write_bytes(older)
                watched.activate(NAME, 3)
                assert written == [f".tmp-{stale}"]
                world.activate(watched, 2)

    @pytest.mark.parametrize("damage", ["missing", "short", "manifest"])
    def test_a_damaged_generation_is_not_activated(self, store: Store, damage: str) -> None:
        store.activate(NAME, 1)
        generation = store.find(NAME, 2)
        blob = store.blob_path(generation.blobs[1].sha256)
        manifest = store._disk.manifest(generation)
        {
            "missing": blob.unlink,
            "short": lambda: world.truncate_to_half(blob),
            "manifest": manifest.unlink,
        }[damage]()
        with pytest.raises(StorageError):
            store.activate(NAME, 2)
        assert store.current(NAME).active == 1


class TestRemoving:
    def test_the_active_and_the_previous_version_are_not_removed(self, store: Store) -> None:
        for version in (1, 2):
            world.install(store, version)
            world.activate(store, version)
        with pytest.raises(ConflictError, match="the active generation"):
            store.remove(NAME, 2)
        with pytest.raises(ConflictError, match="the previous generation"):
            store.remove(NAME, 1)

    def test_a_removed_version_takes_its_own_blobs_and_leaves_the_shared(
        self, store: Store
    ) -> None:
        for version in (1, 2):
            world.install(store, version)
        freed = store.remove(NAME, 1)
        weights = world.artifacts(1)[1]
        assert freed.blobs == (hashlib.sha256(weights).hexdigest(),)
        assert freed.size_bytes == len(weights) + len(world.manifest(1))
        assert not store.verify(NAME, 2).damaged

    def test_garbage_goes_oldest_first_until_the_budget_fits(self, store: Store) -> None:
        for version in (1, 2, 3, 4):
            world.install(store, version)
        world.install(store, 9, "other")
        store.activate(NAME, 1)
        used_bytes = store.statistics().used_bytes
        assert store.collect_garbage(used_bytes).generations == ()
        freed = store.collect_garbage(used_bytes - 1)
        assert [generation.version for generation in freed.generations] == [2]
        assert store.statistics().used_bytes == used_bytes - freed.size_bytes
        freed = store.collect_garbage(0)
        assert [(g.name, g.version) for g in freed.generations] == [
            (NAME, 3),
            (NAME, 4),
            ("other", 9),
        ]
        assert store.models() == (NAME,)
        assert not store.verify(NAME, 1).damaged

    def test_the_budget_of_the_store_is_the_default(self, root: Path) -> None:
        with world.opened(root, byte_budget=1) as store:
            world.install(store, 1)
            assert len(store.collect_garbage().generations) == 1

    def test_without_a_budget_only_stray_blobs_go(self, store: Store, root: Path) -> None:
        world.install(store, 1)
        stray = root / "blobs" / ("ab" * 32)
        stray.write_bytes(b"stray")
        (root / "blobs" / ".tmp-half").write_bytes(b"half")
        freed = store.collect_garbage()
        assert (freed.generations, freed.blobs, freed.size_bytes) == ((), ("ab" * 32,), 5)
        assert not (root / "blobs" / ".tmp-half").exists()
        assert not store.verify(NAME, 1).damaged

    def test_blobs_stay_while_a_damaged_generation_may_need_them(
        self, store: Store, root: Path
    ) -> None:
        for version in (1, 2):
            world.install(store, version)
        store.activate(NAME, 1)
        blobs = sorted(path.name for path in (root / "blobs").iterdir())
        (root / "models" / NAME / "generations" / "000001" / "record").write_bytes(b"rot")
        freed = store.collect_garbage(0)
        assert "000001" in freed.held_back
        assert [generation.version for generation in freed.generations] == [2]
        assert sorted(path.name for path in (root / "blobs").iterdir()) == blobs


class FewBytes(SystemFiles):
    """A disk that says how much is free, whether or not it is so."""

    def __init__(self, free_bytes: int) -> None:
        self._free_bytes = free_bytes

    def free_bytes(self, path: Path) -> int:
        return self._free_bytes


class TestDisk:
    def test_without_room_nothing_is_written(self, root: Path) -> None:
        steps: list[Step] = []

        def around(step: Step, do: Callable[[], Any]) -> Any:
            steps.append(step)
            return 1000 if step.verb == "free_bytes" else do()

        with world.opened(root, WatchedFiles(around)) as store:
            steps.clear()
            with pytest.raises(StorageError, match="1000 are free") as caught:
                world.install(store, 1)
            assert "remove versions" in caught.value.remedy
            assert not [step for step in steps if step.verb in CHANGES]

    def test_a_store_on_a_read_only_disk_still_serves(self, store: Store, root: Path) -> None:
        world.install(store, 1)
        world.activate(store, 1)
        store.close()
        (root / "models" / NAME / "switch.b").unlink()
        (root / "blobs" / ".tmp-left").write_bytes(b"")

        def around(step: Step, do: Callable[[], Any]) -> Any:
            if step.verb in CHANGES:
                raise StorageError("cannot change: the file system is read-only (EROFS)")
            return do()

        read_only = Store(root, WatchedFiles(around), ManualClock())
        recovery = read_only.open()
        assert len(recovery.problems) == 2
        assert "read-only" in recovery.problems[0]
        assert world.view(read_only).active == 1
        read_only.close()

    @pytest.mark.root
    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
    def test_a_really_full_disk_leaves_what_was_there_and_can_be_relieved(
        self, tmp_path: Path
    ) -> None:
        command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting is not possible here")
        try:
            with world.opened(tmp_path / "state", FewBytes(1 << 40)) as store:
                for version in (1, 2, 3):
                    world.install(store, version)
                world.activate(store, 3)
                before = contents(tmp_path)
                with pytest.raises(StorageError, match="the disk is full"):
                    store.install(NAME, 4, b"m", world.sources(b"fits", bytes(4 << 20)))
                assert contents(tmp_path) == before
                filler = tmp_path / "filler"
                with pytest.raises(OSError, match="No space"):
                    filler.write_bytes(bytes(4 << 20))
                with pytest.raises(StorageError, match="the disk is full"):
                    world.activate(store, 1)
                assert world.view(store).active == 3
                assert len(store.collect_garbage(0).generations) == 2
                world.install(store, 1)
                world.activate(store, 1)
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)

    def test_a_read_only_mount_is_opened_and_a_write_says_why_it_failed(
        self, store: Store, root: Path
    ) -> None:
        world.install(store, 1)
        store.close()
        if os.geteuid() != 0:
            pytest.skip("mounting read-only needs root")
        for command in (["--bind", str(root)], ["-o", "remount,bind,ro"]):
            run = subprocess.run(["mount", *command, str(root)], check=False, capture_output=True)
            if run.returncode:
                pytest.skip("mounting is not possible here")
        try:
            with world.opened(root) as read_only:
                assert not read_only.verify(NAME, 1).damaged
                with pytest.raises(StorageError, match="read-only") as caught:
                    world.install(read_only, 2)
                assert "remount" in caught.value.remedy
        finally:
            subprocess.run(["umount", str(root)], check=True)


class TestRecovery:
    def test_a_clean_store_has_nothing_to_report(self, store: Store, root: Path) -> None:
        world.install(store, 1)
        world.activate(store, 1)
        store.close()
        again = Store(root, SystemFiles(), ManualClock())
        recovery = again.open()
        again.close()
        assert not any((recovery.removed, recovery.repaired, recovery.damaged, recovery.problems))

    def test_leftovers_go_and_strangers_stay(self, store: Store, root: Path) -> None:
        world.install(store, 1)
        store.close()
        model = root / "models" / NAME
        half = model / "generations" / ".tmp-000002"
        half.mkdir()
        (half / "model.yaml").write_bytes(b"half")
        (model / "generations" / "000003").mkdir()
        (model / ".tmp-switch.a").write_bytes(b"")
        (root / "models" / "NOT A MODEL").mkdir()
        (root / "models" / "a-file").write_bytes(b"")
        again = Store(root, SystemFiles(), ManualClock())
        recovery = again.open()
        assert [Path(path).name for path in recovery.removed] == [
            ".tmp-switch.a",
            ".tmp-000002",
            "000003",
        ]
        assert "NOT A MODEL" in recovery.problems[0]
        assert "a-file" in recovery.problems[1]
        assert again.models() == (NAME,)
        again.close()

    def test_records_of_another_version_of_the_program_are_left_alone(
        self, store: Store, root: Path
    ) -> None:
        body = b'{"record":"generation-2","name":"other","number":1}'
        record = body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"
        newer = root / "models" / "other" / "generations" / "000001"
        newer.mkdir(parents=True)
        (newer / "record").write_bytes(record)
        world.install(store, 1)
        store.close()
        again = Store(root, SystemFiles(), ManualClock())
        recovery = again.open()
        assert "another version of edge-runtime" in recovery.problems[0]
        assert (newer / "record").read_bytes() == record
        with pytest.raises(StorageError, match="not understood"):
            again.generation("other", 1)
        world.install(again, 2)
        assert again.collect_garbage(0).held_back
        again.close()

    def test_statistics_count(self, store: Store) -> None:
        world.install(store, 1)
        world.install(store, 2)
        world.activate(store, 2)
        freed = store.remove(NAME, 1)
        statistics = store.statistics()
        assert (statistics.models, statistics.generations) == (1, 1)
        assert (statistics.installs, statistics.switches) == (2, 1)
        assert statistics.freed_bytes == freed.size_bytes
        assert statistics.used_bytes == store.find(NAME, 2).size_bytes
        assert statistics.written_bytes == sum(map(len, {*world.artifacts(1), *world.artifacts(2)}))

    def test_every_error_says_where(self, store: Store) -> None:
        with pytest.raises(EdgeError) as caught:
            store.find("camera", 7)
        assert caught.value.where == "camera"
