"""How okay_nabu.wav and frames.npz were made: a synthetic voice, and the model maker's features.

    apt-get install espeak-ng
    pip install pymicro-wakeword==2.5.0 && python record.py

The answers in frames.npz are those of the library inside that package, not of edge-runtime.
"""

from __future__ import annotations

import subprocess
import wave
from pathlib import Path

import numpy as np
from pymicro_wakeword import MicroWakeWord, MicroWakeWordFeatures, Model

HERE = Path(__file__).resolve().parent
RATE = 16_000  # Hz, of the model
SAY = ["espeak-ng", "-v", "en-us+m3", "-s", "130", "--stdout", "okay nahboo"]


def main() -> None:
    spoken = subprocess.run(SAY, capture_output=True, check=True).stdout
    with (HERE / "spoken.tmp").open("wb") as file:
        file.write(spoken)
    with wave.open(str(HERE / "spoken.tmp")) as file:
        rate = file.getframerate()
        samples = np.frombuffer(spoken[44:], "<i2").astype(np.float64)
    (HERE / "spoken.tmp").unlink()
    count = int(len(samples) * RATE / rate)
    voice = np.interp(np.arange(count) * rate / RATE, np.arange(len(samples)), samples)
    silence = np.zeros(RATE)
    audio = np.concatenate([silence, voice, silence]).astype("<i2")
    with wave.open(str(HERE / "okay_nabu.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(audio.tobytes())
    frames, answers = listen(audio.tobytes())
    np.savez_compressed(HERE / "frames.npz", input_audio=frames, answers=answers)
    print(f"{len(frames)} frames, loudest answer {answers.max()}")


def listen(pcm: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Frames INT8 [n, 3, 40] as the model takes them, and its maker's answers UINT8 [n]."""
    model = MicroWakeWord.from_builtin(Model.OKAY_NABU)
    model.sliding_window_size = 1
    model._probabilities = type(model._probabilities)(maxlen=1)  # each answer, not their mean
    frames, answers, pending = [], [], []
    for features in MicroWakeWordFeatures().process_streaming(pcm):
        pending.append(features)
        probability = model.process_streaming_prob(features)
        if len(pending) == model.stride:
            real = np.concatenate(pending, axis=1)
            stored = np.round(real / model.input_scale + model.input_zero_point)
            frames.append(stored.astype(np.int8)[0])
            answers.append(round(probability / model.output_scale))
            pending = []
    return np.stack(frames), np.array(answers, np.uint8)


if __name__ == "__main__":
    main()
