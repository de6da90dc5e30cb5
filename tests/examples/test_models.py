"""Examples that bring a model: each runs against a real daemon, as its README says."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.backends import backend
from edge_runtime.errors import EdgeError
from examples.basic_pitch import compare
from examples.silero_vad import stream
from examples.wake_word import detect


def need(*names: str) -> None:
    for name in names:
        try:
            backend(name).version()
        except EdgeError as e:
            pytest.skip(f"the backend {name} does not run: {e}")


def test_the_wake_word_is_heard_when_it_is_spoken(capfd: pytest.CaptureFixture[str]):
    need("litert")
    assert detect.main() == 0
    assert "okay nabu! at 2.1" in capfd.readouterr().out


def test_the_stream_answers_as_the_makers_own_library():
    need("litert")
    recorded = np.load(detect.HERE / "frames.npz")
    got = streamed(recorded["input_audio"], "keep")
    off = np.abs(got - recorded["answers"].astype(int))
    assert off.max() <= 24  # of 255; 11 with LiteRT 2.3.0 on x86_64
    assert np.median(off) == 0


def test_without_its_state_it_hears_nothing():
    need("litert")
    frames = np.load(detect.HERE / "frames.npz")["input_audio"][50:75]
    assert streamed(frames, "reset").max() < 128


def streamed(frames: np.ndarray, stateful: str) -> np.ndarray:
    """The answers to a stream in this process."""
    model = backend("litert").load(detect.HERE / "okay_nabu.tflite", {"stateful": stateful})
    frame = np.zeros((1, 3, 40), np.int8)
    run = model.bind({"input_audio": frame}, {"dense_1": None})
    answers = []
    for each in frames:
        frame[0] = each
        answers.append(int(run()["dense_1"].item()))
    return np.array(answers)


def test_speech_is_found_where_it_is(capfd: pytest.CaptureFixture[str]):
    need("onnxruntime")
    assert stream.main() == 0
    assert "speech from 1.02 s to 1.98 s" in capfd.readouterr().out


def test_sentences_begin_with_speech_and_end_with_a_pause():
    windows = [0, 0.9, 0.1, 0.9, 0, 0, 0, 0, 0, 0.9]
    found = [tuple(round(s / 0.032) for s in each) for each in stream.sentences(iter(windows))]
    assert found == [(1, 4), (9, 10)]


def test_three_backends_hear_the_same_chord(capfd: pytest.CaptureFixture[str]):
    need("onnxruntime", "openvino", "litert")
    assert compare.main() == 0
    assert "all agree" in capfd.readouterr().out
