"""Sound to compress the network with: `python -m examples.basic_pitch.chords [FOLDER]`.

Writes chords.npz (100 windows that judge) and calibration.npz (60 that calibrate), `x` FP32
[windows, 43844, 1]: one to four notes with overtones, each struck at its own moment, and noise.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

RATE, WINDOW = 22_050, 43_844  # Hz; samples of a window, two seconds
NOTES = np.arange(45, 85)  # MIDI numbers: A2 to C6
OVERTONES = 5


def window(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Sound [43844, 1]."""
    time_s = np.arange(WINDOW) / RATE
    sound = np.zeros(WINDOW)
    for note in rng.choice(NOTES, size=rng.integers(1, 5), replace=False):
        since_s = np.maximum(time_s - rng.uniform(0, 1), 0)
        fading = np.exp(-since_s * rng.uniform(0.5, 3)) * (since_s > 0)
        tone_hz = 440 * 2 ** ((note - 69) / 12)
        for part in range(1, OVERTONES + 1):
            sound += fading * np.sin(2 * np.pi * tone_hz * part * since_s) / part**1.3
    sound *= rng.uniform(0.1, 0.5) / np.abs(sound).max()
    sound += rng.normal(size=WINDOW) * rng.uniform(0, 0.003)
    return sound.astype(np.float32)[:, None]


def main(folder: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    for name, count in (("chords", 100), ("calibration", 60)):
        np.savez(folder / f"{name}.npz", x=np.stack([window(rng) for _ in range(count)]))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
