"""YAML text to plain values and back: the only door to PyYAML in `bundle/`.

Law of this file: it knows mappings, lists and scalars, not what they mean. Reading is bounded in
size, depth and number of values and takes a subset of YAML 1.2 (of which JSON is a part): no
aliases, no tags, no duplicate keys, keys are text, numbers are finite and fit 64 bits. So a
hostile text can neither grow nor surprise. Writing is done here and not by PyYAML, because the
bytes must be the same with every version of it and with and without its C parts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from edge_runtime.errors import BundleError

# A manifest with 20,000 labels has 0.5 MB. The daemon parses it, so time and memory are bounded.
SIZE_BYTES_MAX = 4 * 1024 * 1024
VALUES_MAX = 200_000  # scalars, lists and mappings together; about a second of parsing
DEPTH_MAX = 32  # the typed part needs 6; the card is the user's

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# The scalars of the core schema of YAML 1.2 (10.3.2), without 0o and 0x: nobody counts tensors so.
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}
_CONSTANTS |= {
    "Null": None,
    "NULL": None,
    "True": True,
    "TRUE": True,
    "False": False,
    "FALSE": False,
}
_INTEGER = re.compile(r"[-+]?[0-9]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def load(data: bytes, where: str) -> dict[str, Any]:
    """The mapping that a YAML or JSON text says.

    Args:
        data: UTF-8 text, at most SIZE_BYTES_MAX.
        where: name of the file, for errors.

    Raises:
        BundleError: not UTF-8, not YAML, outside the subset or over a limit; names the line.
    """
    if len(data) > SIZE_BYTES_MAX:
        raise BundleError(
            f"{len(data)} bytes of text", where=where, expected=f"at most {SIZE_BYTES_MAX} bytes"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise BundleError(f"byte {e.start} is not UTF-8", where=where, expected="UTF-8 text") from e
    builder = _Builder(where)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            builder.take(event)
    except (yaml.YAMLError, ValueError, OverflowError) as e:
        problem = str(getattr(e, "problem", None) or str(e).splitlines()[0])
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        raise BundleError(problem, where=f"{where}{line}", expected="YAML or JSON") from e
    if not isinstance(builder.root, dict):
        raise BundleError(
            "does not hold a mapping", where=where, expected="a mapping (`name: value` lines)"
        )
    return builder.root


class _Builder:
    """Makes values of parser events; iterative, so that depth costs no stack."""

    def __init__(self, where: str) -> None:
        self.root: Any = None
        self._where = where
        self._open: list[dict[str, Any] | list[Any]] = []
        self._keys: list[str | None] = []  # beside _open: the key that waits for its value
        self._values = 0
        self._documents = 0
        self._line = 0

    def take(self, event: Any) -> None:
        self._line = event.start_mark.line + 1
        match event:
            case yaml.AliasEvent():
                raise self._error("uses an alias", "every value written out")
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    raise self._error("holds a second document", "one document")
            case yaml.ScalarEvent():
                self._check_node(event)
                self._add_scalar(event.value, plain=not event.style)
            case yaml.MappingStartEvent():
                self._check_node(event)
                self._enter({})
            case yaml.SequenceStartEvent():
                self._check_node(event)
                self._enter([])
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._leave()

    def _check_node(self, event: Any) -> None:
        self._values += 1
        if self._values > VALUES_MAX:
            raise self._error("holds too many values", f"at most {VALUES_MAX}")
        if event.anchor is not None:
            raise self._error(f"uses an anchor (&{event.anchor})", "every value written out")
        if event.tag is not None:
            raise self._error(f"uses the tag {event.tag!r}", "plain text, numbers, lists, mappings")

    def _add_scalar(self, text: str, *, plain: bool) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise self._error("text holds half of a surrogate pair", "whole characters") from e
        try:
            value = resolve(text) if plain else text
        except ValueError as e:
            raise self._error(str(e), "a finite number of 64 bits, or quoted text") from e
        self._add(value)

    def _enter(self, container: dict[str, Any] | list[Any]) -> None:
        self._add(container)
        if len(self._open) >= DEPTH_MAX:
            raise self._error("is nested too deeply", f"at most {DEPTH_MAX} levels")
        self._open.append(container)
        self._keys.append(None)

    def _leave(self) -> None:
        self._open.pop()
        self._keys.pop()
        if self._keys:
            self._keys[-1] = None

    def _add(self, value: Any) -> None:
        if not self._open:
            self.root = value
            return
        parent, key = self._open[-1], self._keys[-1]
        if isinstance(parent, list):
            parent.append(value)
        elif key is None:
            self._keys[-1] = self._check_key(value, parent)
        else:
            parent[key] = value
            if not isinstance(value, dict | list):  # else when it is closed: errors name the path
                self._keys[-1] = None

    def _check_key(self, key: Any, parent: dict[str, Any]) -> str:
        if not isinstance(key, str):
            shown = "a list or mapping" if isinstance(key, dict | list) else repr(key)
            raise self._error(f"{shown} is used as a key", "text; put it in quotes")
        if key in parent:
            raise self._error(f"the key {key!r} is there twice", "each key once")
        return key

    def _error(self, message: str, expected: str) -> BundleError:
        path = ""
        for container, key in zip(self._open, self._keys, strict=True):
            is_last = container is self._open[-1]
            index = len(container) if is_last else len(container) - 1  # the last awaits a value
            path += f"[{index}]" if isinstance(container, list) else f".{key or ''}"
        path = path.strip(".")[:300]
        where = f"{self._where} line {self._line}" + (f": {path}" if path else "")
        return BundleError(message, where=where, expected=expected)


def resolve(text: str) -> Any:
    """The value of an unquoted scalar.

    Raises:
        ValueError: a number that is not finite or does not fit 64 bits.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        value = int(text) if len(text) <= 20 else 1 << 64
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"the number {text[:40]} does not fit 64 bits")
        return value
    if _FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"the number {text[:40]} is too large")
        return number
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    return text


