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

_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)
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
        return UsageError(f"wrong value: {what[:1].lower()}{what[1:]}", where=f"{where}{path}")
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


def _names(kind: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(kind)]
