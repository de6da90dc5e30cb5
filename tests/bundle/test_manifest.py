"""The rules of model.yaml: every error names its key path; unknown fields survive."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle import document as documents
from edge_runtime.bundle import manifest as manifests
from edge_runtime.errors import BundleError
from tests.bundle.conftest import document
from tests.bundle.test_document import VALUES

Path = tuple[Any, ...]


def changed(path: Path, value: Any, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """The document with one value replaced (or, for `...`, removed)."""
    out = json.loads(json.dumps(base or document()))  # unlike deepcopy, it shares no parts
    place: Any = out
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return out


ARTIFACT = ("variants", 0, "artifact")
GOLDEN = ("goldens", 0, "inputs", 0)
PREPROCESS = {"input": "x", "width": 4, "height": 1}

WRONG: list[tuple[Path, Any, str]] = [
    (("schema",), ..., "schema"),
    (("schema",), 0, "schema"),
    (("schema",), 2, "schema"),
    (("schema",), "1", "schema"),
    (("name",), ..., "name"),
    (("name",), "", "name"),
    (("name",), "Model", "name"),
    (("name",), "../x", "name"),
    (("name",), "a" * 65, "name"),
    (("name",), "a\n", "name"),
    (("name",), "ä", "name"),
    (("version",), 0, "version"),
    (("version",), 1 << 31, "version"),
    (("version",), 1.5, "version"),
    (("version",), True, "version"),
    (("label",), "a\x1b[2J", "label"),
    (("inputs",), [], "inputs"),
    (("inputs",), {}, "inputs"),
    (("inputs", 0, "name"), "", "inputs[0].name"),
    (("inputs", 0, "name"), 3, "inputs[0].name"),
    (("inputs", 0, "datatype"), "float32", "inputs[0].datatype"),
    (("inputs", 0, "shape"), [-2], "inputs[0].shape"),
    (("inputs", 0, "shape"), [1] * 17, "inputs[0].shape"),
    (("inputs", 0, "shape"), [1.5], "inputs[0].shape[0]"),
    (("outputs", 0, "shape"), ..., "outputs[0].shape"),
    (("outputs",), [{"name": "y", "datatype": "FP32", "shape": [-1]}] * 2, "outputs[1].name"),
    (("batch_axis",), 1, "batch_axis"),
    (("batch_axis",), -1, "batch_axis"),
    (("batch_axis",), 2, "batch_axis"),
    (("variants",), [], "variants"),
    (("variants",), document()["variants"] * 2, "variants[1].name"),
    (("variants", 0, "name"), "FP 32", "variants[0].name"),
    (("variants", 0, "backend"), "", "variants[0].backend"),
    (("variants", 0, "options"), [], "variants[0].options"),
    (("variants", 0, "tolerance"), {"rtol": -1}, "variants[0].tolerance.rtol"),
    (("variants", 0, "tolerance"), {"atol": "x"}, "variants[0].tolerance.atol"),
    ((*ARTIFACT, "sha256"), "ab", "variants[0].artifact.sha256"),
    ((*ARTIFACT, "sha256"), "A" * 64, "variants[0].artifact.sha256"),
    ((*ARTIFACT, "sha256"), "../" + "a" * 61, "variants[0].artifact.sha256"),
    ((*ARTIFACT, "sha256"), "a" * 64 + "\n", "variants[0].artifact.sha256"),
    ((*ARTIFACT, "sha256"), ..., "variants[0].artifact.sha256"),
    ((*ARTIFACT, "size"), -1, "variants[0].artifact.size"),
    ((*ARTIFACT, "size"), 1 << 63, "variants[0].artifact.size"),
    ((*ARTIFACT, "filename"), "../m.onnx", "variants[0].artifact.filename"),
    ((*ARTIFACT, "filename"), "a\x00b", "variants[0].artifact.filename"),
    (("preprocess",), {**PREPROCESS, "input": "z"}, "preprocess.input"),
    (("preprocess",), {**PREPROCESS, "color": "CMYK"}, "preprocess.color"),
    (("preprocess",), {**PREPROCESS, "layout": "NWCH"}, "preprocess.layout"),
    (("preprocess",), {**PREPROCESS, "resize": "best"}, "preprocess.resize"),
    (("preprocess",), {**PREPROCESS, "width": -1}, "preprocess.width"),
    (("preprocess",), {**PREPROCESS, "mean": [0, 0]}, "preprocess.mean"),
    (("preprocess",), {**PREPROCESS, "std": [0]}, "preprocess.std"),
    (("preprocess",), {**PREPROCESS, "pixel_scale": 0}, "preprocess.pixel_scale"),
    (("postprocess",), {"output": "z"}, "postprocess.output"),
    (("postprocess",), {"activation": "relu"}, "postprocess.activation"),
    (("postprocess",), {"top_k": 0}, "postprocess.top_k"),
    (("postprocess",), {"labels": ["a\n"]}, "postprocess.labels[0]"),
    (("goldens", 0, "inputs"), [], "goldens[0].inputs"),
    ((*GOLDEN, "name"), "y", "goldens[0].inputs"),
    ((*GOLDEN, "datatype"), "INT8", "goldens[0].inputs[0].datatype"),
    ((*GOLDEN, "shape"), [-1, 4], "goldens[0].inputs[0].shape"),
    ((*GOLDEN, "shape"), [2, 2], "goldens[0].inputs[0].shape"),
    ((*GOLDEN, "shape"), [1 << 40, 4], "goldens[0].inputs[0].shape"),
    ((*GOLDEN, "blob", "size"), 15, "goldens[0].outputs[0].blob.size"),
    ((*GOLDEN, "blob"), {"sha256": "0" * 64, "size": 15}, "goldens[0].inputs[0].blob.size"),
    (("goldens", 0, "variant_outputs"), {"int8": []}, "goldens[0].variant_outputs"),
    (("goldens", 0, "variant_outputs"), {"fp32": []}, "goldens[0].variant_outputs.fp32"),
    (("budgets",), {"latency_ms": -1}, "budgets.latency_ms"),
    (("budgets",), {"memory_bytes": 1.5}, "budgets.memory_bytes"),
    (("card",), 1, "card"),
]


@pytest.mark.parametrize(("path", "value", "where"), WRONG)
def test_a_wrong_value_is_refused_with_its_key_path(path, value, where):
    with pytest.raises(BundleError) as caught:
        manifests.from_document(changed(path, value))
    assert caught.value.where == f"model.yaml: {where}"
    assert caught.value.message


def test_the_document_that_the_wrong_ones_are_made_of_is_right():
    manifest = manifests.from_document(document())
    assert manifest.name == "model"
    assert manifest.goldens[0].expected("fp32") == manifest.goldens[0].outputs
    assert list(manifests.blobs(manifest)) == sorted(manifests.blobs(manifest))


def test_a_misspelt_required_key_is_named():
    wrong = changed(ARTIFACT, {"sha265": "a" * 64, "size": 1})
    with pytest.raises(BundleError, match="did you mean it by the key 'sha265'"):
        manifests.from_document(wrong)


def test_a_newer_schema_says_to_update():
    with pytest.raises(BundleError, match="install a newer edge-runtime"):
        manifests.from_document(document(schema=9, whatever=1))


def test_a_misspelt_optional_key_is_a_near_miss_and_a_foreign_one_is_not():
    wrong = changed(("variants", 0, "tolerence"), {"rtol": 1}, document(lable="x", vendor={"a": 1}))
    misses = list(manifests.near_misses(manifests.from_document(wrong)))
    assert [(path, near) for path, _, near in misses] == [
        ("lable", "label"),
        ("variants[0].tolerence", "tolerance"),
    ]


# Places of unknown fields: every typed struct of the document.
PLACES: list[Path] = [
    (),
    ("inputs", 0),
    ("outputs", 0),
    ("variants", 0),
    ARTIFACT,
    ("goldens", 0),
    GOLDEN,
    (*GOLDEN, "blob"),
]
UNKNOWN = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).map(lambda key: "u-" + key)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), UNKNOWN, VALUES), max_size=6))
def test_unknown_fields_survive_a_round_trip_at_every_level(extras):
    base = document()
    for path, key, value in extras:
        base = changed((*path, key), value, base)
    data = documents.dump(base)
    first = manifests.parse(data)
    assert manifests.dump(first) == data
    assert manifests.parse(manifests.dump(first)) == first
    assert first.document == base


def test_a_changed_value_is_written_and_unknown_fields_stay_beside_it():
    base = changed(("variants", 0, "future"), {"a": 1}, document(zzz=[1]))
    base = changed(("document",), "a key of that name", base)
    first = manifests.parse(documents.dump(base))
    variant = msgspec.structs.replace(first.variants[0], precision="fp32")
    other = msgspec.structs.replace(variant, name="second")
    changed_manifest = msgspec.structs.replace(first, version=4, variants=(other, variant))
    second = manifests.parse(manifests.dump(changed_manifest))
    assert second.version == 4
    assert second.document["zzz"] == [1]
    assert second.document["document"] == "a key of that name"
    assert "future" not in second.document["variants"][0]
    assert second.document["variants"][1]["future"] == {"a": 1}
    assert second.variants == (other, variant)


def test_defaults_are_written_only_where_the_document_has_them():
    text = documents.dump(document(label="", card={}))
    manifest = manifests.parse(text)
    assert manifests.dump(manifest) == text
    assert b"budgets" not in text


def test_integers_where_numbers_are_expected_stay_as_they_were_written():
    base = changed(("variants", 0, "tolerance"), {"rtol": 0, "atol": 18446744073709551615})
    data = documents.dump(base)
    assert manifests.dump(manifests.parse(data)) == data


@pytest.mark.parametrize("count", [1000, 50_000])
def test_many_tensors_are_refused_in_linear_time(count):
    tensors = [{"name": "x", "datatype": "FP32", "shape": []}] * count
    with pytest.raises(BundleError, match="holds"):
        manifests.from_document(document(inputs=tensors))
