"""Who is speaking when: `python -m examples.silero_vad.stream [WAV]` from the repository's root.

The network is an LSTM whose state the client passes along: each request has 32 ms of sound and the
state that the last answer gave. So any number of streams share one model, and a worker that is
swapped or restarted in the middle of a sentence costs nothing.
"""

from __future__ import annotations

import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_runtime.client import Client
from examples import appliance

HERE = Path(__file__).resolve().parent
NAME = "silero-vad"
SENTENCE = HERE.parent / "wake_word" / "okay_nabu.wav"
RATE = 16_000  # Hz
WINDOW, CONTEXT = 512, 64  # samples of a request: new ones, and the end of the window before
SPEECH = 0.5  # probability from which it counts as speech; its maker's default
PAUSE_WINDOWS = 4  # as many windows of silence (0.13 s) end a sentence


def main(path: Path = SENTENCE) -> int:
    samples = read(path)
    with appliance.folder() as directory:
        bundle = appliance.create(
            directory / "vad.bundle", HERE / "silero_vad_16k.onnx", "--name", NAME
        )
        with appliance.serving(directory, bundle) as client:
            spoken = list(sentences(probabilities(client, samples)))
    for begin_s, end_s in spoken:
        print(f"speech from {begin_s:.2f} s to {end_s:.2f} s")
    print(f"{len(spoken)} sentences in {len(samples) / RATE:.1f} s of sound")
    return 0 if spoken else 1


def read(path: Path) -> np.ndarray:
    """Sound as FP32 [samples], -1 to 1; the file must be 16 kHz, mono, 16 bits."""
    with wave.open(str(path)) as file:
        kind = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if kind != (RATE, 1, 2):
            raise SystemExit(f"{path}: is {kind}; expected 16000 Hz, 1 channel, 2 bytes")
        data = file.readframes(file.getnframes())
    return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)


def probabilities(client: Client, samples: np.ndarray) -> Iterator[float]:
    """That there is speech, for each window of 32 ms."""
    state = np.zeros((2, 1, 128), np.float32)
    window = np.zeros((1, CONTEXT + WINDOW), np.float32)
    for begin in range(0, len(samples) - WINDOW + 1, WINDOW):
        window[0, :CONTEXT] = window[0, -CONTEXT:]
        window[0, CONTEXT:] = samples[begin : begin + WINDOW]
        outputs = client.infer(NAME, {"input": window, "state": state})
        state = outputs["stateN"]
        yield float(outputs["output"].item())


def sentences(windows: Iterator[float]) -> Iterator[tuple[float, float]]:
    """Begin and end of speech, in seconds."""
    begin, silent, number = None, 0, -1
    for number, probability in enumerate(windows):
        silent = 0 if probability >= SPEECH else silent + 1
        if begin is None and not silent:
            begin = number
        elif begin is not None and silent == PAUSE_WINDOWS:
            yield _seconds(begin), _seconds(number + 1 - PAUSE_WINDOWS)
            begin = None
    if begin is not None:
        yield _seconds(begin), _seconds(number + 1)


def _seconds(window: int) -> float:
    return window * WINDOW / RATE


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
