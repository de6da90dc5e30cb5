"""The main job in a minute: `make demo`, or `python -m examples.demo`.

Packs the Fashion-MNIST model of this repository as two bundles (fp32, then int8), starts the
daemon, classifies real test images, switches precision under an open connection, kills the worker
and watches it return, rolls back, stops. Every step is checked; the exit code is 0 only if all of
it held.

It uses the daemon as anyone would: the `edge-runtime` command and `edge_runtime.client`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.client import Client
from edge_runtime.client import images as pictures

HERE = Path(__file__).resolve().parent / "fashion_mnist"
NAME = "fashion-mnist"
COMMAND = [sys.executable, "-m", "edge_runtime"]
STEP_S_MAX = 30.0  # no step of the demo takes longer on a Raspberry Pi 4


class DemoError(Exception):
    """A step did not do what it should."""


def main() -> int:
    """Run the demo; 0 if everything held."""
    began_s = time.monotonic()
    # A short path: a unix socket's name has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="edge-demo-") as name:
        directory = Path(name)
        try:
            show(directory)
        except DemoError as error:
            print(f"\nthe demo failed: {error}", file=sys.stderr)
            return 1
    print(f"\nAll of it held, in {time.monotonic() - began_s:.0f} s.")
    return 0


def show(directory: Path) -> None:
    """The steps, in order."""
    run_dir = directory / "run"
    step("Pack two bundles: the same network in float32 and in int8")
    pack(directory, "fp32", 1)
    pack(directory, "int8", 2)
    step("Start the daemon (no root, no broker, defaults for everything)")
    with daemon(directory, run_dir) as process:
        edge = Edge(run_dir)
        said = edge("install", directory / "fp32.bundle", "--activate")
        check(said["activated"], "version 1 was not activated")
        print(f"   installed and serving: {NAME}@{said['version']} ({said['variant']})")
        with Client(str(run_dir / "infer.sock"), timeout_s=STEP_S_MAX) as client:
            step("Classify real test images, one of each class, first come, no picking")
            images = real_images(client.metadata(NAME))
            fp32_right = classify(client, images)
            step("Switch to int8 while a client is connected")
            edge("install", directory / "int8.bundle")
            said = edge("activate", f"{NAME}@2")
            print(
                f"   {said['connections_moved']} connection moved in {said['swap_ms']:.1f} ms;"
                " the client noticed nothing"
            )
            int8_right = classify(client, images)
            check(abs(int8_right - fp32_right) <= 1, "int8 answers differ from fp32")
            step("Kill the worker (kill -9) and ask again on the same client")
            worker = edge("ps")["workers"][0]["pid"]
            os.kill(worker, signal.SIGKILL)
            began_s = time.monotonic()
            client.infer(NAME, images[0].inputs)
            print(f"   answered again after {(time.monotonic() - began_s) * 1e3:.0f} ms")
            state = wait_for(lambda: ready(edge), "the worker did not come back")
            check(state["workers"][0]["pid"] != worker, "the dead worker is still listed")
            for event in edge("why", NAME)["history"][-2:]:
                print(f"   {event['message']}")
            step("Roll back")
            said = edge("rollback", NAME)
            check(said["version"] == 1, f"version {said['version']} serves after the rollback")
            classify(client, images[:2])
            print()
            print(edge.text("models"))
        step("Stop")
        process.send_signal(signal.SIGTERM)
        check(process.wait(STEP_S_MAX) == 0, f"the daemon exited with {process.returncode}")
        print("   the daemon stopped cleanly")


# --- pieces ---------------------------------------------------------------------------------------


class Edge:
    """The `edge-runtime` command against one daemon."""

    def __init__(self, run_dir: Path) -> None:
        self._command = [*COMMAND, "--run-dir", str(run_dir)]

    def __call__(self, *arguments: object) -> dict[str, Any]:
        """Run a command with --json; its answer."""
        answer: dict[str, Any] = json.loads(self._run(*arguments, "--json"))
        return answer

    def text(self, *arguments: object) -> str:
        """What a person sees."""
        return self._run(*arguments).rstrip()

    def _run(self, *arguments: object) -> str:
        command = [*self._command, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=STEP_S_MAX, check=False
        )
        check(done.returncode == 0, f"{' '.join(command[3:])}: {done.stdout}{done.stderr}")
        return done.stdout


class Image:
    """A test image as the model takes it, and the class it is known to be."""

    def __init__(self, path: Path, inputs: dict[str, Any], labels: list[str]) -> None:
        self.path = path
        self.inputs = inputs
        name = path.stem.rsplit("-", 1)[0]
        self.truth = next(
            label for label in labels if label.lower().replace("/", "-").replace(" ", "-") == name
        )


def pack(directory: Path, precision: str, version: int) -> None:
    """`edge-runtime bundle create` for one precision; goldens are recorded from real images."""
    out = directory / f"{precision}.bundle"
    arguments = ["bundle", "create", HERE / f"{precision}.onnx", "--name", NAME]
    arguments += ["--version", version, "--label", f"1.0-{precision}"]
    arguments += ["--samples", samples(directory), "--goldens", 4]
    arguments += ["--labels", HERE / "labels.txt", "--activation", "softmax"]
    arguments += ["--preprocess", "width=28", "height=28", "color=L", "-o", out]
    Edge(directory)(*arguments)
    print(f"   {out.name}: {out.stat().st_size / 1024:.0f} KiB, 4 goldens")


def samples(directory: Path) -> Path:
    """Real images as the inputs of goldens."""
    path = directory / "samples.npz"
    if not path.exists():
        from PIL import Image as Picture

        pixels = [np.asarray(Picture.open(file)) for file in sorted(HERE.glob("images/*.png"))]
        array = np.stack(pixels).astype(np.float32)[:, np.newaxis] / np.float32(255)
        np.savez(path, input=array)
    return path


@contextmanager
def daemon(directory: Path, run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon as a child; killed if the demo fails."""
    log = (directory / "daemon.log").open("wb")
    command = [*COMMAND, "serve", "--state-dir", str(directory / "state")]
    process = subprocess.Popen([*command, "--run-dir", str(run_dir)], stderr=log)
    try:
        wait_for((run_dir / "control.sock").exists, "the daemon did not start")
        yield process
    except BaseException:
        print((directory / "daemon.log").read_text(), file=sys.stderr)
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        log.close()


