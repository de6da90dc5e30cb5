"""What is measured: the buckets of durations, the names of metrics, and the Prometheus text.

Law of this file: pure; no clock, no socket, no process. A duration histogram is a sequence of
`WORDS` whole numbers: the sum in ns, then a count for each bucket. Its writers are the workers (in
shared memory), its readers the daemon and the command line; all three take the layout from here.
`METRICS` is the only place where a name is given to the outside; docs/metrics.md is made from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

# --- histograms -----------------------------------------------------------------------------------

# Buckets are logarithmic: each power of two of nanoseconds is cut into eight. A value is known to
# 1/8 of itself, its bucket's middle to 1/16. From 1 us (no request is faster) to 137 s (every run
# is ended before); one bucket below and one above.
SUB_BITS = 3
OCTAVE_MIN, OCTAVE_MAX = 10, 37  # 2^10 ns = 1.024 us, 2^37 ns = 137.4 s
BUCKETS = ((OCTAVE_MAX - OCTAVE_MIN) << SUB_BITS) + 2
WORDS = 1 + BUCKETS

Histogram = Sequence[int]  # of WORDS: the sum in ns, then the counts


def bucket(value_ns: int) -> int:
    """The bucket of a duration: 0 for less than 1.024 us, BUCKETS - 1 for 137 s and more."""
    octave = value_ns.bit_length() - 1
    if octave < OCTAVE_MIN:
        return 0
    if octave >= OCTAVE_MAX:
        return BUCKETS - 1
    part = (value_ns >> (octave - SUB_BITS)) & ((1 << SUB_BITS) - 1)
    return ((octave - OCTAVE_MIN) << SUB_BITS) + part + 1


def lower_ns(index: int) -> int:
    """The smallest duration of a bucket; of BUCKETS - 1 too."""
    if index == 0:
        return 0
    octave, part = divmod(index - 1, 1 << SUB_BITS)
    return ((1 << SUB_BITS) + part) << (octave + OCTAVE_MIN - SUB_BITS)


def count(histogram: Histogram) -> int:
    """How many durations it has."""
    return sum(histogram[1:])


def quantile_s(histogram: Histogram, share: float) -> float | None:
    """The duration in s that `share` (0 to 1) of all do not exceed; None without any.

    It is the middle of a bucket: within 1/16 of the true value from 1 us to 137 s.
    """
    total = count(histogram)
    if not total:
        return None
    rank = max(share * total, 1)
    seen = 0
    for index in range(BUCKETS):
        seen += histogram[1 + index]
        if seen >= rank:
            break
    below = lower_ns(index)
    above = lower_ns(index + 1) if index + 1 < BUCKETS else below
    return (below + above) / 2e9


def add(into: list[int], other: Histogram) -> None:
    """Add the counts of another histogram."""
    into[:] = [mine + theirs for mine, theirs in zip(into, other, strict=True)]


def since(now: Histogram, before: Histogram) -> list[int]:
    """What came between two readings; after a restart (counts went back) all of `now`."""
    between = [new - old for new, old in zip(now, before, strict=True)]
    return list(now) if min(between) < 0 else between


# --- names ----------------------------------------------------------------------------------------

Kind = Literal["counter", "gauge", "histogram"]


class Metric(NamedTuple):
    """One name: what kind it is, which labels its samples have, what it means."""

    kind: Kind
    labels: tuple[str, ...]
    meaning: str


# A series of these is one variant of one version of a model.
WORKER = ("model", "version", "variant", "backend")
# A series of these is a candidate beside the version that serves, or the last one.
TRIAL = ("model", "version")
OUTCOMES = ("ok", "invalid", "failed", "refused", "expired", "cancelled")

METRICS: dict[str, Metric] = {
    "edge_build_info": Metric("gauge", ("version",), "always 1; the version of the daemon"),
    "edge_uptime_seconds": Metric("gauge", (), "since the daemon started"),
    "edge_daemon_resident_bytes": Metric("gauge", (), "memory of the daemon's own process"),
    "edge_connections_accepted_total": Metric("counter", (), "connections since the start"),
    "edge_connections_refused_total": Metric(
        "counter", (), "connections and first requests that the daemon itself refused"
    ),
    "edge_connections_waiting": Metric("gauge", (), "connections that have not named a model yet"),
    "edge_model_ready": Metric(
        "gauge", ("model",), "1: it answers, or is loaded when asked; 0: neither"
    ),
    "edge_worker_info": Metric(
        "gauge",
        (*WORKER, "backend_version", "device", "state"),
        "always 1; a worker that runs, and the device that its backend really uses",
    ),
    "edge_worker_cpu_fallback": Metric(
        "gauge", WORKER, "1: an accelerator was asked for, and all or a part runs on the CPU"
    ),
    "edge_connections": Metric("gauge", WORKER, "connections that workers have now"),
    "edge_requests_waiting": Metric("gauge", WORKER, "requests admitted and not running yet"),
    "edge_requests_total": Metric(
        "counter",
        (*WORKER, "outcome"),
        "inference requests by outcome: ok; invalid (the client's mistake); failed (model or "
        "library); refused (overload); expired (deadline); cancelled (the client left)",
    ),
    "edge_request_duration_seconds": Metric(
        "histogram", WORKER, "of requests answered with outputs: from the last byte to the answer"
    ),
    "edge_queue_duration_seconds": Metric(
        "histogram", WORKER, "of requests that ran: from the last byte to the begin of the run"
    ),
    "edge_compute_duration_seconds": Metric(
        "histogram", WORKER, "of runs of the model; a batch is one run"
    ),
    "edge_batches_total": Metric("counter", WORKER, "runs of more than one request"),
    "edge_batched_requests_total": Metric("counter", WORKER, "requests in those runs"),
    "edge_cache_hits_total": Metric("counter", WORKER, "requests answered from the response cache"),
    "edge_cache_misses_total": Metric("counter", WORKER, "requests looked up there in vain"),
    "edge_held_back_total": Metric(
        "counter", WORKER, "requests refused because the device is hot or short of memory"
    ),
    "edge_goldens_total": Metric("counter", WORKER, "goldens that were run while it served"),
    "edge_worker_resident_bytes": Metric(
        "gauge", WORKER, "memory of the workers, shared pages counted in full"
    ),
    "edge_worker_proportional_bytes": Metric(
        "gauge", WORKER, "memory of the workers, shared pages divided by their users"
    ),
    "edge_worker_private_bytes": Metric(
        "gauge", WORKER, "memory of the workers that their end would give back"
    ),
    "edge_trial_running": Metric("gauge", TRIAL, "1: the candidate runs; 0: its trial has ended"),
    "edge_trial_share": Metric(
        "gauge",
        (*TRIAL, "way"),
        "share of the answers that the candidate is shown (shadow), of the requests that it gets "
        "(split)",
    ),
    "edge_trial_shown_total": Metric("counter", TRIAL, "answers passed on with their inputs"),
    "edge_trial_dropped_total": Metric(
        "counter",
        (*TRIAL, "reason"),
        "of the sample, not passed on: full (the candidate lags), large (over half of the queue), "
        "skipped (an output overwrites its input)",
    ),
    "edge_trial_compared_total": Metric("counter", TRIAL, "answers that both versions gave"),
    "edge_trial_disagreed_total": Metric("counter", TRIAL, "of those, not equal within tolerance"),
    "edge_trial_errors_total": Metric("counter", TRIAL, "of those shown, runs that failed"),
    "edge_trial_run_duration_seconds": Metric(
        "histogram",
        (*TRIAL, "side"),
        "of runs for the requests compared: stable (alone, not in a batch), candidate",
    ),
    "edge_trial_requests_total": Metric(
        "counter",
        (*TRIAL, "outcome"),
        "requests given to the candidate: answered by it, or by the version that serves because "
        "it was held (busy), too_slow, refused, lost",
    ),
    "edge_trial_round_trip_seconds": Metric(
        "histogram", TRIAL, "of requests that the candidate answered: passed on to answered"
    ),
    "edge_swaps_total": Metric(
        "counter", ("model",), "changes of the serving version: activations and rollbacks"
    ),
    "edge_fallbacks_total": Metric(
        "counter", ("model",), "rollbacks by the daemon, from a version that kept dying"
    ),
    "edge_failovers_total": Metric(
        "counter",
        ("model", "cause"),
        "times that the next variant took over, by what ended the one before",
    ),
    "edge_idle_unloads_total": Metric(
        "counter", ("model",), "unloads of a model that nobody asked or that made room"
    ),
    "edge_restarts_total": Metric("counter", ("model",), "workers started again after a death"),
    "edge_worker_deaths_total": Metric(
        "counter", ("model", "cause"), "deaths of workers that had been ready, by cause"
    ),
    "edge_load_failures_total": Metric(
        "counter", ("model", "code"), "variants that did not become ready, by error code"
    ),
    "edge_golden_failures_total": Metric(
        "counter",
        ("model",),
        "times that a model gave other answers than its goldens, at load or later",
    ),
    "edge_template_deaths_total": Metric(
        "counter", ("backend",), "deaths of processes that hold a backend's library"
    ),
    "edge_temperature_celsius": Metric(
        "gauge", ("zone",), "what a thermal zone reads; absent while it cannot be read"
    ),
    "edge_throttled": Metric(
        "gauge", (), "1: hardware, firmware or kernel slow the device down because of heat"
    ),
    "edge_clock_limit_ratio": Metric(
        "gauge", (), "lowest limit of a processor's clock, of what its hardware can do"
    ),
    "edge_pressure_ratio": Metric(
        "gauge",
        ("resource",),
        "PSI some avg10 of the machine or our cgroup, whichever is worse; 1: all of the time",
    ),
    "edge_governor_step": Metric(
        "gauge", ("ladder",), "how many steps are taken; 0: nothing is given up"
    ),
    "edge_governor_steps_total": Metric(
        "counter",
        ("ladder", "direction", "reason"),
        "steps down (heat, throttled, pressure) and up (cooler, calm, no_reading)",
    ),
    "edge_store_bytes": Metric("gauge", (), "what installed models take on the disk"),
    "edge_store_free_bytes": Metric("gauge", (), "free on the store's disk"),
    "edge_store_budget_bytes": Metric("gauge", (), "store.byte_budget; 0: no limit"),
}

# --- the text -------------------------------------------------------------------------------------

# Of a histogram, as many buckets are told as a server wants to keep: the powers of two from 4 us to
# 17 s. A power of two is a border of ours, so these counts are exact.
BOUNDS_NS = tuple(1 << octave for octave in range(12, 35))
_BOUNDS = tuple((bucket(bound_ns), repr(bound_ns / 1e9)) for bound_ns in BOUNDS_NS)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Sample(NamedTuple):
    """A value of a metric: a number, or of a histogram its words."""

    name: str
    labels: tuple[str, ...]  # values, in the order of the metric's labels
    value: float | Histogram


def render(samples: Iterable[Sample]) -> str:
    """The samples in the text format 0.0.4, in the order of METRICS."""
    by_name: dict[str, list[Sample]] = {name: [] for name in METRICS}
    for sample in samples:
        by_name[sample.name].append(sample)
    lines: list[str] = []
    for name, group in by_name.items():
        if group:
            metric = METRICS[name]
            lines += [f"# HELP {name} {metric.meaning}", f"# TYPE {name} {metric.kind}"]
            for sample in group:
                lines += _lines(metric, sample)
    return "\n".join(lines) + "\n"


def _lines(metric: Metric, sample: Sample) -> list[str]:
    pairs = [
        f'{label}="{_escaped(value)}"'
        for label, value in zip(metric.labels, sample.labels, strict=True)
    ]
    if isinstance(sample.value, int | float):
        return [f"{_series(sample.name, pairs)} {sample.value!r}"]
    sum_ns, *counts = sample.value
    up_to = list(accumulate(counts, initial=0))  # up_to[i]: in the buckets below bucket i
    lines = []
    for index, bound in (*_BOUNDS, (BUCKETS, "+Inf")):
        series = _series(sample.name + "_bucket", [*pairs, f'le="{bound}"'])
        lines.append(f"{series} {up_to[index]}")
    lines.append(f"{_series(sample.name + '_sum', pairs)} {sum_ns / 1e9!r}")
    lines.append(f"{_series(sample.name + '_count', pairs)} {up_to[-1]}")
    return lines


def _series(name: str, pairs: list[str]) -> str:
    return f"{name}{{{','.join(pairs)}}}" if pairs else name


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
