"""Corpus mutation fuzz of manifest, archive and ONNX reader.

Only a BundleError may come out, time and memory stay bounded. Each corpus runs in a child process
with a limit on its address space, so that growth is a failure here and not a slow machine. Seeded:
a failure names the seed and repeats.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.bundle import archive, lint, onnx_graph, source, tflite_graph
from edge_runtime.bundle import document as documents
from edge_runtime.bundle import manifest as manifests
from edge_runtime.errors import BundleError
from tests import tflite_writer
from tests.bundle.conftest import bundle_of, document, linear, linear_int8, weights

BUDGET_S = float(os.environ.get("FUZZ_BUDGET_S", "2"))  # per corpus
ROUNDS_MIN = 300  # fewer would mean that something takes far too long
GROWTH_BYTES_MAX = 512 * 1024 * 1024  # beside the libraries that are loaded before
CASE_S_MAX = 10.0

# Bytes that mean something to one of the three formats.
WORDS = (
    b"\0", b"\xff", b"\xff" * 10, b"\x7f", b"\x80", b"\x0a\x00", b"\x3a", b"0" * 11, b"77777777777",
    b"ustar", b"../", b"[", b"{", b"&a ", b"*a", b"<<: ", b"!!", b"'", b'"', b"- ", b"? ", b": ",
    b"-1", b"99999999999999999999", b"1e400", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\n", b"\t",
)  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to eight random edits: flips, cuts, repeats, moves, words."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        place = rng.randrange(len(out) + 1)
        size = rng.choice((1, 1, 2, 8, 64, 512))
        match rng.randrange(6):
            case 0 if place < len(out):
                out[place] ^= 1 << rng.randrange(8)
            case 1:
                del out[place : place + size]
            case 2:
                out[place:place] = out[place : place + size] * rng.choice((1, 2, 50))
            case 3:
                out[place:place] = rng.choice(WORDS)
            case 4:
                out[place : place + size] = rng.randbytes(size)
            case _:
                other = rng.randrange(len(out) + 1)
                out[place : place + size] = out[other : other + size]
    return bytes(out)


def fuzz_manifest(data: bytes) -> None:
    manifest = manifests.parse(data)
    assert manifests.parse(manifests.dump(manifest)) == manifest


def fuzz_archive(data: bytes) -> None:
    with archive.open_bundle(io.BytesIO(data)) as bundle:
        bundle.verify()
        lint.lint(bundle.manifest, bundle.blob)


def fuzz_onnx(data: bytes) -> None:
    onnx_graph.read(source.from_bytes(data))


def fuzz_tflite(data: bytes) -> None:
    tflite_graph.read(source.from_bytes(data))


def fuzz_lint(data: bytes) -> None:
    """Findings, never an exception."""
    lint.lint_artifact(source.from_bytes(data), "model")


def _BytesFile(data: bytes):
    import io

    return io.BytesIO(data)


def archive_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.bundle"
        archive.pack(bundle_of(linear().SerializeToString()), path)
        return path.read_bytes()


REFERENCE = json.dumps({"format": "edge-runtime-reference", "inputs": [], "outputs": []}).encode()

CORPORA: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "manifest": (
        fuzz_manifest,
        lambda: [documents.dump(document(card={"a": [1, {"b": None}]})), b'{"schema": 1}'],
    ),
    "archive": (fuzz_archive, lambda: [archive_bytes()]),
    "onnx": (
        fuzz_onnx,
        lambda: [linear().SerializeToString(), linear_int8().SerializeToString()],
    ),
    "tflite": (
        fuzz_tflite,
        lambda: [tflite_writer.linear(weights()), tflite_writer.counter()],
    ),
    "lint": (
        fuzz_lint,
        lambda: [linear_int8().SerializeToString(), REFERENCE, tflite_writer.compiled()],
    ),
}


def run_corpus(name: str, seed: int) -> int:
    """Fuzz one corpus until its time is over; the number of rounds."""
    target, seeds = CORPORA[name]
    corpus = seeds()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + GROWTH_BYTES_MAX
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    rng = random.Random(seed)
    end = time.monotonic() + BUDGET_S
    rounds = 0
    while time.monotonic() < end:
        data = mutate(rng.choice(corpus), rng)
        begin = time.monotonic()
        try:
            target(data)
        except BundleError as error:
            assert str(error)
        assert time.monotonic() - begin < CASE_S_MAX, (seed, rounds)
        if len(data) < 20_000 and rng.random() < 0.01:
            corpus.append(data)  # mutants of mutants reach further
        rounds += 1
    return rounds


@pytest.mark.parametrize("name", CORPORA)
def test_mutated_input_gives_an_error_of_ours_and_no_growth(name):
    child = subprocess.run(
        [sys.executable, "-m", "tests.bundle.test_fuzz", name, "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    assert int(child.stdout) > ROUNDS_MIN


def test_the_fuzz_notices_a_crash(monkeypatch):
    """The harness itself: an exception that is not ours comes out of it."""

    def broken(data: bytes) -> None:
        raise ValueError("not ours")

    monkeypatch.setitem(CORPORA, "broken", (broken, lambda: [b"x"]))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(ValueError, match="not ours"):
        run_corpus("broken", 1)


if __name__ == "__main__":
    print(run_corpus(sys.argv[1], int(sys.argv[2])))
