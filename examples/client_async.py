"""Ask a model from asyncio: concurrent calls share one connection.

python examples/client_async.py RUN_DIR/infer.sock MODEL
"""

from __future__ import annotations

import asyncio
import sys

import numpy as np

from edge_runtime.client import AsyncClient
from edge_runtime.tensors import DATATYPES


async def main(path: str, model: str) -> None:
    async with AsyncClient(path, timeout_s=2.0) as client:
        spec = (await client.metadata(model))["inputs"][0]
        shape = [max(1, size) for size in spec["shape"]]
        array = np.zeros(shape, DATATYPES[spec["datatype"]][0])
        calls = [client.infer(model, {spec["name"]: array}) for _ in range(20)]
        answers = await asyncio.gather(*calls)
        print(len(answers), "answers:", {name: each.shape for name, each in answers[0].items()})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1], sys.argv[2]))
