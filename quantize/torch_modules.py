"""A torch module as a source: made by the user's function or read from an exported program, asked
for its answers, and written as ONNX.

Law of this file: it gets torch from `torch_door` and knows no recipe. A module is used as it comes:
in eval mode or not at all. Names of inputs and outputs are settled here, for every format alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.errors import EdgeError, ModelError, NotFoundError, UsageError
from quantize import foreign, onnx_door, recipe, torch_door, torch_programs

Array = np.ndarray[Any, Any]

PROGRAM = ".pt2"
BATCH = "N"  # what the free axis is called in the file
# Rows of the samples that an export is traced with: torch takes an axis of 1 for a fixed one.
ROWS_TRACED = 2
_EXPECTED = "a torch.nn.Module in eval mode, or (module, example inputs)"
_ANSWERS = "tensors: one, a tuple, or a dictionary"


class Module(NamedTuple):
    """A source that torch can run.

    Attributes:
        arguments: the names of what forward takes. examples: the user's own, one array [rows, ...]
            per argument; empty: none were given.
        code_sha256: of the files that define it; weights_sha256: of parameters and buffers.
        program: the exported program that `module` runs; None: there are layers that can be cut.
    """

    module: Any
    source: str
    arguments: tuple[str, ...]
    examples: tuple[Array, ...]
    code_sha256: str
    weights_sha256: str
    program: Any = None


class Names(NamedTuple):
    """Of a file's inputs and outputs, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def versions() -> dict[str, str]:
    """Of the libraries that write ONNX. Raises: UsageError."""
    try:
        return {"torch": torch_door.version(), "onnxscript": metadata.version("onnxscript")}
    except metadata.PackageNotFoundError as e:
        raise UsageError(
            f"torch writes no ONNX without it: {e}",
            remedy="pip install 'edge-runtime[quantize-torch]'",
        ) from e


def in_one_thread() -> None:
    """An export computes little; threads that wait for one another take the cores from others."""
    torch_door.library().set_num_threads(1)


def load(source: str) -> Module:
    """The module that `module:function` returns, or that a .pt2 file holds.

    Raises:
        NotFoundError: no such file.
        UsageError: torch or the function is missing, it failed or returned another thing, or it is
            in training mode.
    """
    torch_door.library()
    return _of_function(source) if recipe.is_callable(source) else _of_program(Path(source))


def outputs(made: Module, given: Sequence[Array]) -> list[tuple[str, Array]]:
    """What the module answers, with the names that it gives: "" where it gives none.

    Args:
        given: one array per argument, as a run takes them.

    Raises:
        ModelError: it failed, or returned something that is no tensor.
    """
    torch = torch_door.library()
    tensors = [torch.from_numpy(np.ascontiguousarray(one)) for one in given]
    with torch.no_grad(), foreign.ours("torch does not run the module", Path(made.source)):
        answer = made.module(*tensors)
    found = [(name, one) for name, one in flat(answer, made.source) if one is not None]
    if not found:
        raise ModelError("its module returned no tensor", where=made.source, expected=_ANSWERS)
    return [(name, _array(one, made.source)) for name, one in found]


