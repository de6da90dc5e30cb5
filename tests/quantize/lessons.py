"""Training functions for tests, as users write them. Each writes a line to the file LESSONS."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


def train(model: Any, seed: int) -> None:
    """Two steps towards fixed answers, on one thread: the same sums on every machine."""
    import torch

    torch.set_num_threads(1)
    note("train")
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(16) % 4
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for epoch in range(2):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")


def fail(model: Any, seed: int) -> None:
    note("fail")
    raise ValueError("no labels today")


def die_once(model: Any, seed: int) -> None:
    """As if the power went in the middle; the second time it trains."""
    if not lines():
        note("die")
        os.kill(os.getpid(), signal.SIGKILL)
    train(model, seed)


def note(what: str) -> None:
    with Path(os.environ["LESSONS"]).open("a") as file:
        file.write(what + "\n")


def lines() -> list[str]:
    """What was written so far."""
    path = Path(os.environ["LESSONS"])
    return path.read_text().split() if path.exists() else []
