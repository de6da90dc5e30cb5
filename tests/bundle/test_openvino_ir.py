"""OpenVINO IR as one file: what lint says of it, and that OpenVINO says the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle import create, lint, openvino_ir, source
from edge_runtime.bundle.manifest import Manifest
from edge_runtime.errors import BundleError, NotFoundError

XML = """<?xml version="1.0"?>
<net name="g" version="11"><layers>
 <layer id="0" name="x" type="Parameter" version="opset1"><data shape="?,2" element_type="f32"/>
  <output><port id="0" precision="FP32" names="x"><dim>-1</dim><dim>2</dim></port></output></layer>
 <layer id="1" name="w" type="Const" version="opset1">
  <data element_type="f32" shape="1,2" offset="0" size="8"/>
  <output><port id="0" precision="FP32"><dim>1</dim><dim>2</dim></port></output></layer>
 <layer id="2" name="sum" type="Add" version="opset1"><data auto_broadcast="numpy"/>
  <input><port id="0" precision="FP32"><dim>-1</dim><dim>2</dim></port>
   <port id="1" precision="FP32"><dim>1</dim><dim>2</dim></port></input>
  <output><port id="2" precision="FP32" names="a,y"><dim>-1</dim><dim>2</dim></port></output>
 </layer>
 <layer id="3" name="y/sink_port_0" type="Result" version="opset1">
  <input><port id="0" precision="FP32"><dim>-1</dim><dim>2</dim></port></input></layer>
</layers><edges>
 <edge from-layer="0" from-port="0" to-layer="2" to-port="0"/>
 <edge from-layer="1" from-port="0" to-layer="2" to-port="1"/>
 <edge from-layer="2" from-port="2" to-layer="3" to-port="0"/>
