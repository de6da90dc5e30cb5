"""Tiny models whose answer is known: what a probe runs.

Law of this file: data and the arithmetic that says what is right, in plain Python; no numpy and no
library. The bytes are made by tests/doctor/models.py, and a test makes them again and compares.

Every model computes y = relu(W x + b) with x FP32 [1, 16] and y FP32 [1, 16]. All numbers are small
integers, which float32, float16 and bfloat16 hold exactly: an answer that differs is wrong.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable

WIDTH = 16
INPUT = [float(i % 5 - 1) for i in range(WIDTH)]
BIAS = [float(j % 3 - 1) for j in range(WIDTH)]
WEIGHTS = [[float((i * 7 + j * 3) % 5 - 2) for i in range(WIDTH)] for j in range(WIDTH)]  # y by x


def answer() -> list[float]:
    """What every model must give for INPUT."""
    sums = (
        sum(weight * x for weight, x in zip(row, INPUT, strict=True)) + bias
        for row, bias in zip(WEIGHTS, BIAS, strict=True)
    )
    return [max(value, 0.0) for value in sums]


_ONNX = (
    "c-rG&v)a$erOd@x!Npk4#h4_-TwI!~#NwWso2$jk#a2?3m{;s1!MK2tiHna5BqzjJsl*bLno}yoQj(chsnx^5A;2LZ"
    "!05zS?$yA-z`$^T0RkKt7#j8iu{~*Gq^d_3Bgal;F>>7v6QjiMU@#hfqv1DX!%xc-QWhk6!MwwO2o}=VQNqANNr;b&"
    "hl5dwgNuoS5r_qnfP$6if=(=43<BH$Pc^$P"
)

_TFLITE = (
    "c-rk$y$%6E5dMzCiH%$#a)k%bdjKkxQlU_YC}>0>;X0*4;aR)@rN{6lXJ%)XrE@BYOTPPdX203_DJB6h><>CX9SItU"
    "VGtoC3uFQN5I7R9C7=kwitI5l5l&f_G55gV?hN5>zH`~;F6-O!!$mZlf;FuD#P_NG-Iph)@5@`a^L^9%e}4b@{r3Dq"
    "gmw)u){AAzf`AYcjJL0h`X+=KVXnG{eX@?Gy*H@oZc8Lr#N4t+-aQq&dpI<}bKkj~1?8f$TTutXh|pI1NINmI^@%R^"
    "V!6f}-5d2e&Ge<O*!o>xPUCo^vGGICGmvT|?y23r<qo`<nio@*cB*$KGrda"
)


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


def _reference() -> bytes:
    matmul = {"op": "matmul", "inputs": ["x"], "output": "sum", "bias": BIAS}
    document = {
        "format": "edge-runtime-reference",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, WIDTH]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, WIDTH]}],
        "nodes": [
            matmul | {"weights": [list(column) for column in zip(*WEIGHTS, strict=True)]},
            {"op": "relu", "inputs": ["sum"], "output": "y"},
        ],
    }
    return json.dumps(document).encode()


# Format of an artifact -> the model in it.
MODELS: dict[str, Callable[[], bytes]] = {
    "onnx": lambda: _unpacked(_ONNX),
    "tflite": lambda: _unpacked(_TFLITE),
    "reference": _reference,
}
