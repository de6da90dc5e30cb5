"""One network on three backends: `python -m examples.basic_pitch.compare` (from the root).

The same network as an ONNX file (for onnxruntime and for OpenVINO) and as a TFLite file (for
LiteRT) becomes one bundle with three variants. A chord is played to each of them here, in process,
and to the daemon, which has a variant of its own choice; all must give the same notes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from edge_runtime import backends
from edge_runtime.bundle import archive
from examples import appliance

HERE = Path(__file__).resolve().parent
NAME = "basic-pitch"
# As nmp.onnx names them; nmp.tflite has these as its tensors' own names.
AUDIO, NOTES = "serving_default_input_2:0", "StatefulPartitionedCall:1"
RATE, WINDOW = 22_050, 43_844  # Hz; samples of one request, two seconds
LOWEST_NOTE = 21  # MIDI number of the first of 88 notes: A0
HEARD = 0.3  # mean over the window from which a note counts
CHORD = {"A4": 69, "C#5": 73, "E5": 76}
DIFFERENCE_MAX = 1e-5  # between backends


def main() -> int:
    with appliance.folder() as directory:
        bundle = pack(directory)
        given = {AUDIO: chord(list(CHORD.values()))}
        answers = in_process(bundle, given)
        first = next(iter(answers.values()))
        with appliance.serving(directory, bundle) as client:
            answers["the daemon"] = client.infer(NAME, given)
    worst = 0.0
    for name, outputs in answers.items():
        off = max(float(np.abs(outputs[key] - first[key]).max()) for key in first)
        worst = max(worst, off)
        print(f"{name:18} notes {notes(outputs[NOTES])}, at most {off:.1e} from the first")
    is_right = notes(first[NOTES]) == sorted(CHORD.values()) and worst <= DIFFERENCE_MAX
    print("all agree" if is_right else f"expected {sorted(CHORD.values())} from all, {worst:.1e}")
    return 0 if is_right else 1


def pack(directory: Path) -> Path:
    """The bundle with a variant for each backend; its goldens are of the chord."""
    np.savez(directory / "samples.npz", **{AUDIO: chord(list(CHORD.values()))})
    models = [HERE / "nmp.onnx", f"openvino={HERE / 'nmp.onnx'}", HERE / "nmp.tflite"]
    words = ["--name", NAME, "--samples", directory / "samples.npz"]
    return appliance.create(directory / "pitch.bundle", *models, *words)


def in_process(bundle: Path, given: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """What each variant answers, by its name."""
    directory = bundle.with_suffix(".directory")
    with archive.open_bundle(bundle) as opened:
        archive.extract(opened, directory)
        variants = opened.manifest.variants
    answers = {}
    for variant in variants:
        artifact = directory / "blobs" / variant.artifact.sha256
        model = backends.backend(variant.backend).load(artifact, variant.options)
        answers[variant.name] = model.run(given)
        began_s = time.perf_counter()
        model.run(given)
        print(f"{variant.name:18} {(time.perf_counter() - began_s) * 1e3:5.1f} ms")
    return answers


def chord(numbers: list[int]) -> np.ndarray:
    """Two seconds of notes by MIDI number, FP32 [1, 43844, 1]: decaying tones with overtones."""
    time_s = np.arange(WINDOW) / RATE
    sound = np.zeros(WINDOW)
    for number in numbers:
        pitch_hz = 440 * 2 ** ((number - 69) / 12)
        for overtone in range(1, 6):
            sound += np.sin(2 * np.pi * overtone * pitch_hz * time_s) / overtone**2
    sound *= np.exp(-time_s) / np.abs(sound).max()
    return sound.astype(np.float32).reshape(1, WINDOW, 1)


def notes(activations: np.ndarray) -> list[int]:
    """The MIDI numbers of the notes that sound through most of the window, of [1, 172, 88]."""
    return [int(n) + LOWEST_NOTE for n in np.flatnonzero(activations[0].mean(axis=0) > HEARD)]


if __name__ == "__main__":
    sys.exit(main())
