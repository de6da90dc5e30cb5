"""A YAML text becomes a frozen struct, and what is wrong with it is said in our words.

Law of this file: it knows YAML, msgspec's structs and their `Meta`, and no option of anything:
which keys exist says the struct that the caller brings. An error names the file and the key path,
and for an unknown key the nearest one. It reads no file. `yaml` is imported when a text is parsed,
so that what runs without one does not pay for it.

A field's `Meta` may say its unit (`extra["unit"]`) and its kind of value (`extra["expected"]`).
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from edge_runtime.errors import EdgeError, UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Row(NamedTuple):
    """One option as people see it: `default` is what holds where nothing is said."""

    path: str
    value: Any
    default: Any
    unit: str
    reason: str


# --- reading ------------------------------------------------------------------------------------


def parse(data: bytes, where: str) -> Any:
    """The plain values that a YAML text says, or None for an empty one.

    Raises:
        UsageError: it is not YAML, a key is given twice, or it is nested too deeply.

    PyYAML's pure loader, on purpose: libyaml's composer recurses in C, and deep nesting ends the
    process there; here it is a RecursionError.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
                if key in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark
                    )
                if key is not None:
                    seen.add(key)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(data, Loader=Loader)  # a SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise UsageError(f"{error.problem or error}", where=f"{where}{line}") from error
    # Not only YAMLError: impossible dates and wrong explicit tags raise what int() or dict[] raise.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"is not YAML: {str(error).partition(chr(10))[0]}", where=where) from error
    except RecursionError as error:
        raise UsageError("is nested too deeply", where=where) from error


# --- checking -----------------------------------------------------------------------------------

_UNITS = {"": 1, "B": 1, "KIB": KIB, "MIB": MIB, "GIB": GIB}
_S = TypeVar("_S", bound=msgspec.Struct)


def mapping(value: Any, where: str, path: str) -> dict[Any, Any]:
    """The value, if it is a mapping. Raises: UsageError."""
    if not isinstance(value, dict):
        raise wrong(value, where, path, "a mapping of keys to values")
    return value


def wrong(value: Any, where: str, path: str, expected: str) -> UsageError:
    """The error for a value of the right type that is not allowed."""
    # reprlib: an aliased document may be short in the file and endless when written out
    message = f"wrong value {reprlib.repr(value)}"
    return UsageError(message, where=at(where, path), expected=expected)


def at(where: str, path: str) -> str:
    """The file and the key path, as errors name them."""
    return f"{where}: {path}" if path else where


def sized(value: Any, where: str, path: str) -> Any:
    """A copy in which the text of every `*bytes*` key (`64 MiB`) is its number of bytes.

    Raises:
        UsageError: a key is not text, or the text is no size.
    """
    if not isinstance(value, dict):
        return value
    copy = {}
    for key, inner in value.items():
        inner_path = f"{path}.{key}" if path else str(key)
        if not isinstance(key, str):
            raise UsageError(
                f"the key {reprlib.repr(key)} is not text",
                where=at(where, path),
                remedy="put it in quotes if it is meant so",
            )
        if isinstance(inner, str) and inner != "auto" and "byte" in key:
            copy[key] = _bytes_of(inner, where, inner_path)
        elif path.count(".") < 3:  # our keys are at most four deep; aliases may nest for ever
            copy[key] = sized(inner, where, inner_path)
        else:
            copy[key] = inner
    return copy


def _bytes_of(text: str, where: str, path: str) -> int:
    digits = text.strip().rstrip("BKMGiIbkmg").strip()
    unit = text.strip()[len(digits) :].strip().upper()
    if not (digits.isascii() and digits.isdigit() and len(digits) < 18) or unit not in _UNITS:
        raise wrong(text, where, path, "bytes, such as 1048576, 64 KiB, 8 MiB or 2 GiB")
    return int(digits) * _UNITS[unit]


def convert(document: dict[Any, Any], kind: type[_S], where: str, path: str) -> _S:
    """The mapping as that struct; `path` is where in the file it stands.

    Raises:
        UsageError: an unknown key (nearest match named), a wrong type, or a value out of range.
    """
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise _explained(error, document, kind, where, path) from error


# --- explaining ---------------------------------------------------------------------------------


