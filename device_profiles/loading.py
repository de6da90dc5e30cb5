"""Profiles from their files: read, inherit, check, and remember from which file each value comes.

Law of this file: it reads YAML files and turns them into `Resolved`; it looks at no machine and
chooses nothing. `yaml` is imported when a file is read, so that what runs without one does not pay.

Inheritance (`extends`): mappings are merged key by key, everything else is replaced as a whole,
and `null` takes an inherited key away. Name, title, kind, notes on what is unknown and sources stay
with their file: a value's source is the one that its own file gives.
"""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_origin

import msgspec

from device_profiles.schema import NAME_PATTERN, Profile, ProfileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

BUILT_IN = Path(__file__).parent / "boards"
# Where an operator's own profiles are found by name; they come before the built-in ones.
OWN = Path("/etc/edge-runtime/profiles")
DIRECTORIES = (OWN, BUILT_IN)

# A profile has some 5 KiB; anything much larger is not one.
FILE_BYTES_MAX = 256 << 10
# More is a loop that we did not see, or nobody can follow it.
EXTENDS_MAX = 8
_OF_THE_FILE = ("name", "title", "kind", "extends", "sources", "unknown")
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class Resolved(NamedTuple):
    """A profile with all that it inherits."""

    profile: Profile
    origins: dict[str, str]  # key path of each value -> the file that gave it
    files: tuple[str, ...]  # the profile's own first, then what it extends (or is added to it)
    sources: dict[str, dict[str, str]]  # file -> its `sources`

    def source(self, path: str) -> str:
        """Where the file that gave the value at a key path has it from; "": it does not say."""
        given = self.sources.get(self.origins.get(path, ""), {})
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            if (key := ".".join(parts[:end])) in given:
                return given[key]
        return ""


def names(directories: Sequence[Path] = DIRECTORIES) -> list[str]:
    """The profiles that can be asked for by name, sorted."""
    found = {path.stem for directory in directories for path in _yaml_files(directory)}
    return sorted(name for name in found if re.fullmatch(NAME_PATTERN, name))


def load(wanted: str, directories: Sequence[Path] = DIRECTORIES) -> Resolved:
    """A profile by name, or by path when `wanted` has a "/" or ends in ".yaml".

    Raises:
        ProfileError: no such profile, it cannot be read, or it (or what it extends) is wrong; the
            file and key path are named, for an unknown key the nearest known one.
    """
    chain: list[tuple[str, dict[str, Any]]] = []
    path = _find(wanted, Path(), directories, "")
    seen = {path.resolve()}
    while True:
        label = label_of(path)
        document = _read(path, label)
        chain.append((label, document))
        parent = document.get("extends")
        if not parent:
            return _resolve(chain)
        if len(chain) == EXTENDS_MAX:
            raise ProfileError(
                f"more than {EXTENDS_MAX} profiles extend each other", where=f"{label}: extends"
            )
        path = _find(str(parent), path.parent, directories, f"{label}: extends", seen)
        seen.add(path.resolve())


def load_all(
    directories: Sequence[Path] = DIRECTORIES,
) -> tuple[list[Resolved], list[ProfileError]]:
    """Every profile that can be asked for by name, and what is wrong with those that cannot: one
    bad file must not hide the others.
    """
    good: list[Resolved] = []
    bad: list[ProfileError] = []
    for name in names(directories):
        try:
            good.append(load(name, directories))
        except ProfileError as error:
            bad.append(error)
    return good, bad


def compose(board: Resolved, addons: Iterable[Resolved]) -> Resolved:
    """A board with its add-ons: their accelerators beside the board's, their backends before it."""
    whole = board
    for addon in addons:
        extra = addon.profile
        own = {path: file for path, file in addon.origins.items() if _added(path)}
        whole = Resolved(
            msgspec.structs.replace(
                whole.profile,
                backends=extra.backends + whole.profile.backends,
                accelerators=whole.profile.accelerators | extra.accelerators,
                sources=whole.profile.sources
                | {key: text for key, text in extra.sources.items() if _added(key)},
                unknown=whole.profile.unknown | extra.unknown,
            ),
            whole.origins | own,
            (*whole.files, *addon.files),
            whole.sources | addon.sources,
        )
    return whole


def parse(document: Any, where: str) -> Profile:
    """One document as it stands, without what it extends.

    Raises:
        ProfileError: as `load`.
    """
    return _convert(_plain(document, where), where)


