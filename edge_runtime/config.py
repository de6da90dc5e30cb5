"""The configuration: every limit with its unit, default and reason.

Law of this file: the structs below are the only place where an option, its default or its reason is
stated; the command line, the daemon and docs/config.md take them from here. It turns a YAML mapping
into a frozen `Config` and back into rows for people (how: `documents.py`); besides reading that one
file it does no I/O.

A name says its unit (`_bytes_`, `_s`, `_ms`); byte sizes may be written as text (`64 MiB`).
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from device_profiles.ladder import Ladder
from edge_runtime import documents
from edge_runtime.documents import GIB, KIB, MIB, Row
from edge_runtime.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# A configuration of a hundred models has some 50 KiB; anything larger is not one of ours.
FILE_BYTES_MAX = MIB
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_MODE_PATTERN = r"^0[0-7]{3}$"
_CPUSET_PATTERN = r"^([0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*)?$"


def _number(ge: float, le: float, unit: str, reason: str) -> Meta:
    return Meta(ge=ge, le=le, description=reason, extra={"unit": unit})


def _text(reason: str, pattern: str | None = None, expected: str = "") -> Meta:
    return Meta(pattern=pattern, description=reason, extra={"expected": expected})


def _why(reason: str) -> Meta:
    return Meta(description=reason)


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the daemon writes about itself."""

    format: Annotated[
        Literal["auto", "text", "json"],
        _why("auto: the journal's own protocol under systemd, else text lines on stderr"),
    ] = "auto"
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _why("events below this level are not written; `why` still knows them"),
    ] = "info"


class AccessRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may; a written rule admits only whom it names. root and the daemon's user always may."""

    users: Annotated[
        tuple[str | int, ...], _why("users by name or uid, as the kernel reports the peer")
    ] = ()
    groups: Annotated[
        tuple[str | int, ...], _why("groups by name or gid; supplementary groups count")
    ] = ()
    anyone: Annotated[bool, _why("true: every local user that can reach the socket")] = False


class AccessConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may do what. The mode of a socket decides who reaches it, the rule who is answered."""

    infer: Annotated[AccessRule, _why("who may infer, where a model has no rule of its own")] = (
        AccessRule(anyone=True)
    )
    control: Annotated[AccessRule, _why("who may install, activate, unload: as good as root")] = (
        AccessRule()
    )
    infer_mode: Annotated[
        str,
        _text(
            "open to all, as the rule is; not used for sockets given by systemd",
            _MODE_PATTERN,
            'an octal mode in quotes, such as "0666"',
        ),
    ] = "0666"
    control_mode: Annotated[
        str,
        _text(
            "only the daemon's user and root reach it, whatever the rule says",
            _MODE_PATTERN,
            'an octal mode in quotes, such as "0600"',
        ),
    ] = "0600"


class LimitsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one client, or all of them, may cost the daemon."""

    frame_body_bytes_max: Annotated[
        int, _number(KIB, 4 * GIB, "bytes", "holds 100 camera images; more goes by shared memory")
    ] = 64 * MIB
    connections_max: Annotated[
        int, _number(1, 16384, "connections", "each costs a descriptor and a buffer")
    ] = 256
    connections_per_user_max: Annotated[
        int,
        _number(
            1, 16384, "connections", "of one uid: a program in a loop must leave room for others"
        ),
    ] = 192
    connection_idle_header_s: Annotated[
        float, _number(0.1, 3600, "s", "a first frame, once begun, may take so long to arrive")
    ] = 5.0
    regions_per_connection_max: Annotated[
        int, _number(0, 16, "regions", "shared memory regions: bounds what a client makes us map")
    ] = 16
    region_bytes_max: Annotated[
        int, _number(4 * KIB, 64 * GIB, "bytes", "one region; mapped until its connection closes")
    ] = 256 * MIB
    bundle_bytes_max: Annotated[
        int, _number(KIB, 16384 * GIB, "bytes", "an install by mistake must not fill the disk")
    ] = 8 * GIB
    control_connections_max: Annotated[
        int, _number(1, 1024, "connections", "a script in a loop must not shut others out")
    ] = 16
    history_events_max: Annotated[
        int, _number(10, 100_000, "events", "kept in memory for `why`: some 300 bytes each")
    ] = 1000


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What installed models may cost the disk."""

    byte_budget: Annotated[
        int,
        _number(
            0,
            16384 * GIB,
            "bytes",
            "above it the oldest generations go, never an active or previous one; 0: no limit",
        ),
    ] = 8 * GIB
    free_bytes_min: Annotated[
        int, _number(0, 16384 * GIB, "bytes", "kept for the rest of the machine by each install")
    ] = 64 * MIB
    compiled_bytes_max: Annotated[
        int,
        _number(
            0, 1024 * GIB, "bytes", "of models compiled for a device, oldest go; 0: none are kept"
        ),
    ] = 1 * GIB


class RestartConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens after a worker died."""

    backoff_initial_s: Annotated[
        float,
        _number(0, 60, "s", "wait before the second restart, then doubled; none before the first"),
    ] = 0.1
    backoff_max_s: Annotated[
        float, _number(0, 3600, "s", "longest wait: a repaired device is found within it")
    ] = 30.0
    deaths_max: Annotated[
        int, _number(1, 1000, "deaths", "within window_s; then the previous generation takes over")
    ] = 5
    variant_deaths_max: Annotated[
        int,
        _number(
            1,
            1000,
            "deaths",
            "within window_s; then the next variant takes over, where there is one: two restarts "
            "tell a broken variant from one bad moment",
        ),
    ] = 3
    window_s: Annotated[
        float, _number(1, 86400, "s", "how long a death counts against the generation")
    ] = 60.0


class WorkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one model is served: `workers` for all of them, `models.NAME` where one differs."""

    variant: Annotated[
        str, _text("the variant to serve; empty: the first that loads and keeps its goldens")
    ] = ""
    runners: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=0, le=64)],
        Meta(
            description="threads that run the model; 0: inline, best for small models; "
            "auto: measured at load",
            extra={"unit": "threads", "expected": '"auto" or an integer from 0 to 64'},
        ),
    ] = "auto"
    runner_threshold_ms: Annotated[
        float, _number(0, 1000, "ms", "auto: shorter runs stay inline; a hand-over costs more")
    ] = 2.0
    queue_requests_max: Annotated[
        int,
        _number(1, 65536, "requests", "a burst of requests for a small model; tensors take memory"),
    ] = 256
    queue_ms_max: Annotated[
        float,
        _number(
            0,
            3_600_000,
            "ms",
            "a request that would wait longer, as runs were lately, is refused at once, unless "
            "fewer than 16 wait; 0: only the other bounds",
        ),
    ] = 250.0
    queue_bytes_max: Annotated[
        int, _number(KIB, 16 * GIB, "bytes", "tensors that wait; above it requests are refused")
    ] = 64 * MIB
    batch_rows_max: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=1, le=4096)],
        Meta(
            description="rows that run as one; auto: as many as make a row cheaper at load; "
            "1: requests run alone",
            extra={"unit": "rows", "expected": '"auto" or an integer from 1 to 4096'},
        ),
    ] = "auto"
    batch_window_ms: Annotated[
        float, _number(0, 1000, "ms", "wait for a fuller batch; 0: only what waits anyway")
    ] = 0.0
    spin_us: Annotated[
        float,
        _number(
            0,
            100_000,
            "us",
            "look again for so long before sleeping: saves the waking of a core at each request, "
            "costs a busy core for so long after each; 0: sleep at once",
        ),
    ] = 0.0
    cache_bytes_max: Annotated[
        int, _number(0, 16 * GIB, "bytes", "answers kept for equal inputs; 0: none (has state?)")
    ] = 0
    priority_max: Annotated[
        int, _number(0, 255, "priority", "a request that claims a higher one gets this one")
    ] = 255
    run_time_max_ms: Annotated[
        float, _number(1, 3_600_000, "ms", "a longer run is a hang: the worker is restarted")
    ] = 10_000.0
    load_time_max_s: Annotated[
        float, _number(1, 86400, "s", "load, warm-up and goldens; more where a device compiles")
    ] = 120.0
    cpu_fallback: Annotated[
        Literal["auto", "refuse", "alarm", "allow"],
        _why(
            "an accelerator was asked for and the CPU runs it; auto: a variant made for an "
            "accelerator that runs nothing there is refused, the rest is an alarm"
        ),
    ] = "auto"
    warmup_runs: Annotated[
        int, _number(0, 1000, "runs", "lazy allocations happen in them, not in the first request")
    ] = 3
    cpuset: Annotated[
        str, _text("cores it may use; empty: all", _CPUSET_PATTERN, 'cores such as "0-1,3"')
    ] = ""
    nice: Annotated[int, _number(0, 19, "", "higher: yields the processor to others")] = 0
    memory_bytes_max: Annotated[
        int, _number(0, 16384 * GIB, "bytes", "above it the worker ends, not others; 0: no limit")
    ] = 0
    open_files_max: Annotated[
        int, _number(64, 1 << 20, "files", "connections and regions of one worker")
    ] = 1024
    sandbox: Annotated[
        bool, _why("no network, no writing, no new privileges; false only to debug")
    ] = True
    own_socket: Annotated[bool, _why("models/NAME.sock too: a path that one app can be given")] = (
        True
    )
    access: Annotated[
        AccessRule | None, _why("who may infer with this model; empty: as access.infer says")
    ] = None
    restart: Annotated[RestartConfig, _why("what happens after a worker died")] = RestartConfig()
    heartbeat_idle_s: Annotated[
        float,
        _number(
            0,
            86400,
            "s",
            "without a golden for so long, the next quiet moment runs one: one run a minute costs "
            "nothing; 0: only after errors and suspends",
        ),
    ] = 60.0
    keep_alive_s: Annotated[
        float, _number(0, 31_536_000, "s", "unused for so long: unloaded until asked; 0: for ever")
    ] = 0.0
    keep_previous_warm: Annotated[
        bool, _why("the previous generation stays loaded: a rollback takes milliseconds")
    ] = True


class MemoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all models together may take."""

    budget_bytes: Annotated[
        Literal["auto"] | Annotated[int, Meta(ge=0, le=16384 * GIB)],
        Meta(
            description="private memory of all workers; above it the model asked for least "
            "recently is unloaded; auto: 70 % of the machine or its cgroup; 0: no limit",
            extra={"unit": "bytes", "expected": '"auto" or a size such as "256 MiB"'},
        ),
    ] = "auto"


class SelectionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the variant of a bundle is chosen on this machine."""

    policy: Annotated[
        Literal["latency", "memory", "energy", "off"],
        _why(
            "what the best variant has least of; energy where the processor counts it, else as "
            "latency; off: the first in order that keeps its goldens, unmeasured"
        ),
    ] = "latency"
    time_max_s: Annotated[
        float,
        _number(
            0.1,
            3600,
            "s",
            "for measuring all variants of a bundle, their loads not counted: an activation waits "
            "for it; slow models get fewer rounds",
        ),
    ] = 10.0


class MetricsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Figures for Prometheus; `edge-runtime metrics` prints them without a port."""

    port: Annotated[
        int, _number(0, 65535, "port", "GET http://127.0.0.1:PORT/metrics; 0: no port, no network")
    ] = 0


class WatchdogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When the daemon says to systemd that it is well."""

    probe_timeout_s: Annotated[
        float, _number(0.1, 60, "s", "a slower probe of serving does not feed the watchdog")
    ] = 2.0


class GovernorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is given up when the device is hot or short of memory, and taken back after."""

    enabled: Annotated[
        bool, _why("false: nothing is read, the kernel and the hardware protect themselves alone")
    ] = True
    interval_s: Annotated[
        float,
        _number(0.05, 60, "s", "between two looks; heat moves in seconds, a look costs 0.1 ms"),
    ] = 2.0
    ladder: Annotated[
        Ladder | None, _why("thermal zones and steps; empty: the profile's (docs/governor.md)")
    ] = None
    memory_pressure_percent: Annotated[
        float,
        _number(
            0,
            100,
            "%",
            "of 10 s in which a task waited for memory (PSI some avg10): one step down; half of "
            "it: back; 0: memory is not watched",
        ),
    ] = 10.0
    memory_down_s: Annotated[
        float,
        _number(0.1, 3600, "s", "between two steps down; PSI needs 10 s to show what one did"),
    ] = 10.0
    memory_up_s: Annotated[
        float, _number(0.1, 86400, "s", "calm for so long: one step up; loading again costs memory")
    ] = 60.0
    memory_idle_s: Annotated[
        float, _number(0.1, 86400, "s", "not asked for so long: an idle model, unloaded at step 2")
    ] = 30.0
    memory_refuse_priority_below: Annotated[
        int,
        _number(
            0, 255, "priority", "refused at step 3; 0: there is none (0 is the usual priority)"
        ),
    ] = 0
    root: Annotated[
        str, _text("where /sys and /proc are read; another one plays a recording", r"^/")
    ] = "/"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that can be configured. `models` is merged: each is a whole WorkerConfig."""

    log: LogConfig = LogConfig()
    access: AccessConfig = AccessConfig()
    limits: LimitsConfig = LimitsConfig()
    store: StoreConfig = StoreConfig()
    memory: MemoryConfig = MemoryConfig()
    selection: SelectionConfig = SelectionConfig()
    workers: WorkerConfig = WorkerConfig()
    models: dict[str, WorkerConfig] = {}
    watchdog: WatchdogConfig = WatchdogConfig()
    governor: GovernorConfig = GovernorConfig()
    metrics: MetricsConfig = MetricsConfig()
    profile: Annotated[
        str,
        _text(
            "the device profile beneath this file: auto (detected), none, a name, or a path",
            r"^.{1,4096}$",
            "auto, none, a profile's name, or a path",
        ),
    ] = "auto"
    services: Annotated[
        tuple[str, ...], _why("reserved: parts to run beside serving; must be empty for now")
    ] = ()

    def worker(self, name: str) -> WorkerConfig:
        """How the model `name` is served: its own entry over `workers`, or `workers`."""
        return self.models.get(name, self.workers)


class Stated(NamedTuple):
    """What a file states, to be read with what lies beneath it; `document` None: nothing."""

    document: Mapping[str, Any] | None
    where: str  # the file, for errors

    def config(self, beneath: Mapping[str, Any] = MappingProxyType({})) -> Config:
        """As `parse`."""
        return parse(self.document, self.where, beneath)


def read(path: Path | None) -> Stated:
    """What a YAML file states; None: nothing.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it cannot be read or is not YAML.
    """
    if path is None:
        return Stated(None, "defaults")
    return Stated(documents.parse(_read(path), str(path)), str(path))


def load(path: Path | None) -> Config:
    """The configuration in a YAML file; None: all defaults.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it cannot be read, is not YAML, or is wrong; file and key path are named.
    """
    return read(path).config()


def parse(
    document: Mapping[str, Any] | None,
    where: str,
    beneath: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Check a document and fill in the defaults; an empty one gives `Config()`.

    Args:
        where: the file, for errors.
        beneath: section -> its values where the document says nothing (a device profile's).

    Raises:
        UsageError: an unknown key (nearest match named), a wrong type, or a value out of range.
    """
    whole = documents.sized(
        documents.mapping({} if document is None else document, where, ""), where, ""
    )
    assert isinstance(whole, dict)
    # `workers:` with all its lines commented out is a section that says nothing.
    whole = {k: value for k, value in whole.items() if value is not None or k not in _SECTIONS}
    for section, values in beneath.items():
        whole[section] = {**values, **documents.mapping(whole.get(section, {}), where, section)}
    models = documents.mapping(whole.pop("models", {}), where, "models")
    config = documents.convert(whole, Config, where, "")
    workers = whole.get("workers", {})
    config = msgspec.structs.replace(
        config, models={name: _model(name, own, workers, where) for name, own in models.items()}
    )
    _check_together(config, where)
    return config


