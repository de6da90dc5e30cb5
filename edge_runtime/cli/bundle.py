"""Commands for bundles: create, inspect, lint, extract, pack. They need no daemon.

Law of this file: arguments in, one call of `edge_runtime.bundle`, its answer as text or JSON. Only
`create` loads a backend, and with it numpy; the others read files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cli import arguments as args
from edge_runtime.cli import output
from edge_runtime.errors import BundleError, NotFoundError, StorageError, UsageError, did_you_mean

if TYPE_CHECKING:
    import argparse

    from edge_runtime.bundle.create import Created, Load, Options, Say
    from edge_runtime.bundle.lint import Finding
    from edge_runtime.bundle.manifest import Postprocess, Preprocess

GOLDENS_MAX = 1000  # each is a run at every load of the model, and files in the bundle


def add_parser(subparsers: Any) -> None:
    """Add `bundle` with its own commands."""
    parser = subparsers.add_parser("bundle", help="create, inspect, lint or extract a bundle")
    commands = parser.add_subparsers(dest="bundle_command", metavar="COMMAND", required=True)
    _add_create(commands)
    inspect = commands.add_parser("inspect", help="show what a bundle holds")
    inspect.add_argument("bundle", metavar="BUNDLE", type=Path)
    inspect.set_defaults(handler=_inspect)
    lint = commands.add_parser("lint", help="check a bundle or a model file")
    lint.add_argument("path", metavar="BUNDLE|MODEL", type=Path)
    lint.set_defaults(handler=_lint)
    extract = commands.add_parser("extract", help="write a bundle as a directory")
    extract.add_argument("bundle", metavar="BUNDLE", type=Path)
    extract.add_argument("directory", metavar="DIR", type=Path)
    extract.set_defaults(handler=_extract)
    pack = commands.add_parser("pack", help="write a directory as a bundle")
    pack.add_argument("directory", metavar="DIR", type=Path)
    pack.add_argument("-o", "--out", metavar="FILE", type=Path, required=True)
    pack.set_defaults(handler=_pack)
    for command in commands.choices.values():
        args.add_global(command)


def _add_create(commands: Any) -> None:
    create = commands.add_parser(
        "create",
        help="make a bundle of model files",
        description="Several models become variants of one; the first one's answers count.",
    )
    add = create.add_argument
    add("models", metavar="[BACKEND=]MODEL", type=_choice, nargs="+")
    add("--name", required=True, help="the model's name: a-z 0-9 . _ -")
    add("--version", type=args.count, default=1, metavar="N", help="a counter (default 1)")
    add("--label", default="", help="the version for people: 1.4.2")
    add("--goldens", type=_goldens, default=3, metavar="N", help="recorded answers (default 3)")
    add("--samples", type=Path, metavar="FILE", help="real inputs for the goldens: .npz or .npy")
    add("--shape", action="append", default=[], metavar="INPUT=1,3,64,64", help="fix free sizes")
    add(
        "--option",
        action="append",
        default=[],
        metavar="BACKEND.NAME=VALUE",
        help="an option of all variants of a backend: litert.stateful=keep; JSON or text",
    )
    add("--seed", type=_goldens, default=0, metavar="S", help="of generated inputs (default 0)")
    add("--labels", type=Path, metavar="FILE", help="names of the output's values, one a line")
    add("--activation", default="none", choices=("none", "softmax", "sigmoid"))
    add("--top-k", type=args.count, default=3, metavar="K")
    add(
        "--preprocess",
        nargs="+",
        metavar="KEY=VALUE",
        help="how an image becomes the input: color layout resize width height pixel_scale mean "
        "std input; mean=0.485,0.456,0.406 gives one value for each channel",
    )
    add(
        "--measure",
        action="store_true",
        help="serve each variant here for a moment, and state the memory that it takes",
    )
    add("-o", "--out", metavar="FILE", type=Path, required=True)
    create.set_defaults(handler=_create)


def _choice(text: str) -> tuple[str, Path]:
    """The backend ("": the usual one of the format) and the file."""
    from edge_runtime.backends import BACKENDS

    backend, equals, path = text.partition("=")
    return (backend, Path(path)) if equals and backend in BACKENDS else ("", Path(text))


def _goldens(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"{text!r} is not a whole number of at least 0")
    return int(text)


# --- create --------------------------------------------------------------------------------------


def _create(arguments: argparse.Namespace) -> int:
    from edge_runtime.bundle import create
    from edge_runtime.cli.progress import Progress

    options = _options(arguments)
    load = _backend_loader() if options.goldens else None
    models = [create.Choice(path, backend) for backend, path in arguments.models]
    with Progress(sys.stderr, quiet=arguments.json) as progress:
        made = create.create(models, options, arguments.out, load, progress.update)
        if arguments.measure:
            made = _with_memory(arguments.out, made, progress.update)
    reply = {"out": str(arguments.out), "sha256": made.sha256, "notes": list(made.notes)}
    if arguments.json:
        output.print_json({**reply, **_described(arguments.out)})
        return 0
    print(_described_text(_described(arguments.out)))
    for note in made.notes:
        print(f"note: {output.printable(note)}")
    print(f"wrote {arguments.out}, sha256 {made.sha256}")
    return 0


def _with_memory(path: Path, made: Created, say: Say) -> Created:
    """State in the bundle at `path` what its variants take when they are served here."""
    import msgspec

    from edge_runtime.bundle import archive
    from edge_runtime.cli import measuring

    measured = []
    for variant in made.manifest.variants:
        say(f"measuring the memory of {variant.name}", 0, 0)
        measured.append(measuring.measure(path, made.manifest.name, variant.name))
    notes = [
        f"{one.variant}: its memory was not measured: {one.problem}"
        if one.problem
        else f"{one.variant} takes {output.size(one.private_bytes)} here"
        for one in measured
    ]
    budget_bytes = measuring.budget_bytes(measured)
    if not budget_bytes:
        return made._replace(notes=(*made.notes, *notes))
    notes.append(f"budgets.memory_bytes: {output.size(budget_bytes)}, with room for other devices")
    budgets = msgspec.structs.replace(made.manifest.budgets, memory_bytes=budget_bytes)
    manifest = msgspec.structs.replace(made.manifest, budgets=budgets)
    with archive.open_bundle(path) as bundle:
        stated = archive.compose(manifest, {one: bundle.blob(one) for one, _, _ in bundle.blobs()})
        sha256 = archive.pack(stated, path)
    return made._replace(manifest=stated.manifest, sha256=sha256, notes=(*made.notes, *notes))


def _options(arguments: argparse.Namespace) -> Options:
    from edge_runtime.bundle.create import Options

    if arguments.goldens > GOLDENS_MAX:
        raise UsageError(f"--goldens {arguments.goldens}", expected=f"at most {GOLDENS_MAX}")
    return Options(
        name=arguments.name,
        version=arguments.version,
        label=arguments.label,
        goldens=arguments.goldens,
        samples=arguments.samples,
        seed=arguments.seed,
        shapes=dict(_shape(text) for text in arguments.shape),
        backend_options=_backend_options(arguments.option),
        preprocess=_preprocess(arguments.preprocess),
        postprocess=_postprocess(arguments),
    )


def _backend_loader() -> Load:
    """Loads an artifact in this process: the builder's own models, linted."""
    from edge_runtime import backends

    return lambda variant, path: backends.backend(variant.backend).load(path, variant.options).run