def label_of(path: Path) -> str:
    """A file as people see it."""
    return f"built in: {path.name}" if path.parent == BUILT_IN else str(path)


# --- finding and reading ------------------------------------------------------------------------


def _yaml_files(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".yaml")
    except OSError:
        return []  # an operator need not have own profiles


def _find(
    wanted: str,
    beside: Path,
    directories: Sequence[Path],
    where: str,
    seen: Iterable[Path] = (),
) -> Path:
    """The file of a profile; one of the same name that was read already is passed over, so that an
    operator's `x.yaml` may extend the built-in `x`.
    """
    if "/" in wanted or wanted.endswith(".yaml"):
        path = beside / wanted
        if path.resolve() in seen:
            raise ProfileError("a profile extends itself", where=where)
        return path
    for directory in directories:
        path = directory / f"{wanted}.yaml"
        if path.is_file() and path.resolve() not in seen:
            return path
    known = names(directories)
    near = difflib.get_close_matches(wanted, known, n=1)
    raise ProfileError(
        f"there is no profile {wanted!r}",
        where=where,
        expected="" if near else "one of " + ", ".join(known),
        remedy=f"did you mean {near[0]!r}?" if near else "a path has a '/' or ends in .yaml",
    )


def read_yaml(path: Path) -> Any:
    """The plain values of a file that is one of ours, or an operator's.

    Raises:
        ProfileError: it cannot be read, is too large, or is not YAML.
    """
    label = label_of(path)
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ProfileError(f"cannot be read: {error.strerror}", where=label) from error
    if len(data) > FILE_BYTES_MAX:
        raise ProfileError(
            "the file is too large to be a profile",
            where=label,
            expected=f"at most {FILE_BYTES_MAX} bytes",
        )
    return _yaml(data, label, trusted=path.parent == BUILT_IN)


def _read(path: Path, label: str) -> dict[str, Any]:
    document = _plain(read_yaml(path), label)
    _convert(document, label, partial=True)
    return document


def _yaml(data: bytes, where: str, *, trusted: bool) -> Any:
    """The YAML document; duplicate keys are refused.

    libyaml's composer recurses in C, where deep nesting ends the process: only files that we ship
    are read with it (ten times faster); others with PyYAML's own, where it is a RecursionError.
    """
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if trusted else yaml.SafeLoader

    class Loader(base):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {twice!r} is given twice", problem_mark=node.start_mark
                )
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        return yaml.load(data, Loader=Loader)  # a SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ProfileError(f"{error.problem or error}", where=f"{where}{line}") from error
    # Not only YAMLError: impossible dates and wrong explicit tags raise what int() or dict[] raise.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        first = str(error).partition("\n")[0]
        raise ProfileError(f"is not YAML: {first}", where=where) from error
    except RecursionError as error:
        raise ProfileError("is nested too deeply", where=where) from error


# --- inheritance --------------------------------------------------------------------------------


def _resolve(chain: list[tuple[str, dict[str, Any]]]) -> Resolved:
    """Merge from the far end: `chain` begins with the profile itself."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for label, document in reversed(chain):
        inherited = {key: value for key, value in document.items() if key not in _OF_THE_FILE}
        _merge(values, inherited, label, origins, "")
    own_label, own = chain[0]
    sources = {label: document.get("sources") or {} for label, document in chain}
    merged: dict[str, str] = {}
    for label, _ in reversed(chain):
        merged |= sources[label]
    values |= {key: own[key] for key in _OF_THE_FILE if key in own}
    values["sources"] = merged
    return Resolved(
        _convert(values, own_label), origins, tuple(label for label, _ in chain), sources
    )


def _merge(
    into: dict[str, Any], extra: Mapping[str, Any], label: str, origins: dict[str, str], path: str
) -> None:
    for key, value in extra.items():
        inner = f"{path}.{key}" if path else key
        if isinstance(value, dict) and not _whole(inner):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, label, origins, inner)
            continue
        for gone in [one for one in origins if one == inner or one.startswith(f"{inner}.")]:
            del origins[gone]
        if value is None:
            into.pop(key, None)
        else:
            into[key] = value
            origins[inner] = label


def _whole(path: str) -> bool:
    """Mappings that are one value: nobody wants half of the parent's."""
    return path.startswith("match.dmi.")


