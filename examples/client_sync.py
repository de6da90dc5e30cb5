"""Ask a model over its socket: one call, shared memory, many calls.

python examples/client_sync.py RUN_DIR/infer.sock MODEL
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from edge_runtime.client import Client
from edge_runtime.tensors import DATATYPES


def main(path: str, model: str) -> None:
    with Client(path, timeout_s=2.0) as client:
        spec = client.metadata(model)["inputs"][0]
        shape = [max(1, size) for size in spec["shape"]]  # -1 is any size: take 1
        dtype = DATATYPES[spec["datatype"]][0]

        # 1. Any numpy array. Large ones go by shared memory without being asked.
        outputs = client.infer(model, {spec["name"]: np.zeros(shape, dtype)})
        for name, array in outputs.items():
            print(name, array.dtype, array.shape)

        # 2. A camera that writes straight into shared memory: nothing is copied on the way.
        frame = client.tensor(shape, dtype)
        frame[...] = 0
        result = client.infer_result(model, {spec["name"]: frame})
        print(f"version {result.model_version} took {result.server_ns / 1000:.0f} us")

        # 3. Many inputs, several at the server at once, answers in order.
        def images() -> Iterator[dict[str, np.ndarray]]:
            for _ in range(100):
                yield {spec["name"]: np.zeros(shape, dtype)}

        print(sum(1 for _ in client.infer_many(model, images())), "answers")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