def dump(document: dict[str, Any]) -> bytes:
    """The mapping as YAML: the same bytes for the same values in the same order.

    `load(dump(document))` equals `document` if its values are what `load` can give.
    """
    return "".join(line + "\n" for line in _mapping_lines(document, "")).encode()


# Text that needs no quotes, for us or for readers of YAML 1.1, to whom `no` is false.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+-]+)*", re.ASCII)
_QUOTED = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
# What JSON leaves as it is, but YAML folds (line breaks) or forbids (not printable).
_ESCAPED = re.compile("[\x7f-\x9f\xa0\xad\u2028\u2029\ufeff\ufffe\uffff\U0001fffe-\U0010ffff]")
_FLOW_COLUMNS = 80


def _mapping_lines(mapping: dict[str, Any], indent: str) -> Iterator[str]:
    if not mapping:
        yield indent + "{}"
    for key, value in mapping.items():
        yield from _value_lines(f"{indent}{_text(key)}:", value, indent)


def _list_lines(items: list[Any], indent: str) -> Iterator[str]:
    for item in items:
        if isinstance(item, dict) and item:
            lines = _mapping_lines(item, indent + "  ")
            yield f"{indent}- {next(lines).lstrip()}"
            yield from lines
        else:
            yield from _value_lines(indent + "-", item, indent)


def _value_lines(head: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        yield head
        yield from _mapping_lines(value, indent + "  ")
    elif isinstance(value, list | tuple) and not _is_short(value):
        yield head
        yield from _list_lines(list(value), indent + "  ")
    else:
        yield f"{head} {_flow(value)}"


def _is_short(items: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a list is written in one line: numbers, as in shapes."""
    numbers = all(isinstance(item, int | float) for item in items)
    return numbers and len(_flow(items)) <= _FLOW_COLUMNS


def _flow(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    assert value is None or isinstance(value, bool | int | float | dict), value
    return json.dumps(value, allow_nan=False)


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _QUOTED:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return _ESCAPED.sub(lambda match: f"\\U{ord(match[0]):08x}", quoted)
