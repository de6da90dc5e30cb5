"""A recipe's source as files: what lies there, or what torch exports once.

Law of this file: after `exported` a recipe names files only, so whatever works on (another process,
another machine) needs neither torch nor the user's code. An export runs in a process of its own:
torch and JAX take memory and start threads, and this process starts others. It is compared with
torch's own answers on the recipe's samples before it is used, and kept by what made it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime import errors
from edge_runtime.backends import backend
from edge_runtime.errors import EdgeError, ModelError, UsageError
from quantize import (
    datasets,
    executors,
    litert_torch_door,
    models,
    recipe,
    scratch,
    torch_door,
    torch_modules,
)
from quantize.models import ModelFile
from quantize.passes import ONNX, TFLITE, TORCH, Bench, Say
from quantize.recipe import Data, Origin, Recipe
from quantize.torch_modules import Module, Names

Array = np.ndarray[Any, Any]

# What a backend asks a format's answers of, to be compared with torch's.
_ASKED = {ONNX: "onnxruntime", TFLITE: "litert"}
ROWS = 8  # samples of a run where any number is taken: other than what it was traced with


class Facts(msgspec.Struct, frozen=True):
    """What is known of an exported file. See recipe.Origin."""

    difference: float
    notes: tuple[str, ...] = ()


class Job(NamedTuple):
    """One export: the module, samples to trace it with [rows, ...], names, and how."""

    made: Module
    given: Sequence[Array]
    called: Names
    how: recipe.Export
    data: Data


def is_torch(source: str) -> bool:
    """Whether torch has to make a file of it first."""
    return recipe.is_callable(source) or source.endswith(torch_modules.PROGRAM)


def read(given: Recipe) -> ModelFile:
    """The source with what it is in other formats.

    Raises:
        EdgeError: a file is missing or refused, or does not have the source's inputs and outputs.
    """
    assert not is_torch(given.source), "exported first"
    source = models.read(Path(given.source))
    also = {str(kind): models.read(Path(path)) for kind, path in given.also.items()}
    for kind, one in also.items():
        if one.format != kind:
            raise UsageError(f"is {one.format}", where=f"also.{kind}", expected=kind)
        _same_signature(source, one)
    if given.origin is None or not recipe.is_callable(given.origin.source):
        return source._replace(also=also)
    origin = given.origin
    mine, *others = (
        one._replace(
            traits=one.traits | {TORCH}, module=origin.source, code_sha256=origin.code_sha256
        )
        for one in (source, *also.values())
    )
    return mine._replace(also=dict(zip(also, others, strict=True)))


def _same_signature(source: ModelFile, other: ModelFile) -> None:
    for role in ("inputs", "outputs"):
        want = {spec.name: (spec.datatype, spec.shape) for spec in getattr(source, role)}
        have = {spec.name: (spec.datatype, spec.shape) for spec in getattr(other, role)}
        if want != have:
            raise UsageError(
                f"has {role} {have}",
                where=str(other.path),
                expected=f"those of {source.path.name}: {want}",
                remedy="variants of a model must be interchangeable: write both for one sample",
            )


def exported(given: Recipe, folder: Path, say: Say) -> Recipe:
    """The recipe with files for source: itself, where it names one.

    Args:
        folder: where the files are kept; the same module is not exported twice into it.

    Raises:
        EdgeError: what is wrong with the module, the data or the names; it cannot be exported, or
            the file answers otherwise than torch does.
    """
    if not is_torch(given.source):
        return given
    _check_installed(given)
    say(f"exporting {given.source}" + (", also as .tflite" if wants_tflite(given) else ""))
    order = {"recipe": msgspec.to_builtins(given), "folder": str(folder.resolve())}
    job = executors.Job("export", "quantize.origins:export_job", order)
    with executors.LocalExecutor() as executor:
        (done,) = executors.run(executor, [job], attempts_max=1)  # what killed it does so again
    if done.said.refusal:
        raise ModelError(
            f"its export ended: {done.said.refusal}",
            where=given.source,
            remedy="an export takes several times the memory of the weights, and signal 9 is often"
            " memory that ran out (dmesg)"
            if "signal" in done.said.refusal
            else "",
        )
    if "error" in done.said.result:
        raise errors.from_document(done.said.result["error"])
    return msgspec.convert(done.said.result["recipe"], Recipe)


def file_of(source: Path, data: Data, folder: Path, say: Say) -> Path:
    """A model file: the source itself, or what torch exports of it. Raises: as `exported`."""
    if not is_torch(str(source)):
        return source
    return Path(exported(Recipe("source", str(source), data), folder, say).source)


def export_job(order: dict[str, Any]) -> dict[str, Any]:
    """`export` for an executor: {"recipe": ...} or {"error": ...}, so that where and what to do are
    kept apart."""
    try:
        torch_modules.in_one_thread()
        made = export(msgspec.convert(order["recipe"], Recipe), Path(order["folder"]))
    except EdgeError as error:
        return {"error": error.document()}
    return {"recipe": msgspec.to_builtins(made)}


def export(given: Recipe, folder: Path) -> Recipe:
    """`exported`, in this process."""
    kept, made = scratch.Scratch(folder), torch_modules.load(given.source)
    first, (how, notes) = _samples(made, given), _fitting(given)
    try:
        called = torch_modules.names(made, how, first)
    except ModelError:  # of modules and programs that take one sample only: `_not_free` says why
        first = torch_modules.alone(first)
        called = torch_modules.names(made, how, first)
    job = Job(made, first, called, how, given.data)
    path, facts = _once(kept, job, ".onnx", _onnx)
    files, found = {ONNX: path}, {ONNX: facts}
    versions = torch_modules.versions()
    if wants_tflite(given):
        files[TFLITE], found[TFLITE] = _once(kept, job, ".tflite", _tflite)
        versions["litert-torch"] = litert_torch_door.version()
    origin = Origin(
        source=given.source,
        code_sha256=made.code_sha256,
        weights_sha256=made.weights_sha256,
        versions=versions,
        differences={kind: one.difference for kind, one in found.items()},
        notes=(*found[ONNX].notes, *notes),
    )
    also = {TFLITE: str(files[TFLITE])} if TFLITE in files else dict(given.also)
    return msgspec.structs.replace(given, source=str(path), also=also, origin=origin)


def _check_installed(given: Recipe) -> None:
    """Raises: UsageError that names the extra; nothing is imported."""
    if not importlib.util.find_spec("torch"):
        raise torch_door.missing("there is no such module")
    if wants_tflite(given) and not tflite_is_possible():
        raise litert_torch_door.missing("there is no such module")


def _fitting(given: Recipe) -> tuple[recipe.Export, tuple[str, ...]]:
    """How to export, and what to say of it: variants of one bundle must take the same."""
    how = given.export
    if not wants_tflite(given) or how.batch == "one":
        return how, ()
    if how.batch == "free":
        raise UsageError(
            "is free, and the backend litert takes one sample at a time",
            where="export.batch",
            expected="one (variants of a bundle must be interchangeable), or no variant on litert",
        )
    note = "it takes one sample at a time, as its .tflite does: variants must be interchangeable"
    return msgspec.structs.replace(how, batch="one"), (note,)


def of_program(program: Path, samples: Path, like: Path, bench: Bench) -> Path:
    """An exported program as a file of the format of `like`, with the inputs and outputs of
    `bench`, compared with torch's own answers on the samples (.npz).

    Raises:
        ModelError: it cannot be exported, or answers otherwise.
    """
    assert bench.cache is not None
    given = Recipe(
        "program",
        str(program),
        Data(str(samples)),
        export=recipe.Export(
            tuple(spec.name for spec in bench.inputs),
            tuple(spec.name for spec in bench.outputs),
            "free" if bench.batch_axis == 0 else "one",
        ),
        variants=(recipe.Variant("it", "litert"),) if like.suffix == ".tflite" else (),
    )
    made = exported(given, bench.cache, bench.say)
    return Path(next(iter(made.also.values()), made.source))


def wants_tflite(given: Recipe) -> bool:
    """Whether a backend that reads nothing else is asked for, and no such file was given."""
    named = [one.backend for one in given.variants]
    named += given.search.backends if given.search else ()
    return TFLITE not in given.also and any(models.ONLY.get(one) == TFLITE for one in named)


def tflite_is_possible() -> bool:
    """Whether what makes a .tflite of a module is installed."""
    return all(map(importlib.util.find_spec, ("litert_torch", "ai_edge_litert")))


def told(origin: Origin) -> tuple[str, ...]:
    """What a report says of an export."""
    libraries = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    differences = ", ".join(f"{kind} {one:.1e}" for kind, one in origin.differences.items())
    return (
        f"exported from {origin.source} with {libraries}; largest difference from torch's own"
        f" answers, of their largest value: {differences}",
        *origin.notes,
    )


def _samples(made: Module, given: Recipe) -> list[Array]:
    """What the module is traced with: the user's examples, or the first samples."""
    if made.examples:
        return list(made.examples)
    called = given.export.inputs or made.arguments
    found = datasets.first(given.data, called, torch_modules.ROWS_TRACED)
    return [found[name] for name in called]