def real_images(metadata: dict[str, Any]) -> list[Image]:
    """The test images of the repository, pre-processed as the model's metadata says."""
    name, preprocess = pictures.preprocess_of(metadata)
    labels = list(pictures.postprocess_of(metadata).labels)
    spec = metadata["inputs"][0]
    return [
        Image(
            path, {name: pictures.load(path, preprocess, spec["datatype"], spec["shape"])}, labels
        )
        for path in sorted(HERE.glob("images/*.png"))
    ]


def classify(client: Client, images: list[Image]) -> int:
    """Print label, confidence and time of each image; how many are right."""
    postprocess = pictures.postprocess_of(client.metadata(NAME))
    client.infer(NAME, images[0].inputs)  # the first answer on a connection includes its set-up
    right = 0
    for image in images:
        began_ns = time.perf_counter_ns()
        result = client.infer_result(NAME, image.inputs)
        took_us = (time.perf_counter_ns() - began_ns) / 1e3
        best = pictures.classify(next(iter(result.outputs.values())), postprocess)[0]
        right += best.label == image.truth
        verdict = "" if best.label == image.truth else f"   (is: {image.truth})"
        name = image.path.name
        print(f"   {name:26} {best.label:12} {best.confidence:6.1%} {took_us:7.0f} us{verdict}")
    print(f"   {right} of {len(images)} right")
    check(right >= len(images) - 2, "too many wrong answers")
    return right


def ready(edge: Edge) -> dict[str, Any] | None:
    """What `ps` says, once a worker serves."""
    state = edge("ps")
    active = [worker for worker in state["workers"] if worker["state"] == "active"]
    return state if active else None


def wait_for(found: Callable[[], Any], complaint: str) -> Any:
    """Ask until the answer is true; DemoError when it does not become so in time."""
    end_s = time.monotonic() + STEP_S_MAX
    while time.monotonic() < end_s:
        answer = found()
        if answer:
            return answer
        time.sleep(0.02)
    raise DemoError(complaint)


def step(text: str) -> None:
    """Announce a step."""
    print(f"\n== {text}", flush=True)


def check(held: object, complaint: str) -> None:
    """DemoError unless it held."""
    if not held:
        raise DemoError(complaint)


if __name__ == "__main__":
    sys.exit(main())