def _added(path: str) -> bool:
    """What an add-on gives to a board."""
    return path.partition(".")[0] in ("accelerators", "backends")


# --- checking -----------------------------------------------------------------------------------


def _plain(document: Any, where: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ProfileError("is not a profile", where=where, expected="a mapping of keys to values")
    plain: dict[str, Any] = _sized(document, where, "")
    return plain


def _sized(value: Any, where: str, path: str) -> Any:
    """A copy in which the text of every `*bytes*` key (`64 MiB`) is its number of bytes."""
    if isinstance(value, list):
        return [_sized(one, where, f"{path}[{index}]") for index, one in enumerate(value)]
    if not isinstance(value, dict):
        return value
    copy = {}
    for key, inner in value.items():
        if not isinstance(key, str):
            raise ProfileError(
                f"the key {key!r} is not text",
                where=_at(where, path),
                remedy="put it in quotes if it is meant so",
            )
        inner_path = f"{path}.{key}" if path else key
        if isinstance(inner, str) and "_bytes" in key and path != "sources":
            copy[key] = _bytes_of(inner, where, inner_path)
        else:
            copy[key] = _sized(inner, where, inner_path)
    return copy


def _bytes_of(text: str, where: str, path: str) -> int:
    match = re.fullmatch(r"\s*([0-9]{1,17})\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise ProfileError(
            f"wrong value {text!r}",
            where=_at(where, path),
            expected="bytes, such as 1048576, 64 KiB, 8 MiB or 2 GiB",
        )
    return int(match[1]) * _UNITS[match[2].upper()]


def _convert(document: dict[str, Any], where: str, partial: bool = False) -> Profile:
    """The typed profile. `partial`: a document that extends another may lack what that one has."""
    for path, key, known in _unknown_keys(document, Profile, ""):
        near = difflib.get_close_matches(key, known, n=1)
        raise ProfileError(
            f"unknown key {key!r}",
            where=_at(where, f"{path}.{key}" if path else key),
            expected="" if near else "one of " + ", ".join(known),
            remedy=f"did you mean {near[0]!r}?" if near else "",
        )
    if partial and document.get("extends"):
        return Profile(name="partial", title="")
    try:
        profile = msgspec.convert(document, Profile)
    except msgspec.ValidationError as error:
        text, _, tail = str(error).partition(" - at `$")
        raise ProfileError(
            f"wrong value: {text[:1].lower()}{text[1:]}", where=_at(where, tail.strip("`."))
        ) from error
    _check_together(profile, where)
    return profile


def _check_together(profile: Profile, where: str) -> None:
    """What no single field can say."""
    for index, choice in enumerate(profile.backends):
        if choice.accelerator and choice.accelerator not in profile.accelerators:
            raise ProfileError(
                f"names an accelerator {choice.accelerator!r} that the profile does not have",
                where=_at(where, f"backends[{index}].accelerator"),
                expected="one of " + (", ".join(profile.accelerators) or "none"),
            )
    if profile.kind == "addon":
        board_only = ("clusters", "workers", "memory", "thermal")
        empty = Profile(name="empty", title="")
        for key in board_only:
            if getattr(profile, key) != getattr(empty, key):
                raise ProfileError(
                    "an add-on has no say in this: it only adds accelerators and backends",
                    where=_at(where, key),
                )


def _unknown_keys(value: Any, hint: Any, path: str) -> Iterator[tuple[str, str, list[str]]]:
    """(path, key, known keys) of every key that no struct has."""
    struct = _struct_in(hint)
    if isinstance(value, dict) and struct is not None:
        fields = _fields(struct)
        if get_origin(hint) is dict:
            for key, inner in value.items():
                yield from _unknown_keys(inner, struct, f"{path}.{key}")
            return
        for key, inner in value.items():
            if key not in fields:
                yield path, key, list(fields)
            else:
                yield from _unknown_keys(inner, fields[key], f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unknown_keys(inner, struct, f"{path}[{index}]")


@functools.cache
def _fields(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Its fields and their types; evaluating these takes longer than everything else here."""
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


def _struct_in(hint: Any) -> type[msgspec.Struct] | None:
    """The struct that a type is made of: itself, or the items of a tuple or dict."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint
    return next((one for inner in get_args(hint) if (one := _struct_in(inner))), None)


def _at(where: str, path: str) -> str:
    return f"{where}: {path}" if path else where
