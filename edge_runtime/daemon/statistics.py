"""What workers counted, also those that are gone, and what events say happened.

Law of this file: it keeps and adds up; nothing here asks the system or decides. A worker counts in
its own pages; when it ends they are added to those of its series, so that totals only grow while
the daemon lives, whoever dies or is replaced. Nothing is done per request.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from edge_runtime import metrics
from edge_runtime.events import Event, Value
from edge_runtime.metrics import Sample
from edge_runtime.serving import page

if TYPE_CHECKING:
    from edge_runtime.daemon.processes import WorkerProcess

# Of one model, versions that do not run and are still told apart; those before are one. A device
# that is updated every day must not grow a series a day.
ENDED_SERIES_MAX = 8
OLDER = "older"
# Rates are of the last one to two of these: long enough to be calm, short enough to be now.
LOOK_S = 5.0

# Outcome -> its word.
OUTCOMES = dict(
    zip(
        metrics.OUTCOMES,
        (page.REQUESTS, page.INVALID, page.FAILED, page.REFUSED, page.EXPIRED, page.CANCELLED),
        strict=True,
    )
)
HISTOGRAMS = {"request": page.REQUEST, "queue": page.QUEUE, "compute": page.COMPUTE}
# Metric -> its word.
_COUNTERS = {
    "edge_batches_total": page.BATCHES,
    "edge_batched_requests_total": page.BATCHED,
    "edge_cache_hits_total": page.CACHE_HITS,
    "edge_cache_misses_total": page.CACHE_MISSES,
    "edge_held_back_total": page.HELD,
    "edge_goldens_total": page.GOLDENS,
}
# Event, the fields that it must have, the metric that it counts in, the fields that are its labels.
_COUNTED: tuple[tuple[str, dict[str, Value], str, tuple[str, ...]], ...] = (
    ("model_activated", {}, "edge_swaps_total", ("model",)),
    ("fell_back", {}, "edge_fallbacks_total", ("model",)),
    ("variant_failed_over", {}, "edge_failovers_total", ("model", "cause")),
    ("worker_died", {"cause": "golden"}, "edge_golden_failures_total", ("model",)),
    ("model_idle", {}, "edge_idle_unloads_total", ("model",)),
    ("worker_died", {}, "edge_worker_deaths_total", ("model", "cause")),
    ("variant_refused", {}, "edge_load_failures_total", ("model", "code")),
    (
        "variant_refused",
        {"code": "golden_mismatch"},
        "edge_golden_failures_total",
        ("model",),
    ),
    ("template_died", {}, "edge_template_deaths_total", ("backend",)),
    ("governor_step", {}, "edge_governor_steps_total", ("ladder", "direction", "reason")),
)

_PER_MODEL = tuple(metric for _, _, metric, labels in _COUNTED if labels == ("model",))


class Series(NamedTuple):
    """What is counted apart: one variant of one version of a model. In metrics' order of labels."""

    model: str
    version: str
    variant: str
    backend: str


class Durations(msgspec.Struct, frozen=True):
    """A histogram as people read it; quantiles are None without any request.

    Attributes:
        buckets: (bucket, count) of those with any, when asked for (`metrics.bucket`).
    """

    count: int
    sum_s: float
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    buckets: tuple[tuple[int, int], ...] | None = None


class Traffic(msgspec.Struct, frozen=True):
    """What one series, or all of a model together, did since the daemon started."""

    outcomes: dict[str, int]
    batches: int
    batched: int
    cache_hits: int
    cache_misses: int
    request: Durations
    queue: Durations
    compute: Durations


class ModelStatistics(msgspec.Struct, frozen=True):
    """One model since the daemon started; `requests_per_s` of the last seconds."""

    requests_per_s: float
    traffic: Traffic
    versions: dict[str, Traffic]  # "VERSION VARIANT": those that run, and the newest that did
    deaths: dict[str, int]  # by cause
    load_failures: dict[str, int]  # by error code
    golden_failures: int
    swaps: int
    fallbacks: int