def describe(config: Config) -> list[Row]:
    """Every option, in the file's order; of models what differs from `workers`, their default."""
    rows = list(documents.rows(config, Config(), "", skip=("models",)))  # those over `workers`
    for name, worker in config.models.items():
        rows += [
            row
            for row in documents.rows(worker, config.workers, f"models.{name}.")
            if row.value != row.default
        ]
    return rows


# --- reading ------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise NotFoundError(
            "there is no such configuration file",
            where=str(path),
            remedy="leave out --config to run with the defaults",
        ) from error
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if len(data) > FILE_BYTES_MAX:
        raise UsageError(
            "the file is too large to be a configuration",
            where=str(path),
            expected=f"at most {FILE_BYTES_MAX} bytes",
        )
    return data


# --- checking -----------------------------------------------------------------------------------

_SECTIONS = frozenset(
    {"log", "access", "limits", "store", "memory", "workers", "models"}
    | {"watchdog", "governor", "metrics"}
)


def _model(name: str, own: Any, workers: dict[str, Any], where: str) -> WorkerConfig:
    """One entry of `models` over `workers`; checked alone first, so that errors name its keys."""
    import re

    path = f"models.{name}"
    if not re.fullmatch(NAME_PATTERN, name):
        raise documents.wrong(
            name, where, path, "a model's name: a-z, 0-9, '.', '_', '-', at most 64"
        )
    own = documents.mapping({} if own is None else own, where, path)
    documents.convert(own, WorkerConfig, where, path)
    merged = {**workers, **own}
    if "restart" in own:  # its keys one by one; an access rule is replaced as a whole
        merged["restart"] = {**workers.get("restart", {}), **own["restart"]}
    return documents.convert(merged, WorkerConfig, where, path)


