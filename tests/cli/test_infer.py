"""`infer` against a server on a real socket: images, arrays, JSON; what it prints."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_runtime.cli import tensor_json
from edge_runtime.errors import EdgeError, RequestError

from .conftest import Done, FakeDaemon, Model, classifier

Edge = Callable[..., Done]
LABELS = [f"level-{i}" for i in range(10)]


def affine(array: Any) -> Model:
    """y = 2 x + 1 for one input of any shape."""

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"] * 2 + 1, "sum": np.array([inputs["x"].sum()], np.float64)}

    tensor = {"datatype": "FP32", "shape": [-1, 4]}
    described = {
        "name": "affine",
        "versions": ["7"],
        "platform": "reference",
        "inputs": [{"name": "x", **tensor}],
        "outputs": [{"name": "y", **tensor}, {"name": "sum", "datatype": "FP64", "shape": [1]}],
    }
    return Model(described, run)


@pytest.fixture
def models(daemon: FakeDaemon) -> FakeDaemon:
    post = {"labels": LABELS, "activation": "softmax", "top_k": 2}
    daemon.models = {
        "brightness": classifier([-1, 1, 8, 8], postprocess=post),
        "affine": affine(None),
    }
    return daemon


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = []
    for value in (10, 200):
        paths.append(tmp_path / f"grey-{value}.png")
        Image.new("L", (16, 16), value).save(paths[-1])
    return paths


# --- images -------------------------------------------------------------------------------------


def test_images_print_labels_confidences_and_microseconds(
    edge: Edge, models: FakeDaemon, pictures: list[Path]
) -> None:
    done = edge("infer", "brightness", "--image", *pictures)
    assert done.code == 0, done.err
    header, dark, dark_second, bright, _ = done.out.strip().split("\n")
    assert header.split()[:3] == ["IMAGE", "LABEL", "CONFIDENCE"]
    assert dark.split()[:2] == [str(pictures[0]), "level-0"]
    assert bright.split()[:2] == [str(pictures[1]), "level-7"]
    assert 0.9 < float(dark.split()[2]) < 1.0
    assert int(dark.split()[3]) > 0 and dark.split()[4] == "123"
    assert dark_second.split()[0] == "level-1"


def test_images_as_json(edge: Edge, models: FakeDaemon, pictures: list[Path]) -> None:
    for words in (
        ("--json", "infer", "brightness", "--image", pictures[1]),
        ("infer", "brightness", "--image", pictures[1], "--json"),
    ):
        reply = json.loads(edge(*words).out)
        assert reply["model_version"] == "7"
        (result,) = reply["results"]
        assert result["image"] == str(pictures[1])
        assert result["classes"][0]["label"] == "level-7"
        assert result["server_us"] == 123.0 and result["round_trip_us"] > 0


def test_top_and_repeat(edge: Edge, models: FakeDaemon, pictures: list[Path]) -> None:
    done = edge("infer", "brightness", "--image", pictures[0], "--top", 4, "--repeat", 5)
    assert len(done.out.strip().split("\n")) == 5


def test_images_that_cannot_be_used_are_refused(
    edge: Edge, models: FakeDaemon, tmp_path: Path, pictures: list[Path]
) -> None:
    assert edge("infer", "brightness", "--image", tmp_path / "absent.png").code == 3
    assert edge("infer", "brightness", "--image", __file__).code == 2
    assert edge("infer", "affine", "--image", pictures[0]).code == 11
    assert edge("infer", "brightness", "--input", "no", "--image", pictures[0]).code == 11
    assert edge("infer", "absent", "--image", pictures[0]).code == 3


def test_an_output_that_the_bundle_names_wrongly_is_refused(
    edge: Edge, models: FakeDaemon, pictures: list[Path]
) -> None:
    models.models["wrong"] = classifier([-1, 1, 8, 8], postprocess={"output": "logits"})
    done = edge("infer", "wrong", "--image", pictures[0])
    assert (done.code, "'logits'" in done.err) == (11, True)


# --- arrays -------------------------------------------------------------------------------------


def test_an_array_prints_shapes_and_values(edge: Edge, models: FakeDaemon, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([[1, 2, 3, 4]], np.float32))
    for words in ((), ("--input", "x")):
        done = edge("infer", "affine", "--npy", path, *words)
        assert done.code == 0, done.err
        assert done.out.startswith("y: FP32 [1, 4]\n[[3. 5. 7. 9.]]\nsum: FP64 [1]\n[10.]\n")
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 4), np.float32))
    reply = json.loads(edge("--json", "infer", "affine", "--npy", tmp_path / "x.npz").out)
    assert reply["outputs"][0] == {
        "name": "y",
        "datatype": "FP32",
        "shape": [2, 4],
        "data": [1] * 8,
    }


def test_what_is_no_array_is_refused(edge: Edge, models: FakeDaemon, tmp_path: Path) -> None:
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    huge = tmp_path / "huge.npy"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
    huge.write_bytes(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117) + b"\n")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 and nothing")
    for path in (objects, huge, broken, Path(__file__), Path("/dev/null"), tmp_path):
        done = edge("infer", "affine", "--npy", path)
        assert done.code == 2, (path, done)
    assert edge("infer", "affine", "--npy", tmp_path / "absent.npy").code == 3


# --- JSON ---------------------------------------------------------------------------------------

REQUEST = {
    "id": "42",
    "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [[1, 2, 3, 4.5]]}],
    "outputs": [{"name": "y"}],
}


def test_json_is_the_protocols_in_both_directions(
    edge: Edge, models: FakeDaemon, tmp_path: Path
) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps(REQUEST))
    done = edge("infer", "affine", "--json", path)
    assert done.code == 0, done.err
    assert json.loads(done.out) == {
        "model_name": "affine",
        "model_version": "7",
        "id": "42",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [3, 5, 7, 10]}],
    }


def test_json_comes_from_stdin(models: FakeDaemon) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "infer", "affine", "--json", "-"],
        input=json.dumps(REQUEST),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"][0]["data"] == [3, 5, 7, 10]


def test_a_wrong_json_request_is_an_error_document(
    edge: Edge, models: FakeDaemon, tmp_path: Path
) -> None:
    path = tmp_path / "request.json"
    for text in ("", "{", "[]", "{}", '{"inputs": [{"name": "x"}]}', "\xff"):
        path.write_text(text, encoding="latin-1")
        done = edge("infer", "affine", "--json", path)
        assert (done.code, done.err) == (11, "")
        assert json.loads(done.out)["error"]["code"] == "invalid_request"
    assert edge("infer", "affine", "--json", tmp_path / "absent").code == 3
    assert edge("infer", "affine", "--json", tmp_path).code == 2


def test_not_a_number_becomes_null() -> None:
    array = np.array([1.0, np.nan, np.inf], np.float32)
    assert document_of(array)["data"] == [1.0, None, None]
    texts = np.array([b"caf\xc3\xa9", b"\xff"], dtype=object)
    assert document_of(texts) == {
        "name": "y",
        "datatype": "BYTES",
        "shape": [2],
        "data": ["caf\u00e9", "\ufffd"],
    }


def document_of(array: Any) -> dict[str, Any]:
    import msgspec

    document = tensor_json.document("m", "1", {"y": array})
    return json.loads(msgspec.json.encode(document))["outputs"][0]  # type: ignore[no-any-return]


def tensor_of(datatype: str, shape: list[int], data: object) -> Any:
    request = {"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": data}]}
    return tensor_json.arrays(tensor_json.parse(json.dumps(request).encode(), "test"))["x"]


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("FP32", [2], [1]),
        ("FP32", [1], ["1"]),
        ("FP32", [1], [True]),
        ("FP32", [1], [None]),
        ("FP32", [1], [{}]),
        ("UINT8", [1], [256]),
        ("UINT8", [1], [-1]),
        ("INT64", [1], [1 << 70]),
        ("INT32", [1], [1.5]),
        ("BOOL", [1], [1]),
        ("BYTES", [1], [1]),
        ("BF16", [1], [1.0]),
        ("NOPE", [1], [1]),
        ("FP32", [-1], []),
        ("FP32", [1] * 20, [1]),
    ],
)
def test_an_element_of_another_type_or_out_of_range_is_refused(
    datatype: str, shape: list[int], data: object
) -> None:
    with pytest.raises(RequestError):
        tensor_of(datatype, shape, data)


def test_data_may_be_flat_or_nested_to_any_depth() -> None:
    nested: Any = [1]
    for _ in range(500):
        nested = [nested]
    for data in ([[1, 2], [3, 4]], [1, 2, 3, 4], [[1], 2, [[3, 4]]]):
        assert tensor_of("INT32", [2, 2], data).tolist() == [[1, 2], [3, 4]]
    assert tensor_of("INT32", [1], nested).tolist() == [1]
    assert tensor_of("BYTES", [2], ["a", "\u00e9"]).tolist() == [b"a", b"\xc3\xa9"]


@settings(deadline=None)  # the machine may be busy with other tests
@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_any_bytes_are_a_request_or_a_clear_refusal(data: bytes) -> None:
    try:
        tensor_json.arrays(tensor_json.parse(data, "fuzz"))
    except EdgeError:
        pass  # the other allowed outcome


# --- the model itself ---------------------------------------------------------------------------


def test_without_a_source_the_inputs_and_outputs_are_shown(edge: Edge, models: FakeDaemon) -> None:
    out = edge("infer", "affine").out
    assert "inputs   x     FP32      [-1, 4]" in out
    assert json.loads(edge("infer", "affine", "--json").out)["name"] == "affine"


def test_infer_without_a_daemon_is_over_after_its_timeout(edge: Edge, run_dir: Path) -> None:
    done = edge("--run-dir", run_dir, "infer", "m", "--timeout", 0.2)
    assert done.code in (6, 7)
    assert str(run_dir) in done.err


def test_stdin_that_is_too_large_is_refused(
    edge: Edge, models: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_runtime.cli import infer

    monkeypatch.setattr(infer, "JSON_BYTES_MAX", 10)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 11)))
    done = edge("infer", "affine", "--json", "-")
    assert done.code == 2 and "--npy" in done.out
