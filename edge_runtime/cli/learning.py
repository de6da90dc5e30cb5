"""Measures a bundle's variants on this machine, for `profile learn`.

Law of this file: the driver. It starts one process per variant and number of threads, lets them
run in turns and reads what they say; what follows is decided in device_profiles.learning. A process
that dies, hangs or refuses is a result (`error`), not a failure of the whole.
"""

from __future__ import annotations

import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from device_profiles.learning import Measured
from edge_runtime.bundle import archive, lint
from edge_runtime.bundle.manifest import GoldenTensor, Manifest, Variant
from edge_runtime.daemon.board import TAKES_THREADS
from edge_runtime.serving.spec import GoldenFile, GoldenPair
from edge_runtime.serving.timing import Job, Loaded, Turn

# Odd, so that a median is one of them; enough for quartiles.
ROUNDS = 9
# Of one process in one round, if the time allows: some runs of a model of 10 ms, and long enough
# that caches and clocks settle on it.
SLICE_S = 0.1
RUNS_MAX = 2000
LOAD_S_MAX = 120.0
# A turn should take SLICE_S; a device that hangs must not keep us.
TURN_S_MAX = 60.0

Say = Callable[[str], None]
T = TypeVar("T", bound=msgspec.Struct)


class Trial(NamedTuple):
    """A variant with so many threads."""

    variant: Variant
    threads: int | None
    job: Job


@contextmanager
def opened(path: Path) -> Iterator[tuple[Manifest, Path]]:
    """A bundle's manifest, and the directory with its blobs, unpacked for as long as it is open.

    Raises:
        BundleError: it is damaged, or an artifact is dangerous: no library has seen it yet.
        NotFoundError: there is no such bundle.
    """
    with archive.open_bundle(path) as bundle, tempfile.TemporaryDirectory() as scratch:
        lint.check(bundle.manifest, bundle.blob)
        directory = Path(scratch) / "bundle"
        archive.extract(bundle, directory)
        yield bundle.manifest, directory


def trials(manifest: Manifest, directory: Path, counts: Sequence[int]) -> list[Trial]:
    """What is measured: each variant with each number of threads, where that is ours to choose."""
    each = []
    for variant in manifest.variants:
        ours = (
            variant.backend in TAKES_THREADS
            and variant.device_class == "cpu"
            and "threads" not in variant.options
        )
        for threads in counts if ours else [None]:
            beneath = {} if threads is None else {"threads": threads}
            job = _job(manifest, variant, directory, {**beneath, **variant.options})
            each.append(Trial(variant, threads, job))
    return each


def measure(wanted: Sequence[Trial], time_s: float, say: Say) -> list[Measured]:
    """All of them, in interleaved rounds: what changes meanwhile changes for all.

    Args:
        time_s: about so long, loading not counted.
    """
    slice_s = min(SLICE_S, time_s / ROUNDS / max(len(wanted), 1))
    with ExitStack() as stack:
        runners = []
        for trial in wanted:
            runner = stack.enter_context(_Runner(trial))
            runner.load()
            say(f"  {runner.name}: {runner.error or 'loaded'}")
            runners.append(runner)
        for number in range(ROUNDS):
            for runner in _turns(runners, number):
                runner.turn(slice_s)
        return [runner.measured() for runner in runners]


def _turns(runners: Sequence[_Runner], number: int) -> list[_Runner]:
    """Another one begins each round, and every other round goes backwards: nobody always runs
    after the same neighbour.
    """
    shift = number % len(runners)
    order = [*runners[shift:], *runners[:shift]]
    return order[::-1] if number % 2 else order


def _job(manifest: Manifest, variant: Variant, directory: Path, options: dict[str, Any]) -> Job:
    def file(tensor: GoldenTensor) -> GoldenFile:
        path = _blob(directory, tensor.blob.sha256)
        return GoldenFile(tensor.name, tensor.datatype, tensor.shape, path)

    return Job(
        backend=variant.backend,
        artifact=_blob(directory, variant.artifact.sha256),
        options=options,
        inputs=manifest.inputs,
        goldens=tuple(
            GoldenPair(
                tuple(file(one) for one in golden.inputs),
                tuple(file(one) for one in golden.expected(variant.name)),
            )
            for golden in manifest.goldens
        ),
        rtol=variant.tolerance.rtol,
        atol=variant.tolerance.atol,
    )


def _blob(directory: Path, sha256: str) -> str:
    return str(directory / "blobs" / sha256)


class _Runner:
    """One process of `serving.timing`, and what it said."""

    def __init__(self, trial: Trial) -> None:
        self.error = ""
        self._trial = trial
        self._run_ns = 0
        self._times: list[int] = []
        self._bytes = 0
        self._loaded = Loaded()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "edge_runtime.serving.timing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is ours; we end it
        )

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._stderr.close()

    @property
    def name(self) -> str:
        threads = self._trial.threads
        if not threads:
            return self._trial.variant.name
        return f"{self._trial.variant.name} with {threads} thread{'s' if threads > 1 else ''}"

    def load(self) -> None:
        answer = self._ask(msgspec.json.encode(self._trial.job), Loaded, LOAD_S_MAX)
        if answer is None:
            return
        self._loaded, self._run_ns = answer, answer.run_ns
        self._bytes, self.error = answer.private_bytes, answer.error

    def turn(self, slice_s: float) -> None:
        """Run for about so long."""
        if self.error:
            return
        runs = max(1, min(RUNS_MAX, round(slice_s * 1e9 / max(self._run_ns, 1))))
        answer = self._ask(str(runs).encode(), Turn, TURN_S_MAX)
        if answer is not None:
            self._times.append(answer.run_ns)
            self._run_ns, self._bytes = answer.run_ns, answer.private_bytes

    def measured(self) -> Measured:
        return Measured(
            variant=self._trial.variant.name,
            backend=self._trial.variant.backend,
            device_class=self._trial.variant.device_class,
            threads=self._trial.threads,
            run_ns=() if self.error else tuple(self._times),
            private_bytes=self._bytes,
            version=self._loaded.version,
            device=self._loaded.device,
            error=self.error,
        )

    def _ask(self, line: bytes, kind: type[T], timeout_s: float) -> T | None:
        """One line to it and one back; None and an error if it ended or is silent."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            answer = self._line(timeout_s)
        except BrokenPipeError:
            answer = b""
        if answer is None:
            self.error = f"no answer within {timeout_s:g} s"
        elif not answer:
            self.error = self._last_words()
        return msgspec.json.decode(answer, type=kind) if answer else None

    def _line(self, timeout_s: float) -> bytes | None:
        """A line of it; empty at its end, None if it takes too long."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline_s = time.monotonic() + timeout_s
        data = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not data.endswith(b"\n"):
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    return None
                more = stdout.read(65536)
                if not more:
                    return b""
                data += more
        return data

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the process ended ({end})" + (f": {lines[-1]}" if lines else "")