def _key(job: Job, ending: str) -> str:
    made = job.made
    library = litert_torch_door.version() if ending == ".tflite" else ""
    return scratch.key(
        "export",
        [made.source, made.code_sha256, made.weights_sha256, torch_modules.versions(), library],
        [msgspec.to_builtins(job.how), job.called],
        [[one.dtype.str, one.shape] for one in job.given],
        torch_modules.answers_sha256(made, job.given),
    )


def _once(
    kept: scratch.Scratch, job: Job, ending: str, make: Callable[[Job, Path], Facts]
) -> tuple[Path, Facts]:
    """The file and what is known of it; made now, or earlier.

    One of earlier is compared with torch again: what a module computes may hang on more than its
    files and weights say, and the samples may be others.
    """
    key = _key(job, ending)
    path, beside = kept.folder / f"{key}{ending}", f"{key}{ending}.facts"
    if path.exists() and (kept.folder / beside).exists():
        before = msgspec.json.decode((kept.folder / beside).read_bytes(), type=Facts)
        with contextlib.suppress(ModelError):
            return path, msgspec.structs.replace(before, difference=compared(job, path))
    # Replaced, never taken away: another run may be at work in this folder.
    with tempfile.TemporaryDirectory(dir=kept.folder) as temporary:
        draft, facts = Path(temporary) / f"draft{ending}", Path(temporary) / "facts"
        found = make(job, draft)
        facts.write_bytes(msgspec.json.encode(found))
        draft.replace(path)
        facts.replace(kept.folder / beside)
    return path, found


