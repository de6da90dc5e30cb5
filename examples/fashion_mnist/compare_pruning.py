"""Which channels to take: `prune_channels` beside torch-pruning, same network, same share.

Needs torch, onnxruntime and torch-pruning (tried with 1.6.1): `PYTHONPATH=../.. python
compare_pruning.py`. Prints multiplications and accuracy on the 10,000 test images *before* any
training again: that is where a choice of channels shows. Nothing is drawn at random.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import data
import numpy as np
import torch
import torch_pruning
from torch import nn

from quantize import onnx_door, passes, torch_door
from quantize.passes import Bench
from quantize.pruning import work

HERE = Path(__file__).resolve().parent
SHARES = (0.25, 0.375, 0.5)
CALIBRATION_IMAGES = 256
OURS = {
    "weights": {"importance": "weights"},
    "not compensated": {"importance": "activations", "compensate": False, "rounds": 1},
    "activations, 1 round": {"importance": "activations", "rounds": 1},
    "activations": {"importance": "activations"},
}


def main() -> None:
    test, labels = data.load("t10k")
    train, _ = data.load("train")
    images = torch.from_numpy(data.to_input(test))
    feeds = {"input": data.to_input(train[:CALIBRATION_IMAGES])}
    print(f"{'share':>6} {'how':<36} {'million MACs':>12} {'right of 10,000':>16}")
    for share in SHARES:
        for name, options in OURS.items():
            model, macs = ours(share, options, feeds)
            report(share, f"prune_channels, {name}", macs, right(model, images, labels))
        model, macs = theirs(share)
        report(share, "torch-pruning, group magnitude", macs, right(model, images, labels))


def ours(share: float, options: dict, feeds: dict[str, np.ndarray]) -> tuple[nn.Module, int]:
    how = passes.decode({"use": "prune_channels", "ratio": share, **options}, "p")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned.onnx"
        how.apply(HERE / "fp32.onnx", out, Bench(feeds, (), (), 0, 0, lambda what: None))
        return torch_door.module_of(onnx_door.load(out)).eval(), work.macs(out)


def theirs(share: float) -> tuple[nn.Module, int]:
    """Layers kept a multiple of 8 here too."""
    model, example = network(), torch.zeros(1, 1, 28, 28)
    torch_pruning.pruner.MetaPruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share,
        ignored_layers=[model[-1]],
        round_to=8,
    ).step()
    return model, int(torch_pruning.utils.count_ops_and_params(model, example)[0])


def network() -> nn.Sequential:
    """fp32.onnx with torch's own layers (normalization is folded into the convolutions there)."""
    graph = onnx_door.load(HERE / "fp32.onnx")
    arrays = {name: torch.from_numpy(one.copy()) for name, one in onnx_door.arrays(graph).items()}
    layers: list[nn.Module] = []
    for node in graph.graph.node:
        weight = arrays.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type == "Conv":
            layers.append(nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1))
        elif node.op_type == "Gemm":
            layers.append(nn.Linear(weight.shape[1], weight.shape[0]))
        else:
            made = {"Relu": nn.ReLU, "MaxPool": lambda: nn.MaxPool2d(2), "Flatten": nn.Flatten}
            layers.append(made[node.op_type]())
        if weight is not None:
            layers[-1].load_state_dict({"weight": weight, "bias": arrays[node.input[2]]})
    return nn.Sequential(*layers).eval()


def right(model: nn.Module, images: torch.Tensor, labels: np.ndarray) -> int:
    with torch.no_grad():
        answers = torch.cat([model(part) for part in images.split(500)])
    return int((answers.argmax(1).numpy() == labels).sum())


def report(share: float, how: str, macs: int, count: int) -> None:
    print(f"{share:>6} {how:<36} {macs / 1e6:>12.2f} {count:>16,}")


if __name__ == "__main__":
    main()
