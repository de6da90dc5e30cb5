"""Windows of real sound with the states that the network had there, for `edge-quantize`.

Law of this file: the data callable of recipe.yaml (`windows:windows`); it needs onnxruntime.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
SENTENCE = HERE.parent / "wake_word" / "okay_nabu.wav"
WINDOW, CONTEXT = 512, 64  # samples, as in stream.py
# One sentence is little sound: it is heard again at other volumes and with noise.
GAINS = (1.0, 0.5, 0.25, 0.1)
NOISES = (0.0, 0.003, 0.03)


def windows() -> tuple[dict[str, np.ndarray], None]:
    """`input` FP32 [N, 1, 576] and `state` FP32 [N, 2, 1, 128]; there are no labels."""
    with wave.open(str(SENTENCE)) as file:
        frames = file.readframes(file.getnframes())
    sound = np.frombuffer(frames, "<i2").astype(np.float32) / np.float32(32768)
    rng = np.random.Generator(np.random.PCG64(0))
    model = onnxruntime.InferenceSession(
        HERE / "silero_vad_16k.onnx", providers=["CPUExecutionProvider"]
    )
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for gain in GAINS:
        for noise in NOISES:
            heard = gain * sound + rng.normal(0, noise, len(sound))
            found += _stream(model, heard.astype(np.float32))
    inputs, states = zip(*found, strict=True)
    return {"input": np.stack(inputs), "state": np.stack(states)}, None


def _stream(
    model: onnxruntime.InferenceSession, sound: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    state = np.zeros((2, 1, 128), np.float32)
    window = np.zeros((1, CONTEXT + WINDOW), np.float32)
    found = []
    for begin in range(0, len(sound) - WINDOW + 1, WINDOW):
        window[0, :CONTEXT] = window[0, -CONTEXT:]
        window[0, CONTEXT:] = sound[begin : begin + WINDOW]
        found.append((window.copy(), state))
        _, state = model.run(["output", "stateN"], {"input": window, "state": state})
    return found