def _array(tensor: Any, source: str) -> Array:
    """Raises: ModelError for a datatype that arrays do not have."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind == "bfloat16" or kind.startswith(("complex", "q")):
        raise ModelError(
            f"it takes or returns {kind}",
            where=source,
            expected="float32, and integers or booleans",
            remedy="return module.float(), and have forward cast what it returns"
            " (torch.view_as_real for complex numbers)",
        )
    found: Array = tensor.detach().cpu().resolve_neg().numpy()
    return found


def answers_sha256(made: Module, given: Sequence[Array]) -> str:
    """Of the first answers: they tell modules apart whose files and weights are the same."""
    digest = hashlib.sha256()
    for _, one in outputs(made, given):
        digest.update(f"{one.dtype} {one.shape}".encode() + one.tobytes())
    return digest.hexdigest()


def names(made: Module, wanted: recipe.Export, given: Sequence[Array]) -> Names:
    """The names that every format has: those of the recipe, or the module's own.

    Raises:
        UsageError: another number of names than of inputs or outputs, or one name twice.
    """
    own = [name for name, _ in outputs(made, given)]
    plain = ["output"] if len(own) == 1 else [f"output_{place}" for place in range(len(own))]
    ins = wanted.inputs or made.arguments[: len(given)]
    outs = wanted.outputs or tuple(
        re.sub(r"\W", "_", name) or plain[place] for place, name in enumerate(own)
    )
    if not wanted.outputs:
        outs = tuple(f"{name}_out" if name in ins else name for name in outs)
    for key, have, count in (("inputs", ins, len(given)), ("outputs", outs, len(own))):
        if len(have) != count:
            raise UsageError(
                f"names {len(have)} {key}, {made.source} has {count}",
                where=f"export.{key}",
                expected=f"{count} names, or none",
            )
    both = (*ins, *outs)
    twice = sorted({name for name in both if both.count(name) > 1})
    if twice:
        raise UsageError(
            f"{twice[0]!r} is there twice",
            where="export",
            expected="inputs and outputs of different names",
            remedy="give them in export.inputs and export.outputs",
        )
    return Names(ins, outs)


def to_onnx(made: Module, given: Sequence[Array], called: Names, out: Path, free: bool) -> None:
    """Write the module as ONNX.

    Args:
        given: what it is traced with, one array per input.
        free: the first axis of every input is any number of samples.

    Raises:
        ModelError: torch cannot export it; names the operator where it says one.
    """
    torch = torch_door.library()
    tensors = tuple(torch.from_numpy(np.ascontiguousarray(one)) for one in given)
    axes = tuple({0: torch.export.Dim(BATCH)} for _ in tensors) if free else None
    model: Any = made.module
    if made.program is not None:  # its axes were settled when it was made
        model, tensors, axes = made.program, (), None
    with _explained(made.source), foreign.quiet():
        program = torch.onnx.export(
            model,
            tensors,
            dynamo=True,
            dynamic_shapes=axes,
            input_names=list(called.inputs),
            output_names=list(called.outputs),
            verbose=False,
        )
        program.save(str(out), external_data=False)
    stripped = onnx_door.load(out)
    onnx_door.strip(stripped)
    onnx_door.save(stripped, out)


def save_program(made: Module, given: Sequence[Array], out: Path, free: bool) -> None:
    """Write the module as an exported program (.pt2), to be exported in another process.

    Raises:
        ModelError: torch cannot export it.
    """
    torch = torch_door.library()
    traced = several(given) if free else None
    arrays = [one[:1] for one in given] if traced is None else traced
    tensors = tuple(torch.from_numpy(np.ascontiguousarray(one)) for one in arrays)
    axes = tuple({0: torch.export.Dim(BATCH)} for _ in tensors) if traced else None
    with _explained(made.source), foreign.quiet():
        program = torch.export.export(made.module, tensors, dynamic_shapes=axes)
        torch.export.save(program, str(out))


def alone(given: Sequence[Array]) -> list[Array]:
    """The first sample as an export takes it; all that is given, where that is no samples."""
    return [array[:1] for array in given] if _are_samples(given) else list(given)


def several(given: Sequence[Array]) -> list[Array] | None:
    """Samples as an export for any number takes them; None: these are no samples."""
    if not _are_samples(given):
        return None
    return [np.concatenate([array] * ROWS_TRACED)[:ROWS_TRACED] for array in given]


def _are_samples(given: Sequence[Array]) -> bool:
    counts = {len(array) if array.ndim else 0 for array in given}
    return len(counts) == 1 and 0 not in counts


# --- from a function ------------------------------------------------------------------------------


def _of_function(source: str) -> Module:
    torch, function = torch_door.library(), foreign.function(source, "source")
    torch.manual_seed(0)  # a function that draws weights draws the same ones each time
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the outcome
            found = function()
    except (KeyboardInterrupt, EdgeError):
        raise
    except BaseException as e:  # the user's own code, which may raise or exit as it likes
        raise UsageError(
            f"failed: {type(e).__name__}: {e}", where=source, expected=_EXPECTED
        ) from e
    module, examples = found if isinstance(found, tuple) and len(found) == 2 else (found, ())
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"returned a {type(found).__name__}",
            where=source,
            expected=_EXPECTED,
            remedy="of a dictionary of weights: build the network and load_state_dict them first"
            if isinstance(found, Mapping)
            else "",
        )
    _refuse_training(module, source)
    _refuse_weights(module, source)
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    if not all(isinstance(one, torch.Tensor) for one in examples):
        raise UsageError(
            "returned example inputs that are no tensors", where=source, expected=_EXPECTED
        )
    arrays = tuple(_array(one, source) for one in examples)
    return Module(
        module,
        source,
        _arguments(module, len(arrays), source),
        arrays,
        _code_sha256(function, module),
        weights_sha256(module),
    )


def _refuse_training(module: Any, source: str) -> None:
    """Raises: UsageError. In training mode dropout is at work and statistics are the batch's."""
    training = [f"{name or 'itself'}" for name, one in module.named_modules() if one.training]
    if training:
        kinds = {type(each).__name__ for each in module.modules() if each.training}
        acting = sorted(kind for kind in kinds if kind.startswith(("Dropout", "BatchNorm")))
        raise UsageError(
            f"returned a module in training mode: {', '.join(training[:3])}"
            + (f" and {len(training) - 3} more" if len(training) > 3 else "")
            + (f" ({', '.join(acting)} would answer otherwise each time)" if acting else ""),
            where=source,
            expected=_EXPECTED,
            remedy="return module.eval()",
        )


def _refuse_weights(module: Any, source: str) -> None:
    """Raises: UsageError for weights that hold nothing, or floats that samples do not come as."""
    torch = torch_door.library()
    for name, one in module.state_dict().items():
        if not isinstance(one, torch.Tensor):
            continue
        if one.is_meta or isinstance(one, torch.nn.parameter.UninitializedTensorMixin):
            raise UsageError(
                f"weight {name!r} has no values",
                where=source,
                remedy="load_state_dict the weights; run a lazy module once before",
            )
        if one.is_floating_point() and one.dtype != torch.float32:
            raise UsageError(
                f"weight {name!r} is {one.dtype}".replace("torch.", ""),
                where=source,
                expected="float32: what samples are given as, and what variants are held to",
                remedy="return module.float(); float16 is a variant (pass float16)",
            )


