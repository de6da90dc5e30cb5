"""What a ladder may say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import yaml

from device_profiles.ladder import Ladder, Step, Zone, cores
from edge_runtime.config import parse
from edge_runtime.errors import UsageError

GOOD = {
    "zones": [{"type": "cpu-thermal"}],
    "steps": [
        {"enter_c": 70, "run_share": 0.5},
        {"enter_c": 80, "leave_c": 72, "cpus": "0-1", "refuse_priority_below": 5},
    ],
}


def test_a_ladder_is_read_as_it_is_written():
    ladder = msgspec.convert(GOOD, Ladder)
    assert ladder.zones == (Zone("cpu-thermal"),)
    assert [step.left_below_c for step in ladder.steps] == [65.0, 72.0]


def test_a_ladder_without_anything_is_legal():
    assert Ladder().steps == ()


@pytest.mark.parametrize(
    ("step", "word"),
    [
        ({"enter_c": 70}, "gives nothing up"),
        ({"enter_c": 70, "leave_c": 69, "run_share": 0.5}, "jitter"),
        ({"enter_c": 700, "run_share": 0.5}, "120"),
        ({"enter_c": 70, "run_share": 0}, "0.01"),
        ({"enter_c": 70, "cpus": "all"}, "matching regex"),
        ({"enter_c": 70, "cpus": "0,3-1"}, "goes downwards"),
        ({"enter_c": 70, "variant": "faster"}, "enum"),
        ({"enter_c": 70, "rate": 0.5}, "unknown field"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(step, word):
    with pytest.raises(msgspec.ValidationError, match=word):
        msgspec.convert(step, Step)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"steps": GOOD["steps"][::-1]}, "hotter downwards"),
        ({"zones": []}, "without a sensor"),
        (
            {
                "steps": [
                    {"enter_c": 70, "run_share": 0.5},
                    {"enter_c": 80, "leave_c": 60, "run_share": 0.2},
                ]
            },
            "hotter downwards",
        ),
    ],
)
def test_a_ladder_whose_steps_do_not_fit_is_refused(change, word):
    with pytest.raises(msgspec.ValidationError, match=word):
        msgspec.convert(GOOD | change, Ladder)


def test_the_example_of_the_manual_is_a_configuration():
    text = (Path(__file__).parents[2] / "docs" / "governor.md").read_text()
    example = text.partition("```yaml\n")[2].partition("```")[0]
    config = parse(yaml.safe_load(example), "docs/governor.md")
    assert config.governor.ladder is not None
    assert [step.cpus for step in config.governor.ladder.steps] == ["", "0-1", ""]


def test_a_wrong_ladder_is_refused_with_its_key():
    document = {"governor": {"ladder": GOOD | {"steps": [{"enter_c": 70, "runshare": 0.5}]}}}
    with pytest.raises(UsageError, match=r"governor\.ladder\.steps\[0\].*did you mean 'run_share'"):
        parse(document, "config.yaml")


def test_cores_are_what_a_cpuset_names():
    assert cores("0-1,3") == {0, 1, 3}
    assert cores("") == frozenset()
    with pytest.raises(ValueError, match="list of cores"):
        cores("0-x")
