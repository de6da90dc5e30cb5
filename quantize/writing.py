"""A recipe as YAML with comments, for a person to change.

Law of this file: pure; a recipe in, text out. What it writes, `recipe.load` reads back equal
(notes become comments).
Values are written as JSON, which is YAML; a comment says unit, default or reason in one line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from quantize.passes import PASSES
from quantize.recipe import (
    METRICS,
    Calibration,
    Data,
    Evaluation,
    Export,
    Recipe,
    Variant,
    is_callable,
)


def text(recipe: Recipe, folder: Path) -> str:
    """The recipe's file, to lie in `folder`: paths below it are written relative to it."""
    data, budgets, evaluation = recipe.data, recipe.budgets, recipe.evaluation
    drop = "null" if budgets.drop_max is None else f"{budgets.drop_max:g}"
    lines = [
        "# What `edge-quantize run` makes of a model. docs/compression.md explains every key.",
        f"schema: {recipe.schema}",
        _pair("name", recipe.name, "of the model on the device"),
        _pair("version", recipe.version, "of the bundle; a higher one replaces a lower one"),
        _pair(
            "source",
            _relative(recipe.source, folder),
            "the model: .onnx, .tflite, OpenVINO's .xml, torch's .pt2 or module:function",
        ),
        *_torch(recipe, folder),
        *([_pair("label", recipe.label, "of the version, for people")] if recipe.label else []),
        _pair("seed", recipe.seed, "of everything random: the same seed gives the same files"),
        _pair("threads", recipe.threads, "that every variant is measured with"),
        _pair("targets", list(recipe.targets), "device profiles (`edge-runtime profile list`)"),
        "data:",
        _pair("  path", _relative(data.path, folder), ".npz (x, y), folder of images, or mod:func"),
        _pair(
            "  calibration",
            _relative(data.calibration, folder),
            "the same, for calibration alone; empty: a part of path, left out of judging",
        ),
        *_rest(data, Data(data.path), {"path", "calibration"}),
        "calibration:",
        _pair("  samples", recipe.calibration.samples, "fewer than 50 do not show ranges"),
        *_rest(recipe.calibration, Calibration(), {"samples"}),
        "evaluation:",
        _pair("  metric", evaluation.metric, ", ".join(METRICS)),
        _pair("  samples", evaluation.samples, "at most so many judge; 0: all"),
        *_rest(evaluation, Evaluation(), {"metric", "samples"}),
        "budgets:",
        f"  drop_max: {drop}  # largest loss, in the metric's unit (top1: 0.01 is one point)",
        _pair("  confidence", budgets.confidence, "that the loss keeps drop_max"),
        _pair("  speedup_min", budgets.speedup_min, "against float there; 0: size alone may do"),
        _pair("  size_bytes_max", budgets.size_bytes_max, "0: not limited"),
        _pair("  latency_ms_max", budgets.latency_ms_max, "of one run; 0: not limited"),
        _pair("  memory_bytes_max", budgets.memory_bytes_max, "of the worker; 0: not limited"),
        "pack:",
        _pair("  goldens", recipe.pack.goldens, "recorded answers, checked at every load"),
        _pair("  labels", list(recipe.pack.labels), "names of the classes, in order"),
        "# A variant is a chain of passes for one backend; without passes it is the float model.",
        "# Passes: " + ", ".join(PASSES),
        "variants:",
        *(line for one in recipe.variants for line in _variant(one)),
    ]
    lines += [f"# {note}" for note in recipe.notes]
    return "\n".join(lines) + "\n"


def _torch(recipe: Recipe, folder: Path) -> list[str]:
    """How a torch source is exported, and other formats of the model, where a recipe says so."""
    lines = [
        f"also: {{{kind}: {_scalar(_relative(path, folder))}}}"
        for kind, path in recipe.also.items()
    ]
    if recipe.export != Export():
        lines += ["export:", *_rest(recipe.export, Export(), set())]
    return lines


def _rest(given: Any, plain: Any, shown: set[str]) -> list[str]:
    """What a section states beside the keys that are always written."""
    return [
        f"  {name}: {_scalar(getattr(given, name))}"
        for name in given.__struct_fields__
        if name not in shown and getattr(given, name) != getattr(plain, name)
    ]


def _variant(one: Variant) -> list[str]:
    lines = [f"  - name: {_scalar(one.name)}", f"    backend: {_scalar(one.backend)}"]
    if one.options:
        lines.append(f"    options: {_scalar(one.options)}")
    if one.passes:
        lines.append("    passes:")
        lines += [f"      - {_scalar(step)}" for step in one.passes]
    return lines


def _pair(key: str, value: Any, why: str) -> str:
    return f"{key}: {_scalar(value)}  # {why}"


def _scalar(value: Any) -> str:
    return json.dumps(msgspec.to_builtins(value), ensure_ascii=False)


def _relative(path: str, folder: Path) -> str:
    if not path or is_callable(path):
        return path
    try:
        return str(Path(path).relative_to(folder.resolve()))
    except ValueError:
        return path
