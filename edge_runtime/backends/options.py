"""The options of a variant, typed.

Law of this file: values in, values out; it knows no library and no single option. Each backend
states its options as one frozen Struct with defaults; this turns `variants[n].options` into it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from edge_runtime.errors import UsageError, did_you_mean

Typed = TypeVar("Typed", bound=msgspec.Struct)

_PATH = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
_PART = re.compile(r"\.(?P<name>\w+)|\[(?P<place>[^\]]*)\]")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)


def decode(kind: type[Typed], options: Mapping[str, Any], where: str = "options") -> Typed:
    """The options as a `kind`.

    `where` is the key path of the mapping itself. A caller that knows more (which variant of which
    bundle) may put its own part before `error.where`.

    Raises:
        UsageError: an unknown option (the nearest known one is named), or a value of a wrong type
            or out of range; `where` ends in the option's name.
    """
    try:
        return msgspec.convert(dict(options), kind)
    except msgspec.ValidationError as e:
        raise _explain(str(e), kind, where) from e


def _explain(problem: str, kind: type[msgspec.Struct], where: str) -> UsageError:
    match = _PATH.match(problem)
    assert match, problem
    what, path = match["what"], match["path"] or ""
    unknown = _UNKNOWN.match(what)
    if not unknown:
        choices = _choices(kind, path, bool(match["key"])) if "enum value" in what else []
        return UsageError(
            f"wrong value: {what[:1].lower()}{what[1:]}",
            where=f"{where}{path}",
            expected="one of " + ", ".join(choices) if choices else "",
        )
    name = unknown["name"]
    known = (
        _names(kind) if not path else []
    )  # deeper structures are small: their own list helps less
    return UsageError(
        f"unknown option {name!r}",
        where=f"{where}{path}.{name}",
        expected="one of " + ", ".join(known) if known else "",
        remedy=did_you_mean(name, known),
    )


def _choices(kind: type[msgspec.Struct], path: str, is_key: bool) -> list[str]:
    """What the field at `path` (or a key in it) may be, where it is one of a few; else nothing."""
    from msgspec import inspect  # only for a message

    found: Any = inspect.type_info(kind)
    for part in _PART.finditer(path):
        found = _inner(found)
        if part["name"] and isinstance(found, inspect.StructType):
            fields = {field.encode_name: field.type for field in found.fields}
            found = fields.get(part["name"])
        else:
            found = getattr(found, "item_type", getattr(found, "value_type", None))
    found = _inner(found)
    found = getattr(found, "key_type", None) if is_key else found
    return [str(one) for one in getattr(found, "values", ())]


def _inner(found: Any) -> Any:
    """Of "this or nothing" this; what `Annotated` says of a type is left out."""
    from msgspec import inspect

    while isinstance(found, inspect.UnionType | inspect.Metadata):
        if isinstance(found, inspect.Metadata):
            found = found.type
        else:
            found = next(one for one in found.types if not isinstance(one, inspect.NoneType))
    return found


def _names(kind: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(kind)]
