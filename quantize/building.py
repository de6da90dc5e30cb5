"""From a recipe's variants to model files.

Law of this file: every chain is checked as a whole before the first pass works; then passes are
applied in order, each result kept under a name that says what made it. A pass that fails refuses
its variant, not the run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime import backends
from edge_runtime.backends import options
from edge_runtime.errors import EdgeError, StorageError, UsageError
from quantize import datasets, models, passes, recipe, scratch
from quantize.datasets import Dataset
from quantize.models import ModelFile
from quantize.passes import Bench, Pass, Say, Validation
from quantize.recipe import Variant


class Chain(NamedTuple):
    """A variant whose passes are decoded and known to fit one another."""

    variant: Variant
    passes: tuple[Pass, ...]


class Built(NamedTuple):
    """A variant as a file, or why there is none."""

    variant: Variant
    path: Path | None
    precision: str
    steps: tuple[dict[str, Any], ...]  # the passes with all their options
    refusal: str = ""


def chains(variants: Sequence[Variant], source: ModelFile) -> list[Chain]:
    """The variants, decoded and checked against the source model.

    Raises:
        UsageError: an unknown pass or option, or an order that cannot work; names the key path.
    """
    return [_chain(one, source, f"variants[{index}]") for index, one in enumerate(variants)]


def _chain(variant: Variant, source: ModelFile, where: str) -> Chain:
    _served(variant, where)
    traits, decoded = source.on(variant.backend).traits, []
    for index, given in enumerate(variant.passes):
        here = f"{where}.passes[{index}]"
        decoded.append(passes.decode(given, here))
        traits = passes.traits_after(traits, decoded[-1], here)
    return Chain(variant, tuple(decoded))


def _served(variant: Variant, where: str) -> None:
    """Raises: UsageError: a backend or an option of it that nothing knows."""
    try:
        home = inspect.getmodule(type(backends.backend(variant.backend)))
    except UsageError as error:
        error.where = f"{where}.backend"
        raise
    kind = getattr(home, "Options", None)
    if kind is not None:
        options.decode(kind, variant.options, f"{where}.options")


def build(
    chain: Chain,
    source: ModelFile,
    calibration: Dataset,
    seed: int,
    kept: scratch.Scratch,
    say: Say,
    validation: Callable[[], Validation] | None = None,
) -> Built:
    """The variant's file; made now, or earlier by the same passes from the same data.

    `validation`: for a chain with a pass that chooses by answers.
    """
    source = source.on(chain.variant.backend)
    steps = tuple(passes.describe(one) for one in chain.passes)
    path = source.path
    try:
        seen = validation() if validation and any(map(passes.validates, chain.passes)) else None
        bench = Bench(
            calibration.feeds,
            source.inputs,
            source.outputs,
            source.batch_axis,
            seed,
            say,
            kept.folder,
            source.module,
            seen,
        )
        for step, one, key in zip(
            steps, chain.passes, keys(chain, source, calibration, seed, seen), strict=True
        ):
            say(f"{chain.variant.name}: {step['use']}")
            path = kept.made(
                key, ending(one, path), functools.partial(one.apply, path, bench=bench)
            )
        result = models.read(path)
    except StorageError:  # no fault of the variant's
        raise
    except EdgeError as error:
        return Built(chain.variant, None, "", steps, str(error))
    refusal = _changed(source, result)
    precision = result.precision
    if precision.startswith("fp"):
        asked = recipe.computes_in(chain.variant.backend, chain.variant.options)
        precision = asked or precision
    return Built(chain.variant, None if refusal else path, precision, steps, refusal)


def keys(
    chain: Chain,
    source: ModelFile,
    calibration: Dataset,
    seed: int,
    validation: Validation | None = None,
) -> list[str]:
    """Of each pass's result the name in the scratch folder: chains that begin alike share them."""
    made_of: list[Any] = [
        scratch.file_sha256(source.on(chain.variant.backend).path),
        datasets.fingerprint(calibration)["sha256"],
        seed,
    ]
    found = []
    for one in chain.passes:
        made_of.append([passes.describe(one), one.versions()])
        if passes.TORCH in one.requires:  # it works on the module, of which the file shows a part
            made_of.append(source.code_sha256)
        if validation is not None and passes.validates(one):
            made_of.append(validation.key)
        found.append(scratch.key(*made_of))
    return found


def ending(one: Pass, before: Path) -> str:
    """Of the file that the pass makes of `before`."""
    return str(getattr(one, "ending", before.suffix))


def _changed(source: ModelFile, result: ModelFile) -> str:
    """Why the result cannot stand for the source; empty if it can."""
    for role, before, after in (
        ("inputs", source.inputs, result.inputs),
        ("outputs", source.outputs, result.outputs),
    ):
        want = [(spec.name, spec.datatype) for spec in before]
        have = [(spec.name, spec.datatype) for spec in after]
        if want != have:
            return f"its {role} became {have}, expected {want}"
    return ""
