"""Training after pruning, as a recipe's `fine_tune: {train: "retrain:train"}` calls it.

Needs torch. The pruned network learns from the labels and from the answers of the network that it
was cut from (Hinton et al. 2015, "Distilling the knowledge in a neural network"). The test images
are not looked at.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import data
import numpy as np
import torch
from torch import nn

from quantize import onnx_door, torch_door

HERE = Path(__file__).resolve().parent
EPOCHS = int(os.environ.get("RETRAIN_EPOCHS", "8"))
BATCH = 128
LEARNING_RATE_MAX = 2e-3
TEMPERATURE = 3.0
TEACHER_SHARE = 0.7


def train(model: nn.Module, seed: int) -> nn.Module:
    """The model, trained in place; about 25 s an epoch on two cores."""
    teacher = torch_door.module_of(onnx_door.load(HERE / "fp32.onnx")).eval()
    images_u8, labels_u8 = data.load("train")
    images = torch.from_numpy(data.to_input(images_u8))
    labels = torch.from_numpy(labels_u8.astype(np.int64))
    rng = torch.Generator().manual_seed(seed)
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE_MAX, steps)
    model.train()
    for epoch in range(EPOCHS):
        began_s, loss_sum = time.monotonic(), 0.0
        for chosen in torch.randperm(len(images), generator=rng).split(BATCH):
            shown = varied(images[chosen], rng)
            with torch.no_grad():
                wanted = teacher(shown)
            loss = loss_of(model(shown), labels[chosen], wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(chosen)
        took_s = time.monotonic() - began_s
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {loss_sum / len(images):.4f}, {took_s:.0f} s")
    return model.eval()


def varied(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Half of the images mirrored, all shifted by up to two pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    down, right = torch.randint(-2, 3, (2,), generator=rng).tolist()
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    return padded[:, :, 2 + down : 30 + down, 2 + right : 30 + right]


def loss_of(answers: torch.Tensor, labels: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Labels, and the teacher's softened answers."""
    soft = nn.functional.kl_div(
        nn.functional.log_softmax(answers / TEMPERATURE, dim=1),
        nn.functional.softmax(wanted / TEMPERATURE, dim=1),
        reduction="batchmean",
    )
    hard = nn.functional.cross_entropy(answers, labels)
    return TEACHER_SHARE * TEMPERATURE**2 * soft + (1 - TEACHER_SHARE) * hard
