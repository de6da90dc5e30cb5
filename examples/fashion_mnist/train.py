"""Train the network and write fp32.onnx: `python train.py [--epochs 12] [--threads 2]`.

Needs torch (tried with 2.13.0, CPU) and onnx, in an environment of its own: no device needs them.
The 10,000 test images are not looked at here: no epoch, no setting was chosen by them.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import data
import numpy as np
import torch
from torch import nn

SEED = 20240607
BATCH = 128
LEARNING_RATE_MAX = 4e-3
HERE = Path(__file__).resolve().parent


def network() -> nn.Sequential:
    """[N, 1, 28, 28] -> [N, 10]; 266,602 parameters, 18 million multiplications an image."""
    return nn.Sequential(
        *block(1, 32),
        *block(32, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        *block(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def block(channels_in: int, channels_out: int) -> list[nn.Module]:
    """Convolution, normalization (folded into it at export), ReLU."""
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]


def varied(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Half of the images mirrored, all shifted by up to two pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    down, right = torch.randint(-2, 3, (2,), generator=rng).tolist()
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    return padded[:, :, 2 + down : 30 + down, 2 + right : 30 + right]


def train(model: nn.Module, epochs: int) -> None:
    images_u8, labels_u8 = data.load("train")
    images = torch.from_numpy(data.to_input(images_u8))
    labels = torch.from_numpy(labels_u8.astype(np.int64))
    steps = -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE_MAX, epochs * steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    rng = torch.Generator().manual_seed(SEED)
    for epoch in range(1, epochs + 1):
        model.train()
        began_s, loss_sum = time.monotonic(), 0.0
        for chosen in torch.randperm(len(images), generator=rng).split(BATCH):
            loss = loss_of(model(varied(images[chosen], rng)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item()
        took_s = time.monotonic() - began_s
        print(f"epoch {epoch}/{epochs}: loss {loss_sum / steps:.4f}, {took_s:.0f} s", flush=True)


def export(model: nn.Module, path: Path) -> None:
    """Opset 17 with a free batch axis "N": read by every onnxruntime since 1.13."""
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that there is a newer exporter
        torch.onnx.export(
            model,
            (torch.zeros(1, 1, 28, 28),),
            str(path),
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
            opset_version=17,
            dynamo=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2, help="other numbers round otherwise")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    model = network()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters")
    train(model, arguments.epochs)
    path = HERE / "fp32.onnx"
    export(model, path)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
