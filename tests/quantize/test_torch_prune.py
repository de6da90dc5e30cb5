"""torch_prune: channels of the user's own module go, it is trained, and exported.

Needs torch, onnxscript and torch-pruning (the extra quantize-torch); skipped by name without them.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.backends import backend
from edge_runtime.errors import UsageError
from quantize import building, datasets, origins, scratch
from quantize.building import Built
from quantize.models import ModelFile
from quantize.pruning import work
from quantize.recipe import Data, Recipe, Variant

pytest.importorskip("torch", reason="torch is not installed (extra quantize-torch)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra quantize-torch)")
pytest.importorskip("torch_pruning", reason="torch-pruning is not installed (extra quantize-torch)")

NETS = "tests.quantize.nets"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "samples.npz"
    np.savez(path, x=np.random.Generator(np.random.PCG64(3)).random((40, 1, 8, 8), np.float32))
    return path


@pytest.fixture(scope="module")
def source(data: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    given = Recipe("net", f"{NETS}:small", Data(str(data)))
    return origins.read(origins.export(given, tmp_path_factory.mktemp("export")))


def built(source: ModelFile, data: Path, folder: Path, said: list[str], **how: object) -> Built:
    step = {"use": "torch_prune", **how}
    (chain,) = building.chains([Variant("pruned", passes=(step,))], source)
    samples = datasets.load(Data(str(data)), source.inputs)
    return building.build(chain, source, samples, 0, scratch.Scratch(folder), said.append)


def test_channels_go_in_rounds_with_training_and_the_file_keeps_its_signature(
    source: ModelFile, data: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    made = built(source, data, tmp_path, said, ratio=0.5, rounds=2, train=f"{NETS}:train")
    assert made.refusal == "" and made.path is not None
    assert sum(line.startswith("step 19") for line in said) == 2  # trained after each round
    assert work.macs(made.path) < 0.5 * work.macs(source.path)
    x = np.load(data)["x"]
    loaded = backend("onnxruntime").load(made.path, {})
    assert [one.name for one in loaded.inputs] == ["image"]
    got = loaded.run({"image": x})["output"]
    wanted = x.reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(-1, 4)
    before = backend("onnxruntime").load(source.path, {}).run({"image": x})["output"]
    assert np.square(got - wanted).mean() < 0.5 * np.square(before - wanted).mean()


def test_what_was_pruned_with_other_code_of_the_module_is_not_taken_again(
    source: ModelFile, data: Path
) -> None:
    """Dropout leaves no trace in a file that was exported in eval mode, but training feels it."""
    samples = datasets.load(Data(str(data)), source.inputs)
    keys: dict[str, list[str]] = {"torch_prune": [], "clean": []}
    for code in ("one", "another"):
        changed = source._replace(code_sha256=code)
        for use, found in keys.items():
            (chain,) = building.chains([Variant("x", passes=({"use": use},))], changed)
            found += building.keys(chain, changed, samples, 0)
    assert {use: len(set(found)) for use, found in keys.items()} == {"torch_prune": 2, "clean": 1}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"exclude": ["frist"]}, "has no 'frist'.*did you mean 'first'"),
        ({"exclude": ["first", "second", "hidden"]}, "no channel can go"),
        ({"train": f"{NETS}:diverge"}, "weight 'last.weight' is not finite"),
        ({"train": f"{NETS}:absent"}, "cannot be imported"),
        ({"train": "no function"}, "'no function' cannot be imported"),
    ],
)
def test_what_cannot_be_pruned_refuses_the_variant_with_the_reason(
    how: dict[str, object], said: str, source: ModelFile, data: Path, tmp_path: Path
) -> None:
    made = built(source, data, tmp_path, [], **how)
    assert made.path is None and re.search(said, made.refusal), made.refusal


def test_it_comes_first_and_needs_a_torch_source(source: ModelFile) -> None:
    prune = {"use": "torch_prune"}
    with pytest.raises(UsageError, match="needs a model that is torch"):
        building.chains([Variant("late", passes=({"use": "clean"}, prune))], source)
    plain = source._replace(traits=source.traits - {"torch"})
    with pytest.raises(UsageError, match="needs a model that is torch"):
        building.chains([Variant("onnx", passes=(prune,))], plain)
