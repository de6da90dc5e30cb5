"""What is kept between runs is named by all that made it, our own code too."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantize import scratch


@pytest.fixture
def code(tmp_path: Path) -> Path:
    for name in ("passes/one.py", "cli/show.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x = 1\n")
    return tmp_path


def test_other_code_is_another_key_and_other_words_are_not(code: Path) -> None:
    before = scratch.code_sha256([code])
    (code / "cli" / "show.py").write_text("x = 2\n")
    assert scratch.code_sha256([code]) == before
    (code / "passes" / "one.py").write_text("x = 2\n")
    changed = scratch.code_sha256([code])
    (code / "passes" / "one.py").rename(code / "passes" / "two.py")
    assert len({before, changed, scratch.code_sha256([code])}) == 3


def test_what_other_code_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, made = scratch.Scratch(tmp_path), []

    def make(draft: Path) -> None:
        made.append(draft)
        draft.write_text("")

    for _ in range(2):
        kept.made(scratch.key("a pass"), ".onnx", make)
    assert len(made) == 1
    monkeypatch.setattr(scratch, "_code", lambda: "other")
    kept.made(scratch.key("a pass"), ".onnx", make)
    assert len(made) == 2


def test_the_code_that_quantizes_and_the_backends_are_in_the_key() -> None:
    quantize, backends = scratch.CODE
    assert (quantize / "passes" / "integer.py").exists() and (backends / "onnxruntime.py").exists()
