"""Networks as users write them, for tests of torch sources. Imported where torch is."""

from __future__ import annotations

import os
import signal

import torch
from torch import nn


class Small(nn.Module):
    """[N, 1, 8, 8] -> scores [N, 4]: normalization, dropout, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(16 * 16, 32)
        self.last = nn.Linear(32, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(image)).relu()
        x = nn.functional.max_pool2d(x + self.second(x).relu(), 2)
        return self.last(self.drop(self.hidden(x.flatten(1)).relu()))


class Two(nn.Module):
    """Two inputs of several kinds, two named outputs, not in the order of the alphabet."""

    def forward(self, ids: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        whole = ids.float() * weight
        return {"total": whole.sum(1), "each": whole}


class Joined(nn.Module):
    """All samples become one row: no batch."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.reshape(1, -1) * 2


class Lone(nn.Module):
    """One sample, and an error for more."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.reshape(1, 64)[:, :4] * 2


class Eigen(nn.Module):
    """A step that ONNX does not have."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(image[:, 0, :4, :4]).abs()


class Branch(nn.Module):
    """An if over values."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image * 2 if image.sum() > 0 else image


class Chance(nn.Module):
    """Other answers each time."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + torch.rand_like(image)


class Scaled(nn.Module):
    """Neither its weights nor its files say what it computes."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image * self.scale


class Casting(nn.Module):
    """Answers of another datatype."""

    def __init__(self, datatype: torch.dtype) -> None:
        super().__init__()
        self.datatype = datatype

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.to(self.datatype)


class Masked(nn.Module):
    """Infinity where a pixel is dark."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.masked_fill(image < 0.5, float("-inf"))


def small() -> nn.Module:
    return Small().eval()


def with_example() -> tuple[nn.Module, torch.Tensor]:
    return Small().eval(), torch.zeros(1, 1, 8, 8)


def in_training() -> nn.Module:
    return Small()


def weights() -> dict[str, torch.Tensor]:
    return Small().state_dict()


def failing() -> nn.Module:
    raise FileNotFoundError("weights.safetensors")


def two() -> nn.Module:
    return Two().eval()


def lone() -> nn.Module:
    return Lone().eval()


def joined() -> nn.Module:
    return Joined().eval()


def eigen() -> nn.Module:
    return Eigen().eval()


def branch() -> nn.Module:
    return Branch().eval()


def chance() -> nn.Module:
    return Chance().eval()


def doubled() -> nn.Module:
    return Scaled(2.0).eval()


def tripled() -> nn.Module:
    return Scaled(3.0).eval()


def masked() -> nn.Module:
    return Masked().eval()


def of_a_batch() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)).eval()


def wide() -> nn.Module:
    return nn.Linear(8, 4).double().eval()


def empty() -> nn.Module:
    return nn.Linear(8, 4, device="meta").eval()


def brief() -> nn.Module:
    return Casting(torch.bfloat16).eval()


def imaginary() -> nn.Module:
    return Casting(torch.complex64).eval()


def dying() -> nn.Module:
    print("loading the weights", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")


def train(model: nn.Module, seed: int) -> None:
    """A few steps towards the mean of the picture's quarters."""
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    wanted = nn.functional.avg_pool2d(images, 4).flatten(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(20):
        loss = (model(images) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: {loss.item():.4f}")


def diverge(model: nn.Module, seed: int) -> None:
    with torch.no_grad():
        model.last.weight.fill_(float("nan"))  # type: ignore[operator,union-attr]
