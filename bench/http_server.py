"""`python -m bench.http_server PORT MODEL_FILE INPUT SHAPE`: the server that a team writes itself.

Law of this file: FastAPI with raw bytes in and out on uvicorn, uvloop and httptools, one thread of
onnxruntime; as quick as FastAPI is. The model runs in the event loop: handing it to a thread costs
a small model more than it takes.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, Request, Response


def app(artifact: str, name: str, shape: tuple[int, ...]) -> FastAPI:
    """One route, POST /infer."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        artifact, sess_options=options, providers=["CPUExecutionProvider"]
    )
    made = FastAPI(openapi_url=None)

    @made.post("/infer")
    async def infer(request: Request) -> Response:
        array = np.frombuffer(await request.body(), np.float32).reshape(shape)
        outputs = session.run(None, {name: array})
        return Response(outputs[0].tobytes(), media_type="application/octet-stream")

    return made


def main(port: str, artifact: str, name: str, shape: str) -> None:
    """Serve until SIGTERM."""
    uvicorn.run(
        app(artifact, name, tuple(int(size) for size in shape.split(","))),
        host="127.0.0.1",
        port=int(port),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="error",
        timeout_keep_alive=3600,  # clients pause between rounds
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
