"""A logarithm of 0 between two layers: no range holds it, and nothing may fail of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantize import ranges
from quantize.recipe import Budgets, Calibration, Data, Evaluation, Recipe, Variant
from quantize.workflow import prepare, run
from tests.quantize.test_weights import onnx, written

INF = np.float32(np.inf)


def test_ranges_are_of_finite_values() -> None:
    values = np.array([-INF, -2, 0.5, 1, INF, np.nan], np.float32)
    runs = [{"t": values, "none": np.array([np.nan], np.float32)}]
    assert ranges.extremes(runs)["t"] == (-2, 1) and "none" not in ranges.extremes(runs)
    assert ranges.averaged(runs) == {"t": pytest.approx((-2, 1))}
    found = ranges.histograms(lambda: runs)
    assert ranges.percentile(found, 100)["t"] == pytest.approx((-2, 1), abs=0.01)
    assert found["t"].counts.sum() == 3


def test_a_run_looks_at_tensors_that_are_infinite_at_times(tmp_path: Path) -> None:
    weights = np.random.Generator(np.random.PCG64(0)).normal(size=(8, 8)).astype("<f4")
    chain = [
        ("MatMul", "w"),
        ("Relu", ""),
        ("Log", ""),
        ("Add", "z"),
        ("Sigmoid", ""),
        ("MatMul", "w2"),
    ]
    names = ["x", *(kind + str(number) for number, (kind, _) in enumerate(chain[:-1])), "y"]
    nodes = [
        onnx.helper.make_node(kind, [given, other] if other else [given], [made], name=made)
        for (kind, other), given, made in zip(chain, names, names[1:], strict=False)
    ]
    held = {"w": weights, "w2": weights, "z": np.ones(1, "<f4")}
    path = written(nodes, held, 8, tmp_path / "log.onnx")
    x = np.random.Generator(np.random.PCG64(1)).normal(size=(120, 8)).astype("<f4")
    np.savez(tmp_path / "x.npz", x=x)
    recipe = Recipe(
        name="m",
        source=str(path),
        data=Data(str(tmp_path / "x.npz")),
        calibration=Calibration(40),
        evaluation=Evaluation(rounds=3),
        budgets=Budgets(drop_max=0.2, speedup_min=0.0),
        variants=(Variant("mse", passes=({"use": "static_int8", "method": "mse"},)),),
    )
    outcome = run(prepare(recipe), tmp_path / "work", None, lambda what: None).outcome
    logarithm = next(one for one in outcome.activations if one.name == "Log2")
    assert -20 < logarithm.low < 0 and logarithm.clippings["mse"].calibration == 0
    assert outcome.of("mse").score.value > 0.8
