"""`profile learn`: from a bundle to a profile that says how to use this machine, with its figures.

Law of this file: the order of steps, and the figures as text. How is measured: `learning`; what
follows from the times: device_profiles.learning.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from device_profiles import learning, loading, probe
from device_profiles.cards import Card, Result
from edge_runtime import __version__
from edge_runtime.cli import learning as driver
from edge_runtime.cli import output
from edge_runtime.errors import ConflictError, ModelError, StorageError

if TYPE_CHECKING:
    import argparse

    from device_profiles.learning import Measured
    from device_profiles.loading import Resolved
    from device_profiles.schema import Machine


def run(arguments: argparse.Namespace, machine: Machine, base: Resolved) -> int:
    """Measure, write the profile (and the card), show the figures.

    Raises:
        ConflictError: a file is there already.
        ModelError: no variant could be measured.
        EdgeError: the bundle cannot be opened, or a file not be written.
        ProfileError: what was learned makes no profile (a wrong --name).
    """
    name = arguments.name or f"{base.profile.name}-learned"
    path = arguments.output or Path(f"{name}.yaml")
    for target in filter(None, (path, arguments.card)):
        if target.exists() and not arguments.force:
            raise ConflictError(
                "the file is there already", where=str(target), remedy="--force overwrites it"
            )
    loading.parse({"name": name, "title": "to be learned"}, str(path))
    available_bytes = probe.available_bytes()
    counts = learning.thread_counts(arguments.threads_max or len(os.sched_getaffinity(0)))
    say = _quiet if arguments.json else _progress
    with driver.opened(arguments.bundle) as (manifest, directory):
        wanted = driver.trials(manifest, directory, counts)
        model = f"{manifest.name}@{manifest.version}"
        say(f"{model}: {len(wanted)} processes, {driver.ROUNDS} rounds")
        measured = driver.measure(wanted, arguments.seconds, say)
    if all(one.error for one in measured):
        raise ModelError(
            "no variant could be measured: "
            + "; ".join(f"{one.variant}: {one.error}" for one in measured),
            where=str(arguments.bundle),
        )
    date = datetime.date.today().isoformat()
    where = _where(machine)
    document = learning.document(
        name, base, measured, model=model, available_bytes=available_bytes, date=date, where=where
    )
    _write(path, document)
    card = _card(base.profile.name, where, date, machine.kernel, model, measured)
    if arguments.card:
        _write(arguments.card, card)
    if arguments.json:
        output.print_json({"file": str(path), "profile": document, "card": card})
    else:
        print(learned_text(measured))
        print(f"\nwritten: {path}")
        print(f"in {loading.OWN}/ the daemon finds it by itself at its next start")
    return 0


def _where(machine: Machine) -> str:
    """What was measured on; a virtual machine says so, its figures are its host's too."""
    title = machine.title or machine.cpu_model or machine.arch
    virtual = "virtual machine, " if "hypervisor" in machine.cpu_flags else ""
    return f"{virtual}{title}, {machine.cpu_count} cores"


def learned_text(measured: Sequence[Measured]) -> str:
    """The figures as a table, quickest first."""
    headers = ("VARIANT", "BACKEND", ">THREADS", ">P50 MS", ">SPREAD", ">MIB", "RUNS ON")
    rows = [
        (
            one.variant,
            f"{one.backend} {one.version}",
            one.threads or "-",
            "-" if one.error else f"{one.p50_ms:.3f}",
            "-" if one.error else f"{one.spread:.0%}",
            "-" if one.error else f"{one.private_bytes / (1 << 20):.0f}",
            one.error or one.device,
        )
        for one in sorted(measured, key=lambda one: one.p50_ms)
    ]
    return output.table(headers, rows, output.terminal_columns(sys.stdout))


def _card(
    board: str, where: str, date: str, kernel: str, model: str, measured: Sequence[Measured]
) -> dict[str, Any]:
    """The figures as a measured card (docs/hardware.md)."""
    temperature_c = probe.hottest_c()
    card = Card(
        board=board,
        machine=where,
        date=date,
        runtime=__version__,
        kernel=kernel,
        results=tuple(
            Result(
                model=model,
                variant=one.variant,
                backend=one.backend,
                version=one.version,
                device=one.device,
                threads=one.threads,
                p50_ms=round(one.p50_ms, 4),
                spread=round(one.spread, 3),
                private_bytes=one.private_bytes,
                temperature_c=temperature_c,
            )
            for one in measured
            if not one.error
        ),
    )
    plain: dict[str, Any] = msgspec.to_builtins(card)
    return plain


def _write(path: Path, document: dict[str, Any]) -> None:
    """As YAML, whole or not at all."""
    import yaml

    text = yaml.safe_dump(document, sort_keys=False, width=100, allow_unicode=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from error


def _progress(line: str) -> None:
    print(output.printable(line), file=sys.stderr, flush=True)


def _quiet(line: str) -> None:
    """With --json, nothing but the document."""
