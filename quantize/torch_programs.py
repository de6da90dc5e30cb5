"""An exported program (.pt2) from anywhere, made into one that torch may open.

Law of this file: a whitelist. torch.export.load unpickles what says so, evaluates the sizes and the
guards that stand in the graph as text, and calls whatever function of torch a node names; so it is
never given the user's file. It gets an archive written here, of the members that are known, after
every function and expression in the graph was found to be one of those that exports consist of.
Two members of one name, or what is compressed or placed strangely, cannot mean one thing to this
check and another to torch: torch sees only what was checked.
"""

from __future__ import annotations

import ast
import io
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from edge_runtime.errors import EdgeError, UsageError
from quantize import foreign, torch_door

_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
# What an archive consists of; members of other names are left behind.
_KEPT = re.compile(
    "|".join(map(re.escape, (_MODEL, _SAMPLES, *_CONFIGS)))
    + r"|data/weights/weight_\d+|data/constants/tensor_\d+"
    r"|archive_format|archive_version|byteorder|\.data/version"
)
_CODE = re.compile(r"data/aotinductor/.*|data/constants/(custom|opaque)_obj_.*")
_NAMESPACES = ("aten", "prims", "quantized", "quantized_decomposed", "torchvision")
# Operators that read or write files.
_FILES = re.compile(r"torch\.ops\.aten\.(from_file|save)\b")
_CONTROL = (
    "cond",
    "while_loop",
    "scan",
    "map_impl",
    "associative_scan",
    "wrap",
    "invoke_subgraph",
    "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
)
_PYTHON = (
    r"abs|add|and_|eq|floordiv|ge|getitem|gt|index|inv|invert|is_|is_not|le|lshift|lt|mod|mul|ne"
    r"|neg|not_|or_|pos|pow|rshift|sub|truediv|truth|xor"
)
_TARGET = re.compile(
    rf"torch\.ops\.({'|'.join(_NAMESPACES)})\.\w+(\.\w+)?"
    rf"|torch\.ops\.higher_order\.({'|'.join(_CONTROL)})"
    rf"|_operator\.({_PYTHON})|math\.[a-z]\w*|torch\._?sym_\w+"
)
# Sizes are written as sympy writes them: names, numbers, arithmetic, and calls of its classes.
_EXPRESSION = (
    ast.Expression,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.Call,
    ast.keyword,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
)
_CLASS = re.compile(r"[A-Z][A-Za-z]+")
_TEXT = re.compile(r"[A-Za-z]\w{0,63}|-?[0-9.]+(e[+-]?[0-9]+)?")  # a symbol, or digits of a number
# How a tree of inputs or outputs names modules that torch then imports; or hides that it does.
_IMPORTS = ("__enum__", "default_factory_module", "\\u")
_EXPECTED = "an exported program of plain tensors"
_REMEDY = "name the function that builds the network: source: module:function"


def load(path: Path) -> Any:
    """The torch.export.ExportedProgram.

    Raises:
        UsageError: it is none, or what torch would run as it opens the file is not known to be an
            export's.
        ModelError: torch does not read it.
    """
    torch = torch_door.library()
    with tempfile.TemporaryFile(suffix=".pt2") as clean:
        _rewrite(torch, path, clean)
        clean.seek(0)
        with foreign.ours("torch does not read it as an exported program", path):
            return torch.export.load(clean)


def _rewrite(torch: Any, path: Path, clean: IO[bytes]) -> None:
    """Write what is known of the archive. Raises: UsageError."""
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(clean, "w") as written:
            members = _members(archive)
            for name in (_MODEL, _SAMPLES, *_CONFIGS):
                if name not in members:
                    raise UsageError(f"has no {name}", where=str(path), expected=_EXPECTED)
            for name, entry in members.items():
                if _CODE.fullmatch(name):
                    raise _refused(path, name, "an object of a class of its own, or a library")
                if _KEPT.fullmatch(name):
                    written.writestr(f"it/{name}", _checked(torch, path, name, archive.read(entry)))
    except EdgeError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as e:
        raise UsageError(
            f"is no exported program: {e}",
            where=str(path),
            expected="what torch.export.save(torch.export.export(...), path) writes",
        ) from e


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """By name within the archive's one folder."""
    return {one.filename.partition("/")[2]: one for one in archive.infolist()}


def _checked(torch: Any, path: Path, name: str, data: bytes) -> bytes:
    """A member as torch may have it. Raises: UsageError."""
    if name == _SAMPLES:
        try:
            with foreign.quiet():
                torch.load(io.BytesIO(data), weights_only=True)
        except Exception as e:
            # Whatever it is, torch would unpickle it next.
            raise _refused(path, name, f"more than tensors ({type(e).__name__})") from e
        return data
    if name in _CONFIGS:
        listed = msgspec.json.decode(data, type=dict[str, dict[str, dict[str, Any]]])
        if any(one.get("use_pickle") for one in listed.get("config", {}).values()):
            raise _refused(path, name, "weights are pickled")
        return msgspec.json.encode(listed)
    if name == _MODEL:
        model = msgspec.json.decode(data, type=dict[str, Any])
        for reason in _unknown(model):
            raise _refused(path, name, reason)
        model["guards_code"] = []  # of the inputs; text that torch would compile and run
        return msgspec.json.encode(model)
    return data


def _refused(path: Path, name: str, reason: str) -> UsageError:
    return UsageError(
        f"{name}: {reason}; opening it may run code",
        where=str(path),
        expected=_EXPECTED,
        remedy=_REMEDY,
    )


def _unknown(part: Any) -> Iterator[str]:
    """What of a graph is neither an operator nor an expression of an export."""
    if isinstance(part, list):
        for one in part:
            yield from _unknown(one)
    elif isinstance(part, Mapping):
        for key, one in part.items():
            if key in ("target", "as_operator") and isinstance(one, str):
                if not _TARGET.fullmatch(one) or _FILES.match(one):
                    yield f"calls {one[:80]!r}, no operator of a network"
            elif key == "expr_str" and isinstance(one, str):
                if not is_size(one):
                    yield f"a size is {one[:80]!r}, no arithmetic"
            elif key in ("in_spec", "out_spec") and isinstance(one, str):
                if any(word in one for word in _IMPORTS):
                    yield "its inputs or outputs are classes of a module's own"
            else:
                yield from _unknown(one)


def is_size(text: str) -> bool:
    """Whether it is arithmetic over names and numbers, with sympy's classes."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(map(_is_arithmetic, nodes))


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and bool(_CLASS.fullmatch(node.func.id))
    if isinstance(node, ast.Name):
        return "__" not in node.id
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return bool(_TEXT.fullmatch(node.value)) and "__" not in node.value
    return isinstance(node, _EXPRESSION)
