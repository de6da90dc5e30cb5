"""What a target profile means for a run on another kind of machine."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from edge_runtime.errors import UsageError
from quantize import automatic, causes, targets

MODEL = Path(__file__).parents[2] / "examples/fashion_mnist/fp32.onnx"


def test_times_of_another_kind_of_processor_are_said_to_be_so() -> None:
    (said,) = targets.notes(["raspberry-pi-5"], machine="x86_64")
    assert "raspberry-pi-5 is aarch64" in said
    assert "times are of this x86_64" in said


def test_nothing_is_said_on_a_machine_of_the_target_s_kind() -> None:
    assert targets.notes(["raspberry-pi-5"], machine="aarch64") == []
    assert targets.notes(["generic-x86_64"], machine="x86_64") == []


def test_a_recipe_s_unknown_target_is_refused_with_its_place_and_the_nearest() -> None:
    with pytest.raises(UsageError) as raised:
        targets.notes(["generic-x86_64", "raspberry-pi5"])
    assert raised.value.where == "targets[1]"
    assert "raspberry-pi-5" in raised.value.remedy


def test_what_this_processor_can_do_counts_for_targets_of_its_kind_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(causes, "processor_features", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    model = MODEL
    names = {
        target: {
            one.name for one in automatic.recipe(automatic.Wish(model, "data.npz", target)).variants
        }
        for target in ("generic-x86_64", "raspberry-pi-5")
    }
    assert "bf16-openvino" in names["generic-x86_64"]
    assert "bf16-openvino" not in names["raspberry-pi-5"]