def _arguments(module: Any, count: int, source: str) -> tuple[str, ...]:
    """Names of forward's arguments: as many as there are examples, else those without default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(module.forward).parameters.values()
    plain = [one.name for one in found if one.kind in kinds]
    several = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in found)
    if count:
        more = [f"input_{place}" for place in range(len(plain), count)] if several else []
        return (*plain[:count], *more)
    needed = [one.name for one in found if one.kind in kinds and one.default is one.empty]
    if not needed:
        raise UsageError(
            "its module's forward does not say what it takes",
            where=source,
            remedy="return (module, example inputs)",
        )
    return tuple(needed)


def _code_sha256(function: Any, module: Any) -> str:
    """Of the function's file and those of the module's classes, torch's own left out."""
    torch = torch_door.library()
    home = Path(torch.__file__).parent
    found = {_file(function), *(_file(type(one)) for one in module.modules())} - {None}
    digest = hashlib.sha256(repr(module).encode())
    for path in sorted(path for path in found if path and home not in path.parents):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _file(thing: Any) -> Path | None:
    try:
        path = Path(inspect.getsourcefile(thing) or "")
    except TypeError:  # built in, or made by hand
        return None
    return path if path.is_file() else None


def weights_sha256(module: Any) -> str:
    """Of every parameter and buffer, by name."""
    torch = torch_door.library()
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- from an exported program ---------------------------------------------------------------------


def _of_program(path: Path) -> Module:
    if not path.exists():
        raise NotFoundError("there is no such model", where=str(path))
    program = torch_programs.load(path)
    with foreign.ours("torch does not run it as a module", path):
        module = program.module()
    _refuse_training_program(program, path)
    call = program.module_call_graph[0].signature
    told = getattr(call, "forward_arg_names", None) or program.graph_signature.user_inputs
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Module(module, str(path), tuple(told), _examples(program), sha256, sha256, program)


def _examples(program: Any) -> tuple[Array, ...]:
    """Zeros of the shapes that the program was made with."""
    made = program.graph_signature.user_inputs
    found = [node.meta["val"] for node in program.graph.nodes if node.name in made]
    return tuple(
        np.zeros([_size(size) for size in one.shape], str(one.dtype).removeprefix("torch."))
        for one in found
    )


def _size(size: Any) -> int:
    """Of an axis; of a free one so many as an export is traced with."""
    return size if isinstance(size, int) else ROWS_TRACED


def _refuse_training_program(program: Any, path: Path) -> None:
    for node in program.graph.nodes:
        kind = str(getattr(node.target, "_schema", "")).partition("(")[0]
        if (kind == "aten::dropout" and node.args[2]) or (
            kind == "aten::batch_norm" and node.args[5]
        ):
            raise UsageError(
                f"was exported in training mode: {kind} is at work in it",
                where=str(path),
                remedy="torch.export.export(module.eval(), ...) and save it again",
            )


# --- what comes out -------------------------------------------------------------------------------


def flat(answer: Any, source: str = "", name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors in the order of torch's own flattening, with the keys of dictionaries."""
    if answer is None or isinstance(answer, torch_door.library().Tensor):
        yield name, answer
    elif isinstance(answer, Mapping):
        for key, one in answer.items():
            yield from flat(one, source, f"{name}_{key}" if name else str(key))
    elif isinstance(answer, (tuple, list)):
        for one in answer:
            yield from flat(one, source)
    else:
        raise ModelError(
            f"its module returned a {type(answer).__name__}",
            where=source,
            expected=_ANSWERS,
        )


# What torch says -> what to do; looked for in the whole chain of causes.
_REMEDIES = (
    (
        ("No ONNX function found", "No decompositions registered", "Unsupported FX node"),
        "write that step with other operators, or export the ONNX file with your own translation of"
        " it (torch.onnx.export, custom_translation_table) and begin the recipe with the file",
    ),
    (
        ("data-dependent", "GuardOnDataDependentSymNode", "torch.cond"),
        "an `if` or a loop over values cannot be exported: use torch.where or torch.cond",
    ),
)


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """What torch raises as it exports, with the operator and what to do."""
    try:
        yield
    except EdgeError:
        raise
    except Exception as e:
        chain, text = [e], ""
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 10:
            chain.append(cause)  # type: ignore[arg-type]
        text = " ".join(str(one) for one in chain)
        remedy = next((do for said, do in _REMEDIES if any(one in text for one in said)), "")
        first = " ".join(str(chain[-1]).split())[: foreign.MESSAGE_SIZE_MAX]
        raise ModelError(
            f"torch cannot export it to ONNX: {type(chain[-1]).__name__}: {first}",
            where=source,
            remedy=remedy,
        ) from e
