"""An executor that works in the test's own process: fast, and it can be cut off."""

from __future__ import annotations

from typing import Self

from quantize import executors
from quantize.executors import Job, Said


class Cut(Exception):
    """The power went."""


class InlineExecutor:
    """See executors.Executor. After `most` jobs the next one cuts the search off."""

    def __init__(self, most: int = 1000) -> None:
        self.workers = 1
        self.jobs: list[Job] = []
        self._most = most
        self._said: list[tuple[str, Said | str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, job: Job) -> None:
        if len(self.jobs) >= self._most:
            raise Cut
        self.jobs.append(job)
        self._said.append((job.key, executors.call(job)))

    def wait(self, timeout_s: float) -> list[tuple[str, Said | str]]:
        said, self._said = self._said, []
        return said

    def cancel(self, key: str) -> None:
        raise AssertionError("nothing runs here that could be cancelled")

    def close(self) -> None:
        pass