def _backend_options(texts: list[str]) -> dict[str, dict[str, Any]]:
    import msgspec

    from edge_runtime.backends import BACKENDS

    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        backend, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise UsageError(
                f"{text!r} is no option", where="--option", expected="litert.stateful=keep"
            )
        if backend not in BACKENDS:
            raise UsageError(
                f"unknown backend {backend!r}",
                where="--option",
                expected="one of " + ", ".join(BACKENDS),
                remedy=did_you_mean(backend, BACKENDS),
            )
        try:
            found.setdefault(backend, {})[name] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            found.setdefault(backend, {})[name] = value  # text without quotes
    return found


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    parts = sizes.split(",")
    if not name or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(f"{text!r} is no shape", where="--shape", expected="input=1,3,64,64")
    return name, tuple(int(part) for part in parts)


def _preprocess(words: list[str] | None) -> Preprocess | None:
    """`key=value` words as a Preprocess; numbers as text become numbers, commas make lists."""
    import msgspec

    from edge_runtime.bundle.manifest import Preprocess

    if words is None:
        return None
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in Preprocess.__struct_fields__:
            raise UsageError(
                f"{word!r} is no KEY=VALUE of pre-processing",
                where="--preprocess",
                expected="one of " + ", ".join(Preprocess.__struct_fields__),
                remedy=did_you_mean(key, Preprocess.__struct_fields__),
            )
        values[key] = value.split(",") if key in ("mean", "std") else value
    try:
        return msgspec.convert(values, Preprocess, strict=False)
    except msgspec.ValidationError as e:
        raise UsageError(f"wrong value: {e}", where="--preprocess") from e