</edges></net>"""
WEIGHTS = np.array([10, 20], np.float32).tobytes()


def packed(xml: str = XML, weights: bytes = WEIGHTS) -> bytes:
    return openvino_ir.pack(xml.encode(), weights)


def linted(data: bytes) -> lint.Artifact:
    return lint.lint_artifact(source.from_bytes(data), "m.ir")


def errors(data: bytes) -> str:
    return " ".join(one.message for one in linted(data).findings if one.severity == "error")


def test_inputs_outputs_and_operators_are_read():
    artifact = linted(packed())
    assert artifact.format == "openvino-ir" and not artifact.findings
    assert artifact.inputs is not None and artifact.outputs is not None
    shown = [(v.name, v.datatype, v.shape) for v in (*artifact.inputs, *artifact.outputs)]
    assert shown == [("x", "FP32", (-1, 2)), ("y", "FP32", (-1, 2))]
    assert isinstance(artifact.graph, openvino_ir.IrGraph)
    assert artifact.graph.operators["opset1", "Add"] == 1
    assert create.guess_precision(artifact.graph) == "fp32"


REFUSED = {
    "weights beyond the file": (XML.replace('offset="0"', 'offset="4"'), "refers to 8 bytes"),
    "a negative offset": (XML.replace('offset="0"', 'offset="-8"'), "refers to"),
    "an operator of an extension": (
        XML.replace('type="Add" version="opset1"', 'type="Mine" version="extension"'),
        "Mine",
    ),
    "an output from nowhere": (XML.replace('from-layer="2"', 'from-layer="9"'), "nothing"),
    "an output without an edge": (XML.replace('to-layer="3"', 'to-layer="9"'), "nothing"),
    "a document type with entities": (
        XML.replace("<net", '<!DOCTYPE net [<!ENTITY a "b">]><net', 1),
        "document type",
    ),
    "another document": ("<a/>", "no layers"),
    "no XML": ("garbage", "is no OpenVINO IR"),
    "a size that is no number": (XML.replace('size="8"', 'size="eight"'), "ValueError"),
    "nesting without end": ("<net>" * 500, "nested"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_lint_refuses(case: str):
    xml, text = REFUSED[case]
    assert text in errors(packed(xml))


LAYER = '<layer id="%d" name="%s" type="%s" version="opset1"><output>%s</output></layer>'
PAYLOAD = 4 << 20
HUGE = {
    "lines": "<net>" + "\n" * PAYLOAD + "</net>",
    "characters by number": "<net>" + "&#65;" * (PAYLOAD // 5) + "</net>",
    "a name": f'<net a="{"A" * PAYLOAD}"/>',
    "dimensions": "<net><layers>"
    + LAYER % (0, "a", "Add", f'<port id="0">{"<dim>1</dim>" * (PAYLOAD // 12)}</port>')
    + "</layers></net>",
    "digits": XML.replace("<dim>1</dim>", f"<dim>{'1' * PAYLOAD}</dim>", 1),
}


@pytest.mark.parametrize("case", HUGE)
def test_much_of_anything_is_refused_in_time_that_grows_with_the_file_only(case: str):
    began_s = time.process_time()
    assert errors(packed(HUGE[case]))
    assert time.process_time() - began_s < 4, "some ms a MiB, on any machine"


@pytest.mark.parametrize(
    "many",
    [
        lambda n: "".join(LAYER % (i, "a", f"Type{i}", "") for i in range(n)),
        lambda n: LAYER % (0, "a", "Add", "".join(f'<port id="{i}"/>' for i in range(n))),
        lambda n: "".join(LAYER % (i, "a", "Result", "") for i in range(n)),
    ],
    ids=["types", "ports", "results"],
)
def test_what_is_kept_of_a_graph_has_a_limit(many: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openvino_ir, "KEPT_BYTES_MAX", 1000 * openvino_ir.KEPT_ITEM_BYTES)
    assert "too many" not in errors(packed(f"<net><layers>{many(500)}</layers></net>"))
    assert "too many" in errors(packed(f"<net><layers>{many(1001)}</layers></net>"))


@given(st.integers(0, len(packed()) - 1), st.binary(min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_damage_anywhere_is_a_finding_or_a_graph_and_never_anything_else(at: int, junk: bytes):
    data = bytearray(packed())
    data[at : at + len(junk)] = junk
    linted(bytes(data))


@given(st.integers(0, len(packed()) - 1))
def test_a_file_that_was_cut_short_is_refused(size: int):
    assert errors(packed()[:size])


def test_a_bare_graph_is_refused_with_what_to_do():
    artifact = lint.lint_artifact(source.from_bytes(XML.encode()), "m.xml")
    assert "bundle create" in artifact.findings[0].message


# --- with the library ----------------------------------------------------------------------------


@pytest.fixture
def load() -> Any:
    from edge_runtime.backends import backend
    from tests.backends import contract

    contract.openvino()
    return lambda path: backend("openvino").load(path, {})


def written(folder: Path, weights: bytes = WEIGHTS) -> Path:
    (folder / "m.xml").write_text(XML)
    (folder / "m.bin").write_bytes(weights)
    return folder / "m.xml"


def test_openvino_reads_what_lint_read(tmp_path: Path, load: Any):
    path = tmp_path / "m"
    path.write_bytes(packed())
    model = load(path)
    artifact = linted(packed())
    for specs, values in ((model.inputs, artifact.inputs), (model.outputs, artifact.outputs)):
        assert values is not None
        assert [(s.name, s.datatype, s.shape) for s in specs] == [v[:1] + v[2:4] for v in values]
    assert model.run({"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[11, 21]]


def test_bundle_create_makes_one_file_of_the_two(tmp_path: Path, load: Any):
    def run(variant: Any, path: Path) -> Any:
        return load(path).run

    out = tmp_path / "m.bundle"
    made = create.create([written(tmp_path)], create.Options("ir", goldens=2), out, run)
    manifest: Manifest = made.manifest
    (variant,) = manifest.variants
    assert (variant.backend, variant.precision, variant.artifact.filename) == (
        "openvino",
        "fp32",
        "m.ir",
    )
    assert manifest.batch_axis == 0 and len(manifest.goldens) == 2


def test_models_of_the_same_file_name_stay_apart(tmp_path: Path):
    weights = np.frombuffer(WEIGHTS, np.float32)
    paths = []
    for name, scale in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        paths.append(written(tmp_path / name, (weights * np.float32(scale)).tobytes()))
    made = create.create(paths, create.Options("ir"), tmp_path / "m.bundle")
    assert len({variant.artifact.sha256 for variant in made.manifest.variants}) == 2


def test_a_graph_without_its_weights_names_the_missing_file(tmp_path: Path):
    path = written(tmp_path)
    path.with_suffix(".bin").unlink()
    with pytest.raises(NotFoundError) as caught:
        create.create([path], create.Options("ir"), tmp_path / "out")
    assert caught.value.where.endswith("m.bin")


def test_weights_of_another_graph_are_refused(tmp_path: Path):
    with pytest.raises(BundleError, match="refers to 8 bytes"):
        create.create([written(tmp_path, b"1234")], create.Options("ir"), tmp_path / "out")


@pytest.mark.parametrize("size", [0, 7, 20, 200])
def test_a_cut_file_is_a_backend_error(tmp_path: Path, load: Any, size: int):
    from edge_runtime.errors import BackendError

    path = tmp_path / "m"
    path.write_bytes(packed()[:size])
    with pytest.raises(BackendError):
        load(path)
