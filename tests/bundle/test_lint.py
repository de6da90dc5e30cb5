"""Nothing that lint refuses reaches a native loader; what it refuses says why."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime import backends
from edge_runtime.bundle import archive, lint, source
from edge_runtime.bundle import manifest as manifests
from edge_runtime.bundle.lint import Limits
from edge_runtime.errors import BundleError
from tests import tflite_writer
from tests.bundle.conftest import bundle_of, document, linear, model_of


def linted(
    data: bytes | onnx.ModelProto, filename: str = "m.onnx", **options: Any
) -> lint.Artifact:
    data = data if isinstance(data, bytes) else data.SerializeToString()
    return lint.lint_artifact(source.from_bytes(data, filename), filename, **options)


def errors(artifact: lint.Artifact) -> list[str]:
    return [each.message for each in artifact.findings if each.severity == "error"]


def single(op_type: str, domain: str) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    node = helper.make_node(op_type, ["input"], ["output"], domain=domain)
    return model_of([node], {}, opset_imports=opsets)


REFERENCE = {
    "format": "edge-runtime-reference",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
    "nodes": [],
}


def test_a_good_model_has_no_findings():
    artifact = linted(linear())
    assert artifact.format == "onnx"
    assert artifact.findings == ()
    assert [value.name for value in artifact.inputs or ()] == ["input"]


@pytest.mark.parametrize("domain", ["", "ai.onnx", "ai.onnx.ml", "com.microsoft"])
def test_operators_of_standard_domains_are_allowed(domain):
    assert errors(linted(single("Anything", domain))) == []


def test_an_unknown_domain_is_refused_unless_the_variant_names_it():
    model = single("Op", "com.example")
    assert "com.example::Op of an unknown domain" in errors(linted(model))[0]
    assert errors(linted(model, custom_domains=("com.example",))) == []
    assert errors(linted(model, custom_domains=("com.exampl",)))


def test_an_operator_that_the_file_defines_itself_is_known_and_others_of_its_domain_are_not():
    model = single("Own", "local")
    body = [helper.make_node("Relu", ["a"], ["b"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("local", "Own", ["a"], ["b"], body, opsets))
    assert errors(linted(model)) == []
    model.graph.node.append(helper.make_node("Other", ["input"], ["z"], domain="local"))
    assert "local::Other" in errors(linted(model))[0]


def test_an_unknown_operator_inside_a_subgraph_is_found():
    output = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    node = helper.make_node("Hidden", [], ["r"], domain="evil")
    branch = helper.make_graph([node], "branch", [], [output])
    outer = helper.make_node("If", ["c"], ["output"], then_branch=branch, else_branch=branch)
    assert "evil::Hidden" in errors(linted(model_of([outer], {})))[0]


@pytest.mark.parametrize("op_type", ["EPContext", "PythonOp", "ATen"])
def test_operators_that_run_code_or_open_files_are_refused_even_if_the_domain_is_named(op_type):
    model = single(op_type, "com.microsoft")
    assert op_type in errors(linted(model, custom_domains=("com.microsoft",)))[0]


def test_external_data_is_refused():
    model = linear()
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "outside")
    onnx.external_data_helper.set_external_data(tensor, "/etc/passwd")
    model.graph.initializer.append(tensor)
    assert "'outside' in another file" in errors(linted(model))[0]


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\x1c\0\0\0ORTM" + bytes(100), "onnxruntime"),
        (b"\x08\x08\x3a\0ORTM" + bytes(100), "onnxruntime"),
        (b"PK\3\4" + bytes(100), "zip"),
        (b"\x80\x04\x95" + bytes(100), "pickle"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "hdf5"),
        (b"\x7fELF" + bytes(100), "elf"),
        (b"<?xml version='1.0'?><net/>", "openvino"),
        (b"  <net name='x'/>", "openvino"),
        (b"hello", "unknown"),
        (b"", "unknown"),
    ],
)
@pytest.mark.parametrize("filename", ["", "model.bin"])
def test_a_format_that_is_not_supported_is_refused_by_its_content(head, name, filename):
    artifact = linted(head, filename)
    assert artifact.format == name
    assert len(errors(artifact)) == 1
    assert artifact.findings[0].remedy


def test_the_name_does_not_make_a_pickle_a_model():
    assert linted(b"\x80\x04\x95" + bytes(100), "m.onnx").format == "pickle"


def test_tflite_is_recognised_and_its_root_must_lie_inside():
    good = tflite_writer.pair()
    assert linted(good, "m.tflite").format == "tflite"
    assert errors(linted(good, "m.tflite")) == []
    bad = (1 << 30).to_bytes(4, "little") + b"TFL3" + bytes(100)
    assert "outside the file" in errors(linted(bad))[0]


def test_a_reference_model_is_read():
    artifact = linted(json.dumps(REFERENCE).encode(), "m.reference.json")
    assert (artifact.format, artifact.findings) == ("reference", ())
    for bad in (b"{", b"{}", b"[]" * 9, b'{"format": "x"}', b"[" * 100_000, b"\xff{"):
        assert errors(linted(bad, "m.reference.json"))


def test_limits_are_kept():
    assert "bytes; at most 10" in errors(linted(linear(), limits=Limits(artifact_bytes_max=10)))[0]
    assert "1 nodes; at most 0" in errors(linted(linear(), limits=Limits(nodes_max=0)))[0]
    big = json.dumps(REFERENCE).encode()
    limits = Limits(reference_bytes_max=10)
    assert "at most 10" in errors(linted(big, "m.json", limits=limits))[0]


# --- artifact against manifest -------------------------------------------------------------------


def bundle_with(
    model: onnx.ModelProto | bytes,
    backend: str = "onnxruntime",
    filename: str = "m.onnx",
    **more: Any,
) -> archive.Bundle:
    """A bundle that declares "x" FP32 [-1, 4] -> "y" FP32 [-1, 4] for a model."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    base = document(data)
    base["variants"][0] |= {"backend": backend, **more.pop("variant", {})}
    base["variants"][0]["artifact"]["filename"] = filename
    return bundle_of(data, variants=base["variants"], **more)


