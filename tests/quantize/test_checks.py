"""What is wrong with data is named, and clean data raise no alarm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize import checks
from quantize.results import Activation, Clipping, Finding

Array = np.ndarray[Any, Any]


def photographs(count: int, seed: int) -> Array:
    """Pictures with a warm cast, [count, 3, 16, 16]: red above green above blue, as outdoors."""
    rng = np.random.Generator(np.random.PCG64(seed))
    light = rng.random((count, 1, 4, 4), dtype=np.float32).repeat(4, axis=2).repeat(4, axis=3)
    cast = np.array([0.9, 0.75, 0.6], dtype=np.float32) + rng.normal(0, 0.08, (count, 3))
    return np.asarray(np.clip(light * cast[:, :, None, None], 0, 1), dtype=np.float32)


def faults(found: list[Finding]) -> list[str]:
    return [one.fault for one in found]


@pytest.mark.parametrize("order", [[2, 1, 0], [1, 0, 2], [1, 2, 0]])
@pytest.mark.parametrize("is_last", [False, True])
def test_swapped_channels_are_named_with_the_order_that_would_fit(
    order: list[int], is_last: bool
) -> None:
    mine, other = photographs(40, 1)[:, order], photographs(200, 2)
    if is_last:
        mine, other = mine.transpose(0, 2, 3, 1), other.transpose(0, 2, 3, 1)
    (found,) = checks.inputs({"image": mine}, {"image": other})
    assert found.fault == checks.CHANNEL_ORDER
    assert str([order.index(channel) for channel in range(3)]) in found.text


@given(st.integers(0, 10_000), st.integers(8, 60))
@settings(max_examples=40, deadline=None)
def test_two_draws_of_the_same_pictures_raise_no_alarm(seed: int, count: int) -> None:
    found = checks.inputs(
        {"image": photographs(count, seed)}, {"image": photographs(100, seed + 10_001)}
    )
    assert found == []


def test_another_lamp_is_no_swapped_channel() -> None:
    darker = photographs(60, 3) * np.array([0.8, 0.8, 0.8], np.float32)[:, None, None]
    assert checks.inputs({"image": darker}, {"image": photographs(200, 4)}) == []


def test_grey_pictures_in_three_channels_have_no_order() -> None:
    grey = photographs(60, 5)[:, :1].repeat(3, axis=1)
    assert checks.inputs({"image": grey}, {"image": grey[:30]}) == []


@pytest.mark.parametrize("is_calibration", [True, False])
def test_pixels_of_another_scale_are_named_whichever_set_has_them(is_calibration: bool) -> None:
    mine, other = photographs(40, 1), photographs(100, 2)
    pair = (mine * 255, other) if is_calibration else (mine, other * 255)
    (found,) = checks.inputs({"image": pair[0]}, {"image": pair[1]})
    assert found.fault == checks.SCALE and "0..255" in found.text


def test_pixels_whose_mean_was_taken_off_in_one_set_only_are_named() -> None:
    mine = (photographs(40, 1) - np.float32(0.45)) / np.float32(0.25)
    (found,) = checks.inputs({"image": mine}, {"image": photographs(100, 2)})
    assert found.fault == checks.SCALE and "negative in the calibration set" in found.text


@pytest.mark.parametrize("width", [500, 1000])
def test_rows_that_are_nearly_all_zero_raise_no_alarm(width: int) -> None:
    for seed in range(10):
        rng = np.random.Generator(np.random.PCG64(seed))
        mine, other = ((rng.random((n, width)) < 0.001).astype(np.float32) for n in (200, 400))
        assert checks.inputs({"words": mine}, {"words": other}) == []
    (found,) = checks.inputs({"words": mine * 255}, {"words": other})
    assert found.fault == checks.SCALE


def recordings(count: int, seed: int, tilt: Array) -> tuple[Array, Array]:
    """Windows of a sensor of three axes, 20 of each recording, each at its own angle."""
    rng = np.random.Generator(np.random.PCG64(seed))
    angle = tilt + rng.normal(0, 0.5, (count, 3))
    windows = angle.repeat(20, axis=0)[:, :, None] + rng.normal(0, 1, (20 * count, 3, 30))
    return windows.astype(np.float32), np.arange(count).repeat(20)


def test_recordings_at_other_angles_are_no_swapped_channels() -> None:
    alike, tilted = np.zeros(3), np.array([1.0, 0.2, -1.0])
    for seed in range(10):
        (mine, ours), (other, theirs) = (recordings(12, 2 * seed + i, alike) for i in (0, 1))
        assert checks.inputs({"x": mine}, {"x": other}, (ours, theirs)) == []
    (mine, ours), (other, theirs) = recordings(12, 1, tilted), recordings(30, 2, tilted)
    (found,) = checks.inputs({"x": mine[:, ::-1]}, {"x": other}, (ours, theirs))
    assert found.fault == checks.CHANNEL_ORDER


def activation(name: str = "t", beyond: float = 0.0, **cut: float) -> Activation:
    clippings = {variant: Clipping(0.0, 1.0, share, share) for variant, share in cut.items()}
    return Activation(name, 0.0, 2.0, (1,), (1,), (0.0, 2.0), beyond, clippings)


def test_a_clipped_range_is_named_with_variant_and_tensor() -> None:
    found = checks.clipped([activation("conv", int8=0.05, other=0.0001), activation("fc")])
    assert faults(found) == [checks.CLIPPED]
    assert found[0].text.startswith("int8: ranges of 1 tensors") and "conv" in found[0].text


def test_the_remedy_for_a_clipped_range_is_one_that_its_quantizer_has() -> None:
    cut = [activation("conv", ours=0.05, nncf=0.05)]
    found = checks.clipped(cut, {"ours": "static_int8", "nncf": "nncf_int8"})
    ours, nncf = (one.text for one in found)
    assert "raise the percentile" in ours
    assert "ranges: minmax" in nncf and "percentile" not in nncf


def test_more_samples_beyond_the_calibrated_range_than_chance_explains_are_named() -> None:
    tensors = [activation("a", 0.002), activation("b", 0.08)]
    (found,) = checks.beyond(tensors, 512, 512)
    assert found.fault == checks.TRUNCATED and "b 8%" in found.text
    assert "a " not in found.text.partition("(")[2]


@given(st.integers(50, 512), st.integers(2, 512), st.integers(0, 100_000))
@settings(max_examples=60, deadline=None)
def test_ranges_of_samples_of_one_kind_raise_no_alarm(count: int, judged: int, seed: int) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    tensors = []
    for number in range(20):
        values = rng.standard_t(2, count + judged)  # heavy tails: the largest says little
        shown = values[:count]
        outside = (values[count:] > shown.max()) | (values[count:] < shown.min())
        tensors.append(activation(str(number), float(outside.mean())))
    assert checks.beyond(tensors, count, judged) == []


def test_the_chance_to_leave_a_range_is_that_of_draws_from_one_urn() -> None:
    """Which of 60 + 30 alike samples are the largest and smallest is a matter of order alone."""
    rng = np.random.Generator(np.random.PCG64(0))
    values = rng.random((20_000, 90))
    shown, new = values[:, :60], values[:, 60:]
    low, high = shown.min(axis=1, keepdims=True), shown.max(axis=1, keepdims=True)
    outside = ((new < low) | (new > high)).sum(axis=1)
    for count in (1, 2, 4):
        seen = float((outside >= count).mean())
        assert checks.leaving(count, 30, 60) == pytest.approx(seen, abs=0.01)
    assert checks.leaving(0, 30, 60) == 1 and checks.leaving(31, 30, 60) == 0


def test_a_part_of_the_classes_in_one_set_leaves_its_ranges() -> None:
    assert checks.beyond([activation("a", 0.1)], 512, 200)
    assert not checks.beyond([activation("a", 0.1)], 512, 20)  # two samples of twenty


def test_too_few_samples_are_named_with_how_often_their_range_is_left() -> None:
    (found,) = checks.few(8)
    assert found.fault == checks.TRUNCATED and "in 9" in found.text
    assert checks.few(checks.SAMPLES_MIN) == []


def test_missing_classes_are_named_only_where_chance_would_not_leave_them_out() -> None:
    everything = np.arange(1000) % 10
    (found,) = checks.missing_classes(everything[everything < 7], everything)
    assert "3 of 10" in found.text and "7, 8, 9" in found.text
    assert checks.missing_classes(everything[:20][everything[:20] != 3], everything) == []


def said(labels: Array, right: float = 0.9, classes: int = 10, seed: int = 0) -> Array:
    """Answers that are right on about so many."""
    rng = np.random.Generator(np.random.PCG64(seed))
    answers = rng.normal(0, 0.1, (len(labels), classes))
    chosen = np.where(
        rng.random(len(labels)) < right, labels, rng.integers(0, classes, len(labels))
    )
    answers[np.arange(len(labels)), chosen] += 1
    return answers


LABELS = np.arange(600) % 10


def test_labels_that_are_one_off_are_named_as_renamed() -> None:
    (found,) = checks.labels(said(LABELS), (LABELS + 1) % 10)
    assert (
        found.fault == checks.LABELS and "renamed" in found.text and "1 is answered 0" in found.text
    )


def test_shuffled_labels_are_named_as_no_better_than_guessing() -> None:
    mixed = np.random.Generator(np.random.PCG64(3)).permutation(LABELS)
    (found,) = checks.labels(said(LABELS, right=1.0), mixed[::-1])
    assert found.fault == checks.LABELS


def test_labels_that_the_model_has_no_class_for_are_named() -> None:
    (found,) = checks.labels(said(LABELS), LABELS + 1)
    assert "0 to 9" in found.text


@pytest.mark.parametrize("right", [0.3, 0.6, 0.95])
def test_right_labels_raise_no_alarm_even_of_a_poor_model(right: float) -> None:
    assert checks.labels(said(LABELS, right), LABELS) == []


def test_a_reason_names_the_faults_that_touch_the_variant_and_no_other() -> None:
    found = [
        Finding(checks.SCALE, "s"),
        Finding(checks.CLIPPED, "int8: c"),
        Finding(checks.LABELS, "l"),
    ]
    assert checks.reason(found, "int8") == "scale: s; clipped-ranges: c"
    assert checks.reason(found, "other") == "scale: s"