# --- the two formats ------------------------------------------------------------------------------


def _onnx(job: Job, out: Path) -> Facts:
    why = "" if job.how.batch == "one" else _not_free(job, out)
    if not why and job.how.batch != "one":
        return Facts(compared(job, out))
    if job.how.batch == "free":
        raise ModelError(why, where="export.batch", expected="auto, or one")
    torch_modules.to_onnx(job.made, torch_modules.alone(job.given), job.called, out, free=False)
    notes = (f"it takes one sample at a time: {why}",) if why else ()
    return Facts(compared(job, out), notes)


def _not_free(job: Job, out: Path) -> str:
    """Export for any number of samples; why that cannot be, empty if it can."""
    several = torch_modules.several(job.given)
    if several is None:
        return "its inputs have different first axes"
    if _mixes(job):
        return "its answer to a sample depends on those beside it"
    try:
        torch_modules.to_onnx(job.made, several, job.called, out, free=True)
    except ModelError as error:
        return error.message
    if models.read(out).batch_axis is None:
        return "the first axis of an output is not that of the samples"
    return ""


def _mixes(job: Job) -> bool:
    """Whether torch itself answers otherwise to a sample alone, as where the statistics of a batch
    are at work: a server that joins requests would give each a share of the others."""
    whole = datasets.first(job.data, job.called.inputs, torch_modules.ROWS_TRACED)
    given = [whole[name] for name in job.called.inputs]
    alone, several = torch_modules.alone(given), torch_modules.several(given)
    if several is None:
        return False
    try:
        both = zip(
            torch_modules.outputs(job.made, alone),
            torch_modules.outputs(job.made, several),
            strict=True,
        )
        pairs = [
            (one, more[:1])
            for (_, one), (_, more) in both
            if one.shape[:1] == (1,) and more.shape[:1] == (torch_modules.ROWS_TRACED,)
        ]
    except ModelError:
        return False  # the export says why
    return any(difference(*pair) > job.how.tolerance for pair in pairs)


def _tflite(job: Job, out: Path) -> Facts:
    litert_torch_door.convert(job.made, torch_modules.alone(job.given), job.called, out)
    return Facts(compared(job, out))


def compared(job: Job, path: Path) -> float:
    """The largest difference from torch's own answers, as a share of their largest value.

    Raises:
        ModelError: it is beyond the tolerance; or the file does not run.
    """
    file = models.read(path)
    whole = datasets.load(job.data, file.inputs)
    some = whole.take(np.arange(min(job.how.samples, len(whole))))
    loaded = backend(_ASKED[file.format]).load(path, {})
    worst, where = 0.0, ""
    for feed in datasets.batches(some.inputs, ROWS if file.batch_axis == 0 else 1, file.inputs):
        want = torch_modules.outputs(job.made, [feed[name] for name in job.called.inputs])
        have: Mapping[str, Array] = loaded.run(feed)
        for name, (_, one) in zip(job.called.outputs, want, strict=True):
            if one.shape != have[name].shape:
                raise _otherwise(job, name, f"has shape {have[name].shape} instead of {one.shape}")
            found = difference(one, have[name])
            if not found <= worst:  # NaN too
                worst, where = found, name
    if not worst <= job.how.tolerance:
        what = f"differs by {worst:.2g} of its largest value on {len(some)} samples"
        raise _otherwise(job, where, what)
    return worst


def _otherwise(job: Job, output: str, what: str) -> ModelError:
    return ModelError(
        f"the exported file answers otherwise than torch: output {output!r} {what}",
        where=job.made.source,
        expected=f"at most {job.how.tolerance:g} (export.tolerance)",
        remedy="a step that depends on the samples or on chance was exported as it was with the"
        " first ones; or, where the difference is harmless, allow more",
    )


def difference(want: Array, have: Array) -> float:
    """The largest, as a share of the largest wanted value; infinite where shapes differ, NaN where
    there is one. The same infinity does not differ."""
    if want.shape != have.shape:
        return float("inf")
    other = want != have
    if not other.any():
        return 0.0
    a, b = want[other].astype(np.float64), have[other].astype(np.float64)
    finite = want[np.isfinite(want)]
    return float(np.abs(a - b).max() / (np.abs(finite.astype(np.float64)).max(initial=0.0) or 1.0))
