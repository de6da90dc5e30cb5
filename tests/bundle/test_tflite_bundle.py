"""Bundles of TFLite files: lint against the manifest, create, and what they say of themselves."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import cli
from edge_runtime.backends import backend
from edge_runtime.bundle import archive, create, lint, source
from edge_runtime.bundle.create import Choice
from edge_runtime.errors import BundleError, EdgeError, UsageError
from tests import tflite_writer as writer
from tests.bundle.conftest import bundle_of, linear, load_with_backend, model_of, saved, weights


@pytest.fixture
def litert() -> None:
    try:
        backend("litert").version()
    except EdgeError as e:
        pytest.skip(f"the backend litert does not run: {e}")


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def made(folder: Path, *models: Path | Choice, **options: Any) -> archive.Bundle:
    chosen = create.Options(**{"name": "tiny", **options})
    create.create(models, chosen, folder / "out.bundle", load_with_backend())
    return archive.open_bundle(folder / "out.bundle")


def findings(data: bytes, names: tuple[str, str], shape: int, **variant: Any) -> list[str]:
    """Errors and notes of lint for one variant on litert."""
    blob = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "filename": "m.tflite"}
    bundle = bundle_of(
        data,
        inputs=[{"name": names[0], "datatype": "FP32", "shape": [-1, shape]}],
        outputs=[{"name": names[1], "datatype": "FP32", "shape": [-1, 4]}],
        variants=[{"name": "v", "backend": "litert", "artifact": blob, **variant}],
        goldens=[],
    )
    found = lint.lint_variant(
        bundle.manifest, bundle.manifest.variants[0], lambda _: source.from_bytes(data)
    )
    return [f"{one.severity}: {one.where} {one.message} {one.remedy}" for one in found]


class TestLint:
    OWN = ("serving_default_input:0", "StatefulPartitionedCall:0")

    def test_the_manifest_must_have_the_names_that_the_backend_will_give(self):
        data = writer.linear(weights())
        assert findings(data, ("input", "output"), 16) == []
        assert "serving_default_input:0" not in findings(data, self.OWN, 16)[0].split("declares")[0]
        assert findings(data, self.OWN, 16, options={"names": "tensor"}) == []
        assert findings(data, self.OWN, 16, backend="openvino") == []

    def test_a_wrong_width_is_an_error(self):
        assert "[-1, 16]" in findings(writer.linear(weights()), ("input", "output"), 17)[0]

    @pytest.mark.parametrize(
        ("operator", "text"),
        [
            ("ethos-u", "libethosu_delegate.so"),
            ("edgetpu-custom-op", "libedgetpu.so.1"),
            ("FlexErf", "SELECT_TF_OPS"),
            ("mine", "custom_domains"),
        ],
    )
    def test_a_custom_operator_names_the_delegate_that_it_needs(self, operator: str, text: str):
        data = writer.compiled(operator)
        found = findings(data, ("input", "output"), 4)
        assert found[0].startswith("error") and operator in found[0] and text in found[0]

    def test_it_is_allowed_with_a_delegate_or_by_name(self):
        data = writer.compiled()
        for variant in (
            {"options": {"delegate": {"library": "libethosu_delegate.so"}}},
            {"custom_domains": ["ethos-u"]},
        ):
            found = findings(data, ("input", "output"), 4, **variant)
            assert not [one for one in found if "custom operator" in one or "ethos" in one]

    def test_a_state_that_nobody_asked_for_is_noted(self):
        assert "note" in findings(writer.counter(), ("x", "total"), 1)[0]
        kept = findings(writer.counter(), ("x", "total"), 1, options={"stateful": "keep"})
        assert not [one for one in kept if "variables" in one]

    def test_external_weights_are_refused(self):
        data = writer.linear(weights(), field_8=[{0: "group"}])
        artifact = lint.lint_artifact(source.from_bytes(data), "m.tflite")
        assert "other files" in artifact.findings[0].message

    def test_too_many_nodes_are_refused(self):
        limits = lint.Limits(nodes_max=1)
        artifact = lint.lint_artifact(source.from_bytes(writer.pair()), "m.tflite", limits)
        assert "2 nodes" in artifact.findings[0].message


@pytest.mark.usefixtures("litert")
class TestCreate:
    def test_a_tflite_file_becomes_a_bundle_with_goldens_and_a_batch_axis(self, tmp_path: Path):
        path = written(tmp_path / "m.tflite", writer.linear(weights()))
        manifest = made(tmp_path, path).manifest
        assert [spec.name for spec in (*manifest.inputs, *manifest.outputs)] == ["input", "output"]
        assert manifest.batch_axis == 0
        assert len(manifest.goldens) == 3
        (variant,) = manifest.variants
        assert (variant.name, variant.backend, variant.options) == ("fp32", "litert", {})

    def test_one_graph_on_three_backends_is_one_bundle(self, tmp_path: Path):
        pytest.importorskip("openvino", reason="openvino is not installed")
        own = ("serving_default_input:0", "StatefulPartitionedCall:0")
        tflite = written(tmp_path / "m.tflite", writer.linear(weights()))
        onnx = saved(_renamed(own), tmp_path / "m.onnx")
        manifest = made(tmp_path, onnx, Choice(tflite, "openvino"), tflite).manifest
        assert [(v.name, v.options) for v in manifest.variants] == [
            ("fp32-onnxruntime", {}),
            ("fp32-openvino", {}),
            ("fp32-litert", {"names": "tensor"}),
        ]
        assert manifest.inputs[0].name == own[0]

    def test_names_that_cannot_be_made_alike_are_refused(self, tmp_path: Path):
        onnx = saved(linear(), tmp_path / "m.onnx")
        with pytest.raises(BundleError, match="other inputs"):
            made(tmp_path, onnx, written(tmp_path / "m.tflite", writer.pair()))

    def test_int8_is_told_from_dynamic_int8(self, tmp_path: Path):
        for data, precision in (
            (writer.linear_int8(weights()), "int8"),
            (writer.linear_dynamic_int8(weights()), "int8-dynamic"),
        ):
            (variant,) = made(tmp_path, written(tmp_path / "m.tflite", data)).manifest.variants
            assert variant.precision == precision

    def test_the_tolerance_of_int8_is_two_steps_of_its_output(self, tmp_path: Path):
        path = written(tmp_path / "m.tflite", writer.linear_int8(weights()))
        (variant,) = made(tmp_path, path).manifest.variants
        assert variant.tolerance.atol == pytest.approx(0.2)

    def test_options_of_a_backend_are_those_of_its_variants(self, tmp_path: Path):
        path = written(tmp_path / "m.tflite", writer.counter())
        bundle = made(tmp_path, path, backend_options={"litert": {"stateful": "keep"}})
        assert bundle.manifest.variants[0].options == {"stateful": "keep"}

    def test_a_backend_that_is_not_given_the_format_is_refused(self, tmp_path: Path):
        path = written(tmp_path / "m.tflite", writer.pair())
        with pytest.raises(UsageError, match="not given 'tflite'"):
            made(tmp_path, Choice(path, "onnxruntime"))

    def test_the_command_line_takes_backends_and_options(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        monkeypatch.chdir(tmp_path)
        written(tmp_path / "m.tflite", writer.counter())
        words = ["create", "litert=m.tflite", "--name", "c", "-o", "c.bundle"]
        words += ["--option", "litert.stateful=keep", "--option", "litert.threads=2"]
        assert cli.main(["bundle", *words]) == 0
        manifest = archive.open_bundle(tmp_path / "c.bundle").manifest
        assert manifest.variants[0].options == {"stateful": "keep", "threads": 2}
        capsys.readouterr()
        for option, text in (("x", "litert.stateful"), ("litrt.a=1", "did you mean 'litert'")):
            assert cli.main(["bundle", *words, "--option", option]) == 2
            assert text in capsys.readouterr().err


def _renamed(names: tuple[str, str]) -> Any:
    from onnx import TensorProto, helper

    return model_of(
        [helper.make_node("MatMul", [names[0], "w"], [names[1]])],
        {"w": weights()},
        {names[0]: (TensorProto.FLOAT, ["N", 16])},
        {names[1]: (TensorProto.FLOAT, ["N", 4])},
    )


def test_a_file_that_was_compiled_for_an_accelerator_gets_its_class_and_delegate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As at a builder's desk, where the accelerator is not: no goldens."""
    path = Path(__file__).parent / "data" / "ethos_u_vela.tflite"
    made_bundle = create.create([path], create.Options(name="npu"), tmp_path / "npu.bundle")
    (variant,) = made_bundle.manifest.variants
    assert (variant.device_class, variant.precision) == ("npu", "int8")
    assert variant.options == {"delegate": {"library": "libethosu_delegate.so"}}
    assert cli.main(["bundle", "lint", str(tmp_path / "npu.bundle")]) == 0
    capsys.readouterr()
    assert cli.main(["bundle", "lint", str(path)]) == 4
    assert "libethosu_delegate.so" in capsys.readouterr().out


def test_quantized_inputs_say_their_scale_in_the_provenance(tmp_path: Path):
    path = written(tmp_path / "m.tflite", writer.compiled("Mfcc"))  # a name that lint knows
    made_bundle = create.create([path], create.Options(name="q"), tmp_path / "q.bundle")
    (model,) = made_bundle.manifest.provenance["models"]
    assert model["quantization"]["input"] == {"scale": pytest.approx(0.1), "zero_point": -1}
