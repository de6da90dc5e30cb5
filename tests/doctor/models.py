"""Makes the two tiny models that the probe carries: `python -m tests.doctor.models` prints them.

Law of this file: it writes what `edge_runtime/backends/tiny.py` says the models are, with libraries
that the device does not need (onnx; flatbuffers and LiteRT's schema). A test makes them again and
compares.
"""

from __future__ import annotations

import base64
import textwrap
import zlib
from typing import Any

import numpy as np

from edge_runtime.backends import tiny


def onnx_model() -> bytes:
    """x FP32 [1, 16] -> Gemm -> Relu -> y FP32 [1, 16]."""
    from onnx import TensorProto, helper, numpy_helper

    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["sum"], transB=1),
            helper.make_node("Relu", ["sum"], ["y"]),
        ],
        "tiny",
        [info("x", TensorProto.FLOAT, [1, tiny.WIDTH])],
        [info("y", TensorProto.FLOAT, [1, tiny.WIDTH])],
        [
            numpy_helper.from_array(np.array(tiny.WEIGHTS, np.float32), "w"),
            numpy_helper.from_array(np.array(tiny.BIAS, np.float32), "b"),
        ],
    )
    # Opset 11 and IR 6: old enough for every library that we take.
    opset = [helper.make_opsetid("", 11)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=6).SerializeToString())


def tflite_model() -> bytes:
    """The same as one FULLY_CONNECTED with a fused RELU, version 1: every runtime has it."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT()
    model.version = 3
    model.description = "tiny"
    model.buffers = [schema.BufferT() for _ in range(3)]  # buffer 0 is empty by convention
    for index, values in ((1, tiny.WEIGHTS), (2, tiny.BIAS)):
        model.buffers[index].data = np.frombuffer(np.array(values, "<f4").tobytes(), np.uint8)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    code.version = 1
    model.operatorCodes = [code]
    graph = schema.SubGraphT()
    row, square = [1, tiny.WIDTH], [tiny.WIDTH, tiny.WIDTH]
    tensors = [("x", row, 0), ("w", square, 1), ("b", [tiny.WIDTH], 2), ("y", row, 0)]
    graph.tensors = [_tensor(schema, *tensor) for tensor in tensors]
    graph.inputs, graph.outputs = [0], [3]
    step = schema.OperatorT()
    step.opcodeIndex, step.inputs, step.outputs = 0, [0, 1, 2], [3]
    step.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
    step.builtinOptions = schema.FullyConnectedOptionsT()
    step.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.RELU
    graph.operators = [step]
    model.subgraphs = [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _tensor(schema: Any, name: str, shape: list[int], buffer: int) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.buffer = name, shape, buffer
    tensor.type = schema.TensorType.FLOAT32
    return tensor


def text(model: bytes) -> str:
    """The model as `tiny.py` carries it."""
    packed = base64.b85encode(zlib.compress(model, 9)).decode()
    return "\n".join(f'    "{line}"' for line in textwrap.wrap(packed, 90, break_on_hyphens=False))


if __name__ == "__main__":
    for name, made in (("ONNX", onnx_model()), ("TFLITE", tflite_model())):
        print(f"# {len(made)} bytes\n_{name} = (\n{text(made)}\n)")