def _postprocess(arguments: argparse.Namespace) -> Postprocess | None:
    from edge_runtime.bundle.manifest import Postprocess

    if arguments.labels is None and arguments.activation == "none":
        return None
    labels = _read_labels(arguments.labels) if arguments.labels else ()
    return Postprocess(labels=labels, top_k=arguments.top_k, activation=arguments.activation)


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except FileNotFoundError as e:
        raise NotFoundError("no such file", where=str(path)) from e
    except OSError as e:
        raise StorageError(f"cannot be read: {e.strerror}", where=str(path)) from e
    except UnicodeDecodeError as e:
        raise UsageError("is not UTF-8 text", where=str(path), expected="one label a line") from e


# --- the others ----------------------------------------------------------------------------------


def _inspect(arguments: argparse.Namespace) -> int:
    described = _described(arguments.bundle)
    if arguments.json:
        output.print_json(described)
    else:
        print(_described_text(described))
    return 0


def _described(path: Path) -> dict[str, Any]:
    from edge_runtime.bundle import archive
    from edge_runtime.bundle.describe import describe

    with archive.open_bundle(path) as bundle:
        return describe(bundle)


def _described_text(bundle: dict[str, Any]) -> str:
    label = f" ({bundle['label']})" if bundle["label"] else ""
    batch = "none" if bundle["batch_axis"] is None else bundle["batch_axis"]
    head = [
        f"{bundle['name']}@{bundle['version']}{label}",
        f"{output.size(bundle['size_bytes'])} in {bundle['blobs']} blobs, "
        f"{bundle['goldens']} goldens, batch axis {batch}",
    ]
    tensors = [
        (group[:-1], spec["name"], spec["datatype"], str(spec["shape"]))
        for group in ("inputs", "outputs")
        for spec in bundle[group]
    ]
    variants = [
        (
            each["name"],
            each["backend"],
            each["precision"] or "-",
            output.size(each["size_bytes"]),
            f"{each['tolerance']['rtol']:g}/{each['tolerance']['atol']:g}",
            each["filename"] or "-",
        )
        for each in bundle["variants"]
    ]
    width = output.terminal_columns(sys.stdout)
    columns = ("VARIANT", "BACKEND", "PRECISION", ">SIZE", "RTOL/ATOL", "FILE")
    return "\n".join(
        [
            *(output.printable(line) for line in head),
            output.table(("TENSOR", "NAME", "DATATYPE", "SHAPE"), tensors, width),
            output.table(columns, variants, width),
        ]
    )


def _lint(arguments: argparse.Namespace) -> int:
    """Exit code 0 without errors, 4 (that of a bad bundle) with."""
    findings = _findings(arguments.path)
    is_good = all(finding.severity != "error" for finding in findings)
    if arguments.json:
        output.print_json({"ok": is_good, "findings": findings})
    else:
        for finding in findings:
            text = f"{finding.severity}: {finding.where}: {finding.message}"
            print(output.printable(text + (f"; {finding.remedy}" if finding.remedy else "")))
        print("ok" if is_good else "refused")
    return 0 if is_good else BundleError.exit_code


def _findings(path: Path) -> list[Finding]:
    """Of a bundle (every byte is hashed), or of a single model file."""
    from edge_runtime.bundle import archive, lint, source

    if path.is_dir() or path.suffix == ".bundle":
        with archive.open_bundle(path) as bundle:
            bundle.verify()
            return lint.lint(bundle.manifest, bundle.blob)
    return lint.lint_file(source.from_path(path.resolve()), path.name)


def _extract(arguments: argparse.Namespace) -> int:
    from edge_runtime.bundle import archive
    from edge_runtime.cli.progress import Progress

    with Progress(sys.stderr, quiet=arguments.json) as progress:
        with archive.open_bundle(arguments.bundle) as bundle:
            archive.extract(
                bundle,
                arguments.directory,
                lambda done, total: progress.update("extracting", done, total),
            )
            size_bytes = bundle.size_bytes
    reply = {"directory": str(arguments.directory), "size_bytes": size_bytes}
    text = f"extracted {output.size(size_bytes)} into {arguments.directory}"
    return _answer(arguments, reply, text)


def _pack(arguments: argparse.Namespace) -> int:
    from edge_runtime.bundle import archive
    from edge_runtime.cli.progress import Progress

    with Progress(sys.stderr, quiet=arguments.json) as progress:
        with archive.open_bundle(arguments.directory) as bundle:
            sha256 = archive.pack(
                bundle,
                arguments.out,
                lambda done, total: progress.update("packing", done, total),
            )
    reply = {"out": str(arguments.out), "sha256": sha256}
    return _answer(arguments, reply, f"wrote {arguments.out}, sha256 {sha256}")


def _answer(arguments: argparse.Namespace, reply: dict[str, Any], text: str) -> int:
    if arguments.json:
        output.print_json(reply)
    else:
        print(output.printable(text))
    return 0
