"""Reading profiles: inheritance, origins, and errors that name file, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_profiles import loading
from device_profiles.loading import Resolved
from device_profiles.schema import ProfileError

PARENT = """
name: parent
title: a board
match: {compatible: [acme,one]}
backends: [{backend: litert}, {backend: onnxruntime}]
workers: {cpuset: 0-3, runners: 2}
memory: {budget_bytes: 512 MiB}
accelerators:
  npu: {title: NPU, device_class: npu, nodes: [/dev/npu0]}
sources: {match: a data sheet, workers: "choice: it is small", accelerators: a driver}
"""
CHILD = """
name: child
title: the same with a fan
extends: parent
workers: {cpuset: 4-7}
accelerators: {npu: {exclusive: true}}
sources: {workers.cpuset: "choice: measured"}
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "parent.yaml").write_text(PARENT)
    (tmp_path / "child.yaml").write_text(CHILD)
    return tmp_path


def load(text: str, tmp_path: Path, *directories: Path) -> Resolved:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return loading.load(str(path), directories)


def error(text: str, tmp_path: Path, *directories: Path) -> ProfileError:
    with pytest.raises(ProfileError) as caught:
        load(text, tmp_path, *directories)
    return caught.value


def test_a_child_keeps_what_it_does_not_override(here: Path) -> None:
    child = loading.load("child", [here]).profile
    assert child.title == "the same with a fan"
    assert child.workers.cpuset == "4-7" and child.workers.runners == 2
    assert [one.backend for one in child.backends] == ["litert", "onnxruntime"]
    assert child.accelerators["npu"].exclusive and child.accelerators["npu"].nodes == ("/dev/npu0",)
    assert child.memory.budget_bytes == 512 << 20


def test_every_value_knows_the_file_and_the_source_that_it_came_from(here: Path) -> None:
    child = loading.load("child", [here])
    parent_file, child_file = str(here / "parent.yaml"), str(here / "child.yaml")
    assert child.files == (child_file, parent_file)
    assert child.origins["workers.cpuset"] == child_file
    assert child.origins["workers.runners"] == parent_file
    assert child.origins["accelerators.npu.nodes"] == parent_file
    assert child.origins["accelerators.npu.exclusive"] == child_file
    assert child.source("workers.cpuset") == "choice: measured"
    assert child.source("workers.runners") == "choice: it is small"
    # The parent's source says nothing about what the child wrote.
    assert child.source("accelerators.npu.exclusive") == ""


def test_null_takes_an_inherited_key_away(here: Path) -> None:
    text = "name: mine\ntitle: t\nextends: parent\naccelerators: {npu: null}\nworkers: null\n"
    mine = load(text, here, here)
    assert mine.profile.accelerators == {} and mine.profile.workers.cpuset is None
    assert not any(path.startswith(("accelerators", "workers")) for path in mine.origins)


def test_an_own_file_may_extend_the_built_in_one_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "raspberry-pi-5.yaml").write_text(
        "name: raspberry-pi-5\ntitle: ours\nextends: raspberry-pi-5\nworkers: {threads: 3}\n"
    )
    mine = loading.load("raspberry-pi-5", [tmp_path, loading.BUILT_IN])
    assert mine.profile.workers.threads == 3
    assert mine.profile.match.compatible[0] == "raspberrypi,5-model-b"
    assert mine.files[1:] == ("built in: raspberry-pi-5.yaml", "built in: generic-aarch64.yaml")


def test_a_circle_is_an_error_not_a_hang(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\ntitle: t\nextends: b\n")
    (tmp_path / "b.yaml").write_text("name: b\ntitle: t\nextends: a\n")
    with pytest.raises(ProfileError, match="no profile 'a'"):
        loading.load("a", [tmp_path])
    (tmp_path / "c.yaml").write_text("name: c\ntitle: t\nextends: ./c.yaml\n")
    with pytest.raises(ProfileError, match="extends itself"):
        loading.load("c", [tmp_path])


@pytest.mark.parametrize(
    ("line", "where", "said"),
    [
        ("worker: {cpuset: 0-1}", "worker", "did you mean 'workers'?"),
        ("workers: {cpusett: 0-1}", "workers.cpusett", "did you mean 'cpuset'?"),
        ("accelerators: {npu: {titel: x}}", "accelerators.npu.titel", "did you mean 'title'?"),
        (
            "backends: [{backend: a, device: cpu}]",
            "backends[0].device",
            "did you mean 'device_class'?",
        ),
        ("thermal: {steps: [{enter: 80}]}", "thermal.steps[0].enter", "did you mean 'enter_c'?"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_one(
    tmp_path: Path, line: str, where: str, said: str
) -> None:
    caught = error(f"name: mine\ntitle: t\n{line}\n", tmp_path)
    assert caught.where == f"{tmp_path}/mine.yaml: {where}"
    assert caught.remedy == said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("workers: {cpuset: two}", "wrong value"),
        ("workers: {threads: 0}", "wrong value"),
        ("memory: {share: 1.5}", "wrong value"),
        ("memory: {budget_bytes: 12 apples}", "wrong value '12 apples'"),
        ("backends: [{backend: a, versions: newest}]", "wrong value"),
        ("backends: [{backend: a, accelerator: npu}]", "does not have"),
        ("match: {usb: [18D1-9302]}", "wrong value"),
        ("name: again", "given twice"),
        ("kind: addon\nmemory: {share: 0.5}", "no say in this"),
        ("1: 2", "is not text"),
        ("[", "mine.yaml"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_file(
    tmp_path: Path, line: str, said: str
) -> None:
    caught = error(f"name: mine\ntitle: t\n{line}\n", tmp_path)
    assert "mine.yaml" in caught.where
    assert said in f"{caught.message} {caught.where}"


def test_a_missing_profile_names_the_nearest_one() -> None:
    with pytest.raises(ProfileError) as caught:
        loading.load("rasberry-pi-5")
    assert caught.value.remedy == "did you mean 'raspberry-pi-5'?"


def test_one_bad_file_does_not_hide_the_others(here: Path) -> None:
    (here / "bad.yaml").write_text("name: [\n")
    good, bad = loading.load_all([here])
    assert [one.profile.name for one in good] == ["child", "parent"]
    assert "bad.yaml" in bad[0].where


def test_an_addon_brings_its_accelerator_and_its_backends_first() -> None:
    board, coral = loading.load("raspberry-pi-5"), loading.load("coral-usb")
    whole = loading.compose(board, [coral])
    assert whole.profile.backends[0].device_class == "edgetpu"
    assert whole.profile.backends[1:] == board.profile.backends
    assert whole.profile.accelerators["edgetpu-usb"].exclusive
    assert whole.profile.match == board.profile.match
    assert "edgetpu-accelerator.rules" in whole.source("accelerators.edgetpu-usb.group")
    assert whole.origins["accelerators.edgetpu-usb.exclusive"] == "built in: coral-usb.yaml"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_profile_or_a_profile_error(text: str) -> None:
    try:
        loading.parse(loading._yaml(text.encode("utf-8", "replace"), "here", trusted=False), "here")
    except ProfileError as caught:
        assert caught.where.startswith("here")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
_KEYS = st.sampled_from(
    [
        "name",
        "title",
        "match",
        "workers",
        "memory",
        "accelerators",
        "thermal",
        "backends",
        "extends",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_KEYS, _JSON))
def test_any_document_is_a_profile_or_a_profile_error(document: dict[str, object]) -> None:
    try:
        loading.parse(document, "here")
    except ProfileError as caught:
        assert caught.where.startswith("here")