def _check_together(config: Config, where: str) -> None:
    """What no single field can say."""
    if config.services:  # better refused than taken and not run
        raise documents.wrong(
            list(config.services), where, "services", "none: this version has no services"
        )
    rules = {"access.infer": config.access.infer, "access.control": config.access.control}
    for path, worker in _workers(config):
        if worker.access is not None:
            rules[f"{path}.access"] = worker.access
        if worker.restart.backoff_initial_s > worker.restart.backoff_max_s:
            raise documents.wrong(
                worker.restart.backoff_initial_s,
                where,
                f"{path}.restart.backoff_initial_s",
                f"at most backoff_max_s, which is {worker.restart.backoff_max_s}",
            )
        _check_cpuset(worker.cpuset, where, f"{path}.cpuset")
    for path, rule in rules.items():
        if rule.anyone and (rule.users or rule.groups):
            raise UsageError(
                "admits anyone and also names users or groups",
                where=documents.at(where, path),
                expected="one of them",
                remedy="remove `anyone` to admit only those who are named",
            )


def _workers(config: Config) -> Iterator[tuple[str, WorkerConfig]]:
    yield "workers", config.workers
    for name, worker in config.models.items():
        yield f"models.{name}", worker


def _check_cpuset(text: str, where: str, path: str) -> None:
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise documents.wrong(text, where, path, "ranges that go upwards, such as '0-1,3'")
