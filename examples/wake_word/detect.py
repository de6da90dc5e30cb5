"""A wake word, streamed: `python -m examples.wake_word.detect` from the repository's root.

The model keeps what it has heard in its own variables, so the bundle says `stateful: keep`: each
request of 30 ms of sound goes on where the last one ended. frames.npz holds a recorded sentence as
the model's own features; with `pip install pymicro-features` you can make them from a microphone.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_runtime.client import Client
from examples import appliance

HERE = Path(__file__).resolve().parent
NAME = "okay-nabu"
FRAME_S = 0.030  # of sound in a request: three features, one every 10 ms


def main() -> int:
    recorded = np.load(HERE / "frames.npz")
    with appliance.folder() as directory:
        bundle = appliance.create(
            directory / "wake.bundle",
            HERE / "okay_nabu.tflite",
            *("--name", NAME),
            *("--option", "litert.stateful=keep"),
            *("--samples", samples(directory, recorded["input_audio"])),
        )
        with appliance.serving(directory, bundle) as client:
            for second_s, probability in heard(client, recorded["input_audio"]):
                print(f"okay nabu! at {second_s:.2f} s ({probability:.0%})")
                return 0
    print("nothing was heard", file=sys.stderr)
    return 1


def heard(client: Client, frames: np.ndarray) -> Iterator[tuple[float, float]]:
    """When the wake word was heard, in seconds, and how surely.

    As the model's maker has it: the mean of the last answers is over a threshold.
    """
    config = json.loads((HERE / "okay_nabu.json").read_text())["micro"]
    last: deque[float] = deque(maxlen=config["sliding_window_size"])
    for number, answer in enumerate(answers(client, frames)):
        last.append(answer / 256)  # the scale of the output: see `edge-runtime bundle inspect`
        mean = sum(last) / len(last)
        if len(last) == last.maxlen and mean > config["probability_cutoff"]:
            yield (number + 1) * FRAME_S, mean


def answers(client: Client, frames: np.ndarray) -> Iterator[int]:
    """The model's answer, 0 to 255, to each frame INT8 [3, 40] in turn."""
    for frame in frames:
        outputs = client.infer(NAME, {"input_audio": frame[np.newaxis]})
        yield int(next(iter(outputs.values())).item())


def samples(directory: Path, frames: np.ndarray) -> Path:
    """Real inputs for the goldens: from the middle of the sentence."""
    path = directory / "samples.npz"
    np.savez(path, input_audio=frames[len(frames) // 2 :])
    return path


if __name__ == "__main__":
    sys.exit(main())
