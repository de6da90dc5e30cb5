"""`profile learn`: what follows from times, and a real sitting with a real library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from device_profiles import cards, learning, loading
from device_profiles.learning import Measured
from edge_runtime.backends.onnxruntime import OnnxRuntime
from edge_runtime.bundle import archive
from edge_runtime.bundle.manifest import (
    Blob,
    Golden,
    GoldenTensor,
    Manifest,
    Variant,
)
from edge_runtime.bundle.source import from_bytes
from edge_runtime.cli import learning as driver
from edge_runtime.cli import main
from edge_runtime.tensors import TensorSpec
from tests.daemon.world import bundle as reference_bundle
from tests.daemon.world import fault
from tests.profiles import hardware

EXAMPLES = Path(__file__).parents[2] / "examples" / "fashion_mnist"


def took(
    threads: int | None,
    *run_ms: float,
    variant: str = "v",
    backend: str = "onnxruntime",
    **more: Any,
) -> Measured:
    run_ns = tuple(round(one * 1e6) for one in run_ms)
    return Measured(variant, backend, "cpu", threads, run_ns, version="1", device="CPU", **more)


# --- what follows from times ----------------------------------------------------------------------


def test_more_threads_are_taken_only_where_each_step_pays() -> None:
    best = learning.fewest_threads
    assert best([took(1, 10.0), took(2, 5.4), took(4, 5.0)]).threads == 2
    assert best([took(1, 10.0), took(2, 9.5), took(4, 9.2)]).threads == 1
    assert best([took(2, 3.0), took(1, 10.0), took(4, 1.6)]).threads == 4
    # Two do not pay, four do: what pays over the best so far counts.
    assert best([took(1, 10.0), took(2, 9.5), took(4, 4.0)]).threads == 4


def test_backends_are_ordered_by_their_quickest_variant_and_failures_are_left_out() -> None:
    found = learning.found(
        [
            took(1, 5.0, variant="fp32"),
            took(1, 2.0, variant="int8"),
            took(1, 1.0, backend="litert", variant="a"),
            took(1, backend="openvino", variant="b", error="died"),
        ]
    )
    assert [(one.backend, one.best.variant) for one in found] == [
        ("litert", "a"),
        ("onnxruntime", "int8"),
    ]


@pytest.mark.parametrize(
    ("cpus", "tried"),
    [(1, [1]), (4, [1, 2, 3, 4]), (12, [1, 2, 4, 8, 12]), (16, [1, 2, 4, 8, 16])],
)
def test_a_large_machine_is_not_tried_core_by_core(cpus: int, tried: list[int]) -> None:
    assert learning.thread_counts(cpus) == tried


def test_what_is_learned_extends_the_board_and_cites_its_figures(tmp_path: Path) -> None:
    base = loading.load("jetson-orin-nano")
    document = learning.document(
        "mine",
        base,
        [took(1, 8.0, 8.1), took(2, 4.0, 4.2), took(None, variant="x", error="no such wheel")],
        model="m@1",
        available_bytes=1000 << 20,
        date="2026-11-23",
        where="a board",
    )
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    mine = loading.load(str(path))
    assert mine.profile.extends == "jetson-orin-nano" and mine.profile.accelerators
    first = mine.profile.backends[0]
    assert (first.backend, first.device_class, first.options) == (
        "onnxruntime",
        "cpu",
        {"threads": 2},
    )
    # What was not measured keeps its place behind, with what the board says of it.
    assert mine.profile.backends[1].accelerator == "gpu"
    assert mine.profile.memory.budget_bytes == 800 << 20
    assert mine.source("backends") == (
        "measured 2026-11-23 on a board with m@1: "
        "onnxruntime 1 v 8.05 ms with 1, 4.1 ms with 2 threads"
    )
    assert mine.profile.unknown["backends.onnxruntime.x"] == "no such wheel"


def test_nobody_always_runs_after_the_same_neighbour() -> None:
    runners: Any = ["a", "b", "c"]
    rounds = ["".join(driver._turns(runners, number)) for number in range(4)]
    assert rounds == ["abc", "acb", "cab", "cba"]


# --- a real sitting -------------------------------------------------------------------------------


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """The int8 example for onnxruntime, with a golden; and a variant that gives a wrong answer."""
    artifact = (EXAMPLES / "int8.onnx").read_bytes()
    model = OnnxRuntime().load(EXAMPLES / "int8.onnx", {})
    x = np.zeros((1, 1, 28, 28), np.float32)
    y = model.run({"input": x})["logits"]
    blobs = {}

    def blob(data: bytes, name: str = "") -> Blob:
        import hashlib

        sha256 = hashlib.sha256(data).hexdigest()
        blobs[sha256] = from_bytes(data, sha256)
        return Blob(sha256, len(data), name)

    def tensor(name: str, array: Any) -> GoldenTensor:
        return GoldenTensor(name, "FP32", array.shape, blob(array.tobytes()))

    wrong = json.dumps(
        {
            "format": "edge-runtime-reference",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 1, 28, 28]}],
            "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
            "nodes": [
                {"op": "flatten", "inputs": ["input"], "output": "flat"},
                {
                    "op": "matmul",
                    "inputs": ["flat"],
                    "output": "logits",
                    "weights": {"seed": 0, "shape": [784, 10]},
                    "bias": {"seed": 1, "shape": [10]},
                },
            ],
        }
    ).encode()
    manifest = Manifest(
        schema=1,
        name="fashion",
        version=1,
        inputs=(TensorSpec("input", "FP32", (-1, 1, 28, 28)),),
        outputs=(TensorSpec("logits", "FP32", (-1, 10)),),
        variants=(
            Variant("int8", "onnxruntime", blob(artifact, "int8.onnx"), "int8"),
            Variant("broken", "reference", blob(wrong, "broken.reference.json")),
        ),
        batch_axis=0,
        goldens=(Golden((tensor("input", x),), (tensor("logits", y),)),),
    )
    path = tmp_path / "fashion.bundle"
    archive.pack(archive.compose(manifest, blobs), path)
    return path


def test_learn_measures_writes_and_does_not_overwrite(
    fashion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, card = tmp_path / "mine.yaml", tmp_path / "card.yaml"
    words = ["profile", "learn", str(fashion), "--name", "mine", "--output", str(out)]
    words += ["--card", str(card), "--seconds", "0.5", "--threads-max", "2"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "int8" in printed.out and f"written: {out}" in printed.out
    mine = loading.load(str(out))
    first = mine.profile.backends[0]
    assert first.backend == "onnxruntime" and first.options["threads"] in (1, 2)
    assert mine.profile.extends.startswith("generic-") or mine.profile.extends
    assert mine.source("backends").startswith("measured 20") and "int8" in mine.source("backends")
    assert "backends.reference.broken" in mine.profile.unknown
    results = cards.load(card).results
    assert [(one.variant, one.threads) for one in results] == [("int8", 1), ("int8", 2)]
    assert all(0 < one.p50_ms < 1000 and one.private_bytes > 1 << 20 for one in results)
    assert all(one.device == "CPU" for one in results)

    before = out.read_bytes()
    assert main(words) == 10, "a conflict"
    assert "--force overwrites it" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("segv", "signal 11"),
        ("raise", "could be measured"),
        ("exit", "the process ended (exit code"),
    ],
)
def test_a_variant_that_dies_is_a_result_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str, said: str
) -> None:
    path = reference_bundle(tmp_path, "ill", options=fault(action))
    out = tmp_path / "mine.yaml"
    code = main(["profile", "learn", str(path), "--output", str(out), "--seconds", "0.1"])
    assert code == 5
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert not out.exists()


def test_a_variant_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "LOAD_S_MAX", 1.5)
    path = reference_bundle(tmp_path, "slow", options=fault("hang", at="load"))
    out = tmp_path / "mine.yaml"
    assert main(["profile", "learn", str(path), "--output", str(out), "--seconds", "0.1"]) == 5
    assert "no answer within 1.5 s" in capsys.readouterr().err


def test_a_bad_name_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = reference_bundle(tmp_path, "one")
    assert main(["profile", "learn", str(path), "--name", "No Name"]) == 2
    assert "loaded" not in capsys.readouterr().err


# --- the page -------------------------------------------------------------------------------------


def test_the_hardware_page_is_what_profiles_and_cards_say() -> None:
    assert hardware.DOCS.read_text() == hardware.page(), "run `python -m tests.profiles.hardware`"


def test_every_card_is_of_a_board_that_there_is() -> None:
    known = loading.names([loading.BUILT_IN])
    for card in cards.load_all():
        assert card.board in known and card.results


def test_the_page_says_what_was_not_measured() -> None:
    page = hardware.page()
    measured = {card.board for card in cards.load_all()}
    boards = set(loading.names([loading.BUILT_IN]))
    assert page.count("Not measured yet.\n") == len(boards - measured)