def fitting(**changes: Any) -> onnx.ModelProto:
    kind = (TensorProto.FLOAT, ["N", 4])
    inputs = changes.get("inputs", {"x": kind})
    outputs = changes.get("outputs", {"y": kind})
    return model_of([helper.make_node("Relu", ["x"], ["y"])], {}, inputs, outputs)


def findings(bundle: archive.Bundle, severity: str = "error") -> list[str]:
    found = lint.lint(bundle.manifest, bundle.blob)
    return [f"{each.where}: {each.message}" for each in found if each.severity == severity]


def test_a_fitting_artifact_passes():
    bundle = bundle_with(fitting())
    assert lint.lint(bundle.manifest, bundle.blob) == []
    lint.check(bundle.manifest, bundle.blob)


FLOAT, N4 = TensorProto.FLOAT, ["N", 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {"z": (FLOAT, N4)}}, "has inputs ['z']"),
        ({"inputs": {"x": (FLOAT, N4), "z": (FLOAT, N4)}}, "has inputs ['x', 'z']"),
        ({"outputs": {"y": (FLOAT, N4), "z": (FLOAT, N4)}}, "has outputs"),
        ({"inputs": {"x": (TensorProto.DOUBLE, N4)}}, "has FP64"),
        ({"inputs": {"x": (TensorProto.COMPLEX64, N4)}}, "without a name in the protocol"),
        ({"inputs": {"x": (FLOAT, ["N", 5])}}, "has shape [-1, 5]"),
        ({"inputs": {"x": (FLOAT, [1, 4])}}, "has shape [1, 4]"),
        ({"inputs": {"x": (FLOAT, [4])}}, "has shape [4]"),
    ],
)
def test_an_artifact_that_is_not_as_declared_is_refused(changes, message):
    bundle = bundle_with(fitting(**changes))
    assert any(message in each for each in findings(bundle))
    with pytest.raises(BundleError, match="variants"):
        lint.check(bundle.manifest, bundle.blob)


def test_a_sequence_where_a_tensor_is_declared_is_refused():
    model = fitting()
    model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", FLOAT, None))
    assert any("is a sequence, not a tensor" in each for each in findings(bundle_with(model)))


def test_what_the_artifact_leaves_open_the_manifest_may_fix():
    assert findings(bundle_with(fitting(inputs={"x": (FLOAT, ["N", None])}))) == []
    assert findings(bundle_with(fitting(inputs={"x": (FLOAT, None)}))) == []


def test_a_backend_is_given_only_the_formats_that_are_linted_for_it():
    reference = json.dumps(REFERENCE).encode()
    assert findings(bundle_with(reference, "reference", "m.reference.json")) == []
    refused = findings(bundle_with(reference, "onnxruntime", "m.reference.json"))
    assert any("is not given 'reference' files" in each for each in refused)
    assert any("no lint rules" in each for each in findings(bundle_with(fitting(), "tensorrt")))


def test_every_backend_has_lint_rules():
    assert set(backends.BACKENDS) <= set(lint.BACKEND_FORMATS)


def test_warnings_name_what_is_odd():
    bundle = bundle_with(
        fitting(),
        variant={"options": {"provider": {"library": "/opt/evil.so"}}, "tolerence": {}},
        goldens=[],
        postprocess={"labels": ["a", "b", "c"]},
        preprocess={"input": "x", "layout": "HW", "width": 5, "color": "L"},
        inputs=[{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    )
    warnings = "\n".join(findings(bundle, "warning"))
    for part in ("tolerence", "goldens", "3 labels for 4 values", "width: is 5", "/opt/evil.so"):
        assert part in warnings
    lint.check(bundle.manifest, bundle.blob)  # none of them refuses the bundle


@pytest.mark.parametrize("operator", ["GatherND", "ScatterElements", "Gather"])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("kind", [TensorProto.INT64, FLOAT])
def test_indices_of_clients_that_a_backend_does_not_check_are_told(operator, backend, kind):
    node = helper.make_node(operator, ["x", "x"], ["y"])
    bundle = bundle_with(model_of([node], {}, {"x": (kind, N4)}, {"y": (FLOAT, N4)}), backend)
    is_odd = operator != "Gather" and backend == "openvino" and kind != FLOAT
    warnings = findings(bundle, "warning")
    assert is_odd == any(f"the indices of {operator}" in each for each in warnings)


def test_a_damaged_artifact_is_a_finding_not_a_crash():
    assert any("runs past the end" in each for each in findings(bundle_with(b"\x08\x08\x3a\x7f")))


def test_custom_domains_travel_in_the_manifest():
    bundle = bundle_with(fitting(), variant={"custom_domains": ["com.example"]})
    again = manifests.parse(manifests.dump(bundle.manifest))
    assert again.variants[0].custom_domains == ("com.example",)
