"""The profiles that we ship: each fact has its source, and each recorded board is known."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from device_profiles import checking, loading, matching, probe
from device_profiles.schema import CHOICE
from edge_runtime.backends import BACKENDS, options
from tests.profiles.boards import BOARDS, CORAL_M2, CORAL_USB, PI_5, Board, lay_out, with_files

NAMES = loading.names([loading.BUILT_IN])
# What is ours to decide; everything else is a fact and needs somebody else's word.
CHOICES = ("backends", "workers", "memory", "thermal.steps")
SOURCE = re.compile(r"https://|linux(-raspberrypi)?: |uname\(2\)|/proc/|Intel Processor")


def machine(board: Board, root: Path) -> probe.Machine:
    return probe.describe(lay_out(board, root), board.arch)


def test_the_boards_that_the_project_promises_are_there() -> None:
    assert set(NAMES) == {
        *BOARDS,
        "coral-m2",
        "coral-usb",
        "generic-aarch64",
        "generic-x86_64",
    }
    assert loading.load_all([loading.BUILT_IN])[1] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_a_source_and_no_fact_is_a_choice(name: str) -> None:
    resolved = loading.load(name)
    assert resolved.profile.name == name
    for path in resolved.origins:
        source = resolved.source(path)
        assert source, f"{name}: {path} has no source"
        if source.startswith(CHOICE):
            assert path.startswith(CHOICES), f"{name}: {path} is a fact, not a choice"
            assert len(source) > len(CHOICE) + 10, f"{name}: {path}: a choice has a reason"
        else:
            assert SOURCE.match(source), f"{name}: {path}: {source!r} is no source"


@pytest.mark.parametrize("name", NAMES)
def test_no_source_is_left_over(name: str) -> None:
    resolved = loading.load(name)
    label = resolved.files[0]
    own = [path for path, file in resolved.origins.items() if file == label]
    for key in resolved.sources[label]:
        covered = [path for path in own if path == key or path.startswith(f"{key}.")]
        # A source may name what lies inside a value that is one (a list): `clusters.part`.
        assert covered or key.partition(".")[0] in own or key.rpartition(".")[0] in own, key


@pytest.mark.parametrize("name", BOARDS)
def test_a_recorded_board_is_detected_with_its_reasons(name: str, tmp_path: Path) -> None:
    verdict = matching.choose(machine(BOARDS[name], tmp_path), loading.load_all()[0])
    assert verdict.board is not None and verdict.board.resolved.profile.name == name
    assert verdict.addons == ()
    assert {reason.rule for reason in verdict.board.reasons} >= {"match.arch"}
    # What it would have been without its own profile.
    assert verdict.others[0].resolved.profile.name.startswith("generic-")


@pytest.mark.parametrize("name", BOARDS)
def test_a_recorded_board_passes_its_own_check(name: str, tmp_path: Path) -> None:
    here = machine(BOARDS[name], tmp_path)
    resolved = loading.load(name)
    seen = {
        key: checking.look(one, here, tmp_path)
        for key, one in resolved.profile.accelerators.items()
    }
    findings = checking.compare(resolved, here, seen)
    assert checking.worst(findings) != "fail"
    states = {finding.what: finding.state for finding in findings}
    assert states["match"] == "pass" and states["thermal.zones"] == "pass"
    assert states.get("clusters", "pass") == "pass"
    accelerators = [state for what, state in states.items() if what.startswith("accelerators.")]
    if accelerators:
        assert "pass" in accelerators


def test_coral_is_an_addon_of_whatever_board_it_is_plugged_into(tmp_path: Path) -> None:
    board = with_files(with_files(PI_5, CORAL_USB), CORAL_M2)
    verdict = matching.choose(machine(board, tmp_path), loading.load_all()[0])
    assert verdict.board is not None
    assert verdict.board.resolved.profile.name == "raspberry-pi-5"
    assert [one.resolved.profile.name for one in verdict.addons] == ["coral-m2", "coral-usb"]
    reasons = [reason.text for one in verdict.addons for reason in one.reasons]
    assert reasons == [
        "there is a PCI device 1ac1:089a",
        "there is a USB device 18d1:9302",
    ]


def test_an_own_profile_that_extends_the_boards_is_chosen_by_itself(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    text = "name: NAME\ntitle: ours\nextends: raspberry-pi-5\nworkers: {threads: 2}\n"
    for name in ("a-learned", "raspberry-pi-5"):
        (own / f"{name}.yaml").write_text(text.replace("NAME", name))
    profiles, problems = loading.load_all([own, loading.BUILT_IN])
    verdict = matching.choose(machine(PI_5, tmp_path / "root"), profiles)
    assert problems == [] and verdict.board is not None
    # The one of the same name stands in the built-in one's place, and the other extends it.
    assert verdict.board.resolved.profile.name == "a-learned"
    (own / "a-learned.yaml").unlink()
    verdict = matching.choose(
        machine(PI_5, tmp_path / "root"), loading.load_all([own, loading.BUILT_IN])[0]
    )
    assert verdict.board is not None and verdict.board.resolved.profile.title == "ours"


def test_an_unknown_arm_board_gets_the_generic_profile(tmp_path: Path) -> None:
    board = Board("aarch64", {"proc/device-tree/compatible": "acme,thing\0acme,chip\0"}, "made up")
    verdict = matching.choose(machine(board, tmp_path), loading.load_all()[0])
    assert verdict.board is not None
    assert verdict.board.resolved.profile.name == "generic-aarch64"


def test_a_processor_that_no_profile_is_for_gets_none(tmp_path: Path) -> None:
    verdict = matching.choose(machine(Board("riscv64", {}, ""), tmp_path), loading.load_all()[0])
    assert verdict.board is None and verdict.others == ()


def test_this_machine_is_known() -> None:
    verdict = matching.choose(probe.describe(), loading.load_all()[0])
    assert verdict.board is not None


@pytest.mark.parametrize("name", NAMES)
def test_the_options_of_a_profile_are_options_of_the_backend(name: str) -> None:
    """They go to the backend as a variant's would: a wrong one would refuse every variant."""
    for choice in loading.load(name).profile.backends:
        module = importlib.import_module(BACKENDS[choice.backend].partition(":")[0])
        if choice.options:
            options.decode(module.Options, choice.options)
