"""What a target profile means for a run on another kind of machine."""

from __future__ import annotations

import pytest

from edge_runtime.errors import UsageError
from quantize import targets


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
