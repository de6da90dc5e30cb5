"""`PYTHON bench/triton_server.py PORT MODEL MODEL_FILE INPUT SHAPE`: Triton with one ONNX model.

Law of this file: it runs in an interpreter that has `nvidia-pytriton`, onnxruntime and numpy, and
perhaps nothing of ours, so it imports nothing of ours. The server is the one that the package
carries; it has no onnxruntime of its own, so the model runs in pytriton's Python process, which is
how that package serves every model. Batches form without a delay.
"""

import sys
from typing import Any

import numpy as np
import onnxruntime
from pytriton.decorators import batch  # type: ignore[import-not-found,unused-ignore]
from pytriton.model_config import (  # type: ignore[import-not-found,unused-ignore]
    DynamicBatcher,
    ModelConfig,
    Tensor,
)
from pytriton.triton import (  # type: ignore[import-not-found,unused-ignore]
    Triton,
    TritonConfig,
)

ROWS_MAX = 64


def main(port: str, model: str, artifact: str, name: str, shape: str) -> None:
    """Serve until SIGTERM."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        artifact, sess_options=options, providers=["CPUExecutionProvider"]
    )
    batched = isinstance(session.get_inputs()[0].shape[0], str)

    @batch  # type: ignore[untyped-decorator,unused-ignore]
    def infer(**inputs: Any) -> dict[str, Any]:
        array = inputs[name]
        if batched or len(array) == 1:
            return {"y": session.run(None, {name: array})[0]}
        rows = [session.run(None, {name: array[i : i + 1]})[0] for i in range(len(array))]
        return {"y": np.concatenate(rows)}

    sizes = tuple(int(size) for size in shape.split(","))[1:]
    config = ModelConfig(max_batch_size=ROWS_MAX, batcher=DynamicBatcher())
    ports = TritonConfig(
        http_port=int(port),
        http_address="127.0.0.1",
        allow_grpc=False,
        allow_metrics=False,
        log_verbose=0,
    )
    with Triton(config=ports) as triton:
        triton.bind(
            model_name=model,
            infer_func=infer,
            inputs=[Tensor(name=name, dtype=np.float32, shape=sizes)],
            outputs=[Tensor(name="y", dtype=np.float32, shape=(-1,))],
            config=config,
        )
        triton.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