def _explained(
    error: msgspec.ValidationError,
    document: dict[Any, Any],
    kind: type[msgspec.Struct],
    where: str,
    prefix: str,
) -> EdgeError:
    """msgspec's verdict in our words: it names the inner path (`$.restart`), we the file.

    Its messages end in " - at `$PATH`"; an unknown key reads "... unknown field `KEY`".
    """
    text, _, tail = str(error).partition(" - at `$")
    inner = [part for part in tail.rstrip("`").replace("[", ".[").split(".") if part]
    path = ".".join([*([prefix] if prefix else []), *inner]).replace(".[", "[")
    owner, meta, hint = _field(kind, inner)
    if "unknown field `" in text:
        key = text.partition("unknown field `")[2].rstrip("`")
        return _unknown(key, owner, where, f"{path}.{key}" if path else key)
    value = _value(document, inner)
    extra = (meta.extra if meta else None) or {}
    expected = extra.get("expected") or _expected(text, meta, hint)
    return wrong(value, where, path, expected)


def _unknown(key: str, owner: type[msgspec.Struct], where: str, path: str) -> UsageError:
    known = owner.__struct_fields__
    near = did_you_mean(key, known)
    expected = "" if near else "one of " + ", ".join(known)
    return UsageError(f"unknown key {key!r}", where=at(where, path), expected=expected, remedy=near)


def _field(
    kind: type[msgspec.Struct], parts: list[str]
) -> tuple[type[msgspec.Struct], Meta | None, Any]:
    """Follow a path through the structs: the last struct, and the last field's Meta and type."""
    owner, meta, hint = kind, None, None
    for part in parts:
        if part.startswith("["):
            continue
        hint = next(field.type for field in msgspec.structs.fields(owner) if field.name == part)
        meta, inner = _annotation(hint)
        owner = inner or owner
    return owner, meta, hint


def _annotation(hint: Any) -> tuple[Meta | None, type[msgspec.Struct] | None]:
    """The Meta of an annotation, and the struct inside it, if any."""
    metas = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Meta)]
    core = getattr(hint, "__origin__", hint) if metas else hint
    for option in (core, *getattr(core, "__args__", ())):
        if isinstance(option, type) and issubclass(option, msgspec.Struct):
            return (metas[0] if metas else None), option
    return (metas[0] if metas else None), None


def _value(document: Any, parts: list[str]) -> Any:
    for part in parts:
        if part.startswith("[") and part[1:-1].isdigit() and isinstance(document, list):
            document = document[int(part[1:-1])]
        elif isinstance(document, dict):
            document = document.get(part)
    return document


def _expected(text: str, meta: Meta | None, hint: Any) -> str:
    """From msgspec's "Expected `int` <= 19" and the bounds: an integer from 0 to 19."""
    names = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}
    names |= {"array": "a list", "object": "a mapping of keys to values"}
    if "enum value" in text:
        choices = getattr(getattr(hint, "__origin__", hint), "__args__", ())
        return "one of " + ", ".join(str(choice) for choice in choices)
    kind = text.partition("`")[2].partition("`")[0]
    expected = " or ".join(names.get(name, name) for name in kind.split(" | "))
    if meta is not None and meta.ge is not None:
        unit = (meta.extra or {}).get("unit")
        expected += f" from {meta.ge} to {meta.le}" + (f" ({unit})" if unit else "")
    return expected


def rows(
    struct: msgspec.Struct, default: msgspec.Struct, prefix: str, skip: Container[str] = ()
) -> Iterator[Row]:
    """Every field, those of inner structs with their path; `skip` names fields of this struct."""
    for field in msgspec.structs.fields(type(struct)):
        if field.name in skip:
            continue
        value, usual = getattr(struct, field.name), getattr(default, field.name)
        meta, _ = _annotation(field.type)
        if isinstance(value, msgspec.Struct) and isinstance(usual, msgspec.Struct):
            yield from rows(value, usual, f"{prefix}{field.name}.")
            continue
        unit = str((meta.extra or {}).get("unit", "")) if meta else ""
        plain = msgspec.to_builtins((value, usual))
        reason = (meta and meta.description) or ""
        yield Row(f"{prefix}{field.name}", plain[0], plain[1], unit, reason)