class Statistics:
    """Of one daemon; also a sink of its events."""

    def __init__(self, now_ns: int) -> None:
        self._running: dict[WorkerProcess, Series] = {}
        self._ended: dict[Series, memoryview] = {}
        self._counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._looks: deque[tuple[int, Counter[str]]] = deque([(now_ns, Counter())], maxlen=2)

    # -- counting ---------------------------------------------------------------------------------

    def watch(self, worker: WorkerProcess) -> None:
        """Count what a worker does, from its start to its end."""
        spec = worker.spec
        series = Series(spec.model, str(spec.version), spec.variant, spec.backend)
        self._running[worker] = series
        worker.ended.add_done_callback(lambda _: self._keep(worker))

    def _keep(self, worker: WorkerProcess) -> None:
        series = self._running.pop(worker)
        if not any(worker.status[word] for word in page.COUNTERS):
            return  # it never served: no reason to forget one that did
        page.add(self._pages(series), worker.status)
        ended = [one for one in self._ended if one.model == series.model and one.version != OLDER]
        ended = [one for one in ended if one not in self._running.values()]
        for one in ended[: max(len(ended) - ENDED_SERIES_MAX, 0)]:
            words = self._ended.pop(one)
            page.add(self._pages(Series(one.model, OLDER, "", "")), words)

    def _pages(self, series: Series) -> memoryview:
        """Where the dead of a series are added up; the last to die is the last of the dict."""
        words = self._ended.pop(series, None) or memoryview(bytearray(page.PAGE_SIZE)).cast("Q")
        self._ended[series] = words
        return words

    def write(self, event: Event) -> None:
        """Count an event."""
        for name, wanted, metric, labels in _COUNTED:
            fields = event.fields
            if event.name == name and all(fields.get(key) == wanted[key] for key in wanted):
                self._counts[metric, tuple(str(fields.get(label, "")) for label in labels)] += 1

    def forget(self, model: str) -> None:
        """Nothing of a model is installed any more."""
        self._ended = {one: words for one, words in self._ended.items() if one.model != model}
        for metric, labels in list(self._counts):
            if labels[0] == model and metrics.METRICS[metric].labels[0] == "model":
                del self._counts[metric, labels]

    def look(self, now_ns: int) -> None:
        """Remember how far the counts are, now and then: rates are made of it."""
        if now_ns - self._looks[-1][0] >= LOOK_S * 1e9:
            self._looks.append((now_ns, self._answered()))

    def _answered(self) -> Counter[str]:
        answered: Counter[str] = Counter()
        for series, words in self._all():
            answered[series.model] += words[page.REQUESTS]
        return answered

    def _all(self) -> Iterator[tuple[Series, memoryview]]:
        yield from self._ended.items()
        for worker, series in self._running.items():
            yield series, worker.status

    # -- telling ----------------------------------------------------------------------------------

    def workers(self) -> dict[WorkerProcess, Series]:
        """Those that run, whatever they are for."""
        return dict(self._running)

    def model(self, name: str, now_ns: int, *, buckets: bool = False) -> ModelStatistics:
        """One model, all its versions together and each."""
        together = memoryview(bytearray(page.PAGE_SIZE)).cast("Q")
        versions: dict[str, memoryview] = {}
        for series, words in self._all():
            if series.model == name:
                key = f"{series.version} {series.variant}".strip()
                if key not in versions:
                    versions[key] = memoryview(bytearray(page.PAGE_SIZE)).cast("Q")
                page.add(versions[key], words)
                page.add(together, words)
        then_ns, before = self._looks[0]
        return ModelStatistics(
            requests_per_s=_rate(together[page.REQUESTS] - before[name], now_ns - then_ns),
            traffic=_traffic(together, buckets),
            versions={key: _traffic(words, buckets=False) for key, words in versions.items()},
            deaths=self._by("edge_worker_deaths_total", name),
            load_failures=self._by("edge_load_failures_total", name),
            golden_failures=self._counts["edge_golden_failures_total", (name,)],
            swaps=self._counts["edge_swaps_total", (name,)],
            fallbacks=self._counts["edge_fallbacks_total", (name,)],
        )

    def _by(self, metric: str, model: str) -> dict[str, int]:
        return {
            labels[1]: count
            for (name, labels), count in self._counts.items()
            if name == metric and labels[0] == model
        }

    def samples(self, models: Iterable[str]) -> Iterator[Sample]:
        """Everything counted, for Prometheus; of `models` also what has not happened yet.

        What OLDER adds up is left out: its growth would look like traffic of now.
        """
        together: dict[Series, memoryview] = {}
        for series, words in self._all():
            if series.version != OLDER:
                if series not in together:
                    together[series] = memoryview(bytearray(page.PAGE_SIZE)).cast("Q")
                page.add(together[series], words)
        for series, words in together.items():
            yield from _samples(series, words)
        nothing = {(name, (one,)): 0 for name in _PER_MODEL for one in models}
        for (metric, labels), count in (nothing | self._counts).items():
            yield Sample(metric, labels, count)


def _rate(count: int, time_ns: int) -> float:
    return max(count, 0) / (time_ns / 1e9) if time_ns > 0 else 0.0


def _samples(series: Series, words: memoryview) -> Iterator[Sample]:
    for outcome, word in OUTCOMES.items():
        yield Sample("edge_requests_total", (*series, outcome), words[word])
    for name, word in HISTOGRAMS.items():
        yield Sample(f"edge_{name}_duration_seconds", series, _histogram(words, word))
    for name, word in _COUNTERS.items():
        yield Sample(name, series, words[word])


def _traffic(words: memoryview, buckets: bool) -> Traffic:
    durations = {
        name: _durations(_histogram(words, word), buckets) for name, word in HISTOGRAMS.items()
    }
    return Traffic(
        outcomes={outcome: words[word] for outcome, word in OUTCOMES.items()},
        batches=words[page.BATCHES],
        batched=words[page.BATCHED],
        cache_hits=words[page.CACHE_HITS],
        cache_misses=words[page.CACHE_MISSES],
        **durations,
    )


def _histogram(words: memoryview, word: int) -> list[int]:
    return words[word : word + metrics.WORDS].tolist()


def _durations(histogram: list[int], buckets: bool) -> Durations:
    p50_s, p90_s, p99_s = (metrics.quantile_s(histogram, share) for share in (0.5, 0.9, 0.99))
    return Durations(
        count=metrics.count(histogram),
        sum_s=histogram[0] / 1e9,
        p50_s=p50_s,
        p90_s=p90_s,
        p99_s=p99_s,
        buckets=tuple((i, n) for i, n in enumerate(histogram[1:]) if n) if buckets else None,
    )
