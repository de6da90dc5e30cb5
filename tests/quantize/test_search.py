"""The search: what it tries, that it goes on where it stopped, and that it finds what is there."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.backends import backend
from edge_runtime.bundle import archive
from edge_runtime.errors import UsageError
from quantize import causes, cli, executors, kernels, moves, search, targets, trials, workflow
from quantize import recipe as recipes
from quantize.executors import Said
from quantize.moves import Facts
from quantize.recipe import Budgets, Calibration, Data, Recipe, Search, Variant
from quantize.search import Searched
from quantize.trials import Found, Journal, Trial
from tests.quantize.inline import Cut, InlineExecutor

MODEL = Path("examples/fashion_mnist/fp32.onnx").resolve()
FACTS = Facts("onnx", frozenset({"Conv", "Gemm"}), kernels.Slow(("a",), (), ("d",)), tuple("dbca"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blobs of light, labelled by the float model."""
    noise = np.random.Generator(np.random.PCG64(1)).random((300, 1, 7, 7), dtype=np.float32)
    x = noise.repeat(4, axis=2).repeat(4, axis=3)
    answers = backend("onnxruntime").load(MODEL, {}).run({"input": x})["logits"]
    path = tmp_path_factory.mktemp("data") / "samples.npz"
    np.savez(path, x=x, y=answers.argmax(axis=1))
    return path


@pytest.fixture(scope="module", autouse=True)
def no_more_libraries() -> Iterator[None]:
    """The same single settings whatever is installed beside onnxruntime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "can_import", lambda module: module == "onnxruntime")
        yield


def recipe(data: Path, **limits: object) -> Recipe:
    told = {"backends": ("onnxruntime",), "rounds": 3, "time_s_max": 1000.0} | limits
    return Recipe(
        "clothes",
        str(MODEL),
        Data(str(data)),
        seed=3,
        calibration=Calibration(samples=32),
        variants=(Variant("fp32"),),
        search=msgspec.convert(told, Search),
    )


def silent(_: str) -> None:
    pass


def tried(found: Searched) -> list[object]:
    """What does not depend on time."""
    assert [one.refusal for one in found.trials if not one.found] == []
    return [(one.key, one.number, one.variant, one.why, one.found) for one in found.trials]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A search that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with InlineExecutor() as executor:
        return search.search(recipe(data, trials_max=18), folder, executor, silent)


def strip(found: list[object], folder: str) -> str:
    return msgspec.json.encode(found).decode().replace(folder, "")


def test_it_begins_with_the_single_settings_and_goes_on_from_the_best(whole: Searched) -> None:
    why = [one.why for one in whole.trials]
    assert why[0] == "onnxruntime minmax" and "onnxruntime entropy" in why
    assert any("few input channels stay float" in one for one in why)
    assert any("changes sides" in one for one in why)
    assert [one.number for one in whole.trials] == list(range(1, 19))
    assert len({one.key for one in whole.trials}) == 18
    assert all(one.refusal or one.time > 0 for one in whole.trials)
    assert {one.name for one in whole.layers} >= {"/0/Conv", "/3/Conv", "/18/Gemm"}


def test_no_single_setting_beats_the_front(whole: Searched) -> None:
    front = [search.costs(one) for one in search.front(whole.trials)]
    single = [one for one in whole.trials if one.why.startswith("onnxruntime ") and one.time]
    assert len(single) >= 8
    for one in single:
        loss, time, size = search.costs(one)
        assert any(
            a <= loss
            and b <= time * (1 + search.MARGINS[1])
            and c <= size * (1 + search.MARGINS[2])
            for a, b, c in front
        )


def test_trials_shows_what_was_tried_and_what_is_on_the_front(
    whole: Searched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path / search.JOURNAL)
    for one in whole.trials:
        journal.add(one)
    lost = msgspec.structs.replace(whole.trials[0], key="k", number=99, found=None, refusal="gone")
    journal.add(lost)
    assert cli.main(["trials", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "s01-int8-minmax" in text and "front" in text and "gone" in text
    assert cli.main(["trials", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["trials"]) == 19 and 0 < len(said["front"]) <= 18
    assert cli.main(["trials", str(tmp_path / "none")]) == 3


def test_one_that_was_cut_off_goes_on_and_ends_as_if_it_had_not_been(
    whole: Searched, data: Path, tmp_path: Path
) -> None:
    given = recipe(data, trials_max=18)
    with pytest.raises(Cut), InlineExecutor(most=12) as executor:
        search.search(given, tmp_path, executor, silent)
    journal = tmp_path / search.JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 10  # the single settings; the batch after them was cut off
    journal.write_bytes(b"".join(lines)[:-40])  # and so was the last line
    with InlineExecutor() as executor:
        second = search.search(given, tmp_path, executor, silent)
    attempts = [job for job in executor.jobs if job.function == "quantize.trials:attempt"]
    assert len(attempts) == 18 - 9
    paths = [Path(one.found.path).parent for one in whole.trials if one.found]
    assert strip(tried(second), str(tmp_path)) == strip(tried(whole), str(paths[0]))
    with InlineExecutor() as executor:
        third = search.search(given, tmp_path, executor, silent)
    assert [job.function for job in executor.jobs] == ["quantize.search:rank_layers"]
    assert third == second


def test_layers_that_would_take_too_long_are_given_up_and_that_is_noted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LAYERS_SHARE", 1e-6)
    given = recipe(data)
    assert given.search is not None
    ready = workflow.prepare(trials.alone(given, given.variants))
    clock = search.Clock(lambda: 0.0, 0.0, given.search.time_s_max)
    with InlineExecutor() as executor:
        run = search._Run(ready, given, given.search, tmp_path, executor, silent, clock)
        facts = search._with_layers(run, search._facts(run))
    assert facts.layers == () and run.layers == ()
    note = search._with(given, (), run).notes[-1]
    assert note.startswith("sensitive layers were not looked for: ")
    assert "layers would take" in note


def test_no_trial_begins_after_the_time(data: Path, tmp_path: Path) -> None:
    now_s = [0.0]

    class Slow(InlineExecutor):
        def submit(self, job: executors.Job) -> None:
            now_s[0] += 10
            super().submit(job)

    with Slow() as executor:
        found = search.search(
            recipe(data, time_s_max=25.0), tmp_path, executor, silent, lambda: now_s[0]
        )
    assert len(executor.jobs) == len(found.trials) == 3
    assert "3 trials" in found.recipe.notes[-1]


def test_local_processes_find_what_one_process_finds(
    whole: Searched, data: Path, tmp_path: Path
) -> None:
    with executors.LocalExecutor(2) as executor:
        found = search.search(recipe(data, trials_max=4), tmp_path, executor, silent)
    paths = [Path(one.found.path).parent for one in whole.trials if one.found]
    assert strip(tried(found), str(tmp_path)) == strip(tried(whole)[:4], str(paths[0]))


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (make test-quantize)"
)
def test_a_ray_cluster_finds_what_this_machine_finds(
    whole: Searched, data: Path, tmp_path: Path
) -> None:
    with executors.executor("ray", 2) as executor:
        found = search.search(recipe(data, trials_max=4), tmp_path, executor, silent)
    paths = [Path(one.found.path).parent for one in whole.trials if one.found]
    assert strip(tried(found), str(tmp_path)) == strip(tried(whole)[:4], str(paths[0]))


def test_run_searches_judges_the_finalists_and_packs_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {
        "name": "clothes",
        "source": str(MODEL),
        "data": {"path": str(data)},
        "budgets": {"drop_max": 0.3, "speedup_min": 0},
        "search": {"trials_max": 2, "keep": 1, "rounds": 3},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(told))
    out = tmp_path / "out.bundle"
    words = ["run", str(tmp_path / "recipe.yaml"), "-o", str(out), "--json"]
    assert cli.main([*words, "--dry-run"]) == 0
    capsys.readouterr()
    assert cli.main(words) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in outcome["evaluated"]][1:] in (
        ["s01-int8-minmax"],
        ["s02-int8-minmax-per-tensor"],
    )
    with archive.open_bundle(out) as bundle:
        assert len(bundle.manifest.variants) == 2


class Shaken(InlineExecutor):
    """Whose second job meets a full disk."""

    def submit(self, job: executors.Job) -> None:
        super().submit(job)
        if len(self.jobs) == 2:
            self._said[-1] = (job.key, Said(refusal="no space left", passing=True))


def test_what_may_have_passed_is_tried_again_by_the_next_command(
    data: Path, tmp_path: Path
) -> None:
    given = recipe(data, trials_max=3)
    with Shaken() as executor:
        first = search.search(given, tmp_path, executor, silent)
    assert [one.refusal for one in first.trials] == ["", "no space left", ""]
    with InlineExecutor() as executor:
        second = search.search(given, tmp_path, executor, silent)
    assert [job.key for job in executor.jobs] == [first.trials[1].key]
    assert all(one.found for one in second.trials)
    with InlineExecutor() as executor:
        search.search(given, tmp_path, executor, silent)
    assert executor.jobs == []


def test_a_finalist_that_is_called_like_a_variant_of_the_recipe_gets_another_name(
    data: Path, tmp_path: Path
) -> None:
    """A recipe may hold finalists of an earlier search, with that search's numbers."""
    given = recipe(data, trials_max=1)
    mine = Variant("s01-int8-minmax", passes=({"use": "float16"},))
    given = msgspec.structs.replace(given, budgets=Budgets(1.0, speedup_min=0), variants=(mine,))
    with InlineExecutor() as executor:
        found = search.search(given, tmp_path, executor, silent)
    assert [one.name for one in found.recipe.variants] == ["s01-int8-minmax", "s01-int8-minmax-2"]


def test_times_of_another_processor_are_not_taken(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(data, trials_max=1)
    for name in ("this", "another", "another"):
        monkeypatch.setattr(causes, "processor_name", lambda name=name: name)
        with InlineExecutor() as executor:
            search.search(given, tmp_path, executor, silent)
        tried = len(executor.jobs)
    assert tried == 0 and len((tmp_path / search.JOURNAL).read_bytes().splitlines()) == 2


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed (make test-quantize)"
)
def test_a_training_function_that_is_none_is_told_before_the_first_trial(
    data: Path, tmp_path: Path
) -> None:
    given = recipe(data, ratios=[0.5], train="nowhere:train")
    with pytest.raises(UsageError, match="nowhere") as caught, InlineExecutor() as executor:
        search.search(given, tmp_path, executor, silent)
    assert caught.value.where == "search.train" and executor.jobs == []


def test_training_without_pruning_is_refused_for_it_would_do_nothing() -> None:
    told = {"name": "x", "source": "x.onnx", "data": {"path": "x.npz"}, "search": {"train": "a:b"}}
    with pytest.raises(UsageError, match="nothing is pruned"):
        recipes.parse(told, "recipe.yaml")


# --- moves ----------------------------------------------------------------------------------------


def trial(number: int, variant: Variant, loss: float, time: float = 0.5) -> Trial:
    named = msgspec.structs.replace(variant, name=f"t{number}")
    found = Found("", loss, 0.0, 1000 - number, 100)
    return Trial(str(number), number, named, "", found, 1.0, time)


def shots() -> list[moves.Idea]:
    return moves.single_shots(FACTS, ["onnxruntime", "openvino"], lambda _: True)


def history(time: float) -> list[Trial]:
    return [
        trial(number, idea.variant, 0.001 * (number % 3), time * number)
        for number, idea in enumerate(shots(), 1)
    ]


def test_what_is_tried_next_does_not_depend_on_a_time_that_was_measured() -> None:
    limits = Search(ratios=(0.25,))
    for stage in moves.STAGES:
        assert stage(FACTS, history(1.0), limits) == stage(FACTS, history(0.01), limits)
        # Weights of 4 bits are for .tflite models: tests/quantize/test_tflite.py.
        assert stage is moves.in_four_bits or stage(FACTS, history(1.0), limits)
    assert moves.neighbours(FACTS, history(1.0), limits, 5) == moves.neighbours(
        FACTS, history(0.01), limits, 5
    )


def test_the_most_sensitive_are_left_out_first() -> None:
    ideas = moves.by_sensitivity(FACTS, history(1.0), Search())
    left = {tuple(idea.variant.passes[-1]["exclude"]) for idea in ideas}
    assert left == {("d",), ("a", "d"), ("b", "d"), ("a", "b", "d")}  # "a" is slow in integers


def test_neighbours_follow_the_seed() -> None:
    first = moves.neighbours(FACTS, history(1.0), Search(), 5)
    assert first == moves.neighbours(FACTS, history(1.0), Search(), 5)
    assert first != moves.neighbours(FACTS, history(1.0), Search(), 6)


def test_settings_of_libraries_that_are_missing_are_not_tried() -> None:
    every = {idea.why for idea in shots()}
    here = {
        idea.why for idea in moves.single_shots(FACTS, ["onnxruntime"], lambda name: name != "nncf")
    }
    assert any("NNCF" in why for why in every) and not any("NNCF" in why for why in here)


def test_16_bit_activations_are_not_tried_on_openvino_which_answers_wrongly() -> None:
    on = [idea.variant for idea in shots() if idea.variant.backend == "openvino"]
    assert not any("activations" in step for variant in on for step in variant.passes)


def test_nothing_that_was_pruned_is_pruned_twice() -> None:
    variant = next(iter(shots())).variant
    ideas = moves.pruned(FACTS, [trial(1, variant, 0.0)], Search(ratios=(0.25, 0.5)))
    for idea in ideas:
        uses = [step["use"] for step in idea.variant.passes]
        assert uses == ["clean", "prune_channels", "static_int8"]
    with_training = moves.pruned(
        FACTS, [trial(1, variant, 0.0)], Search(ratios=(0.25,), train="a:b")
    )
    assert [step["use"] for step in with_training[0].variant.passes][2] == "fine_tune"


def test_random_steps_prune_one_layer_otherwise_and_train_it_again() -> None:
    cut = {"use": "prune_channels", "ratio": 0.5}
    step = {"use": "fine_tune", "train": "a:b"}
    variant = Variant("", "onnxruntime", passes=(cut, step, {"use": "static_int8"}))
    facts, limits = FACTS._replace(channels=("c", "d")), Search(ratios=(0.5,), train="a:b")
    ideas = [
        idea.variant.passes
        for seed in range(40)
        for idea in moves.neighbours(facts, [trial(1, variant, 0.0)], limits, seed)
    ]
    every = [step for passes in ideas for step in passes if step["use"] == "prune_channels"]
    assert {one["ratio"] for one in every} == {0.4375, 0.5, 0.5625}
    uneven = [tuple(one["ratios"].items()) for one in every if "ratios" in one]
    assert set(uneven) == {(("c", 0.375),), (("c", 0.625),), (("d", 0.375),), (("d", 0.625),)}
    for passes in ideas:
        if any("ratios" in step for step in passes):
            assert [step["use"] for step in passes][:3] == ["clean", "prune_channels", "fine_tune"]


# --- the journal ----------------------------------------------------------------------------------


def test_a_journal_keeps_what_was_whole_at_whatever_byte_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    journal = Journal(path)
    some = [trial(number, Variant("x"), 0.1) for number in (1, 2)]
    for one in some:
        journal.add(one)
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for cut in (*range(0, len(data), 9), first - 1, first, len(data) - 1):
        path.write_bytes(data[:cut])
        again = Journal(path)
        assert (again.get("1") is not None) == (cut >= first)
        assert again.get("2") is None
        again.add(some[1])
        assert Journal(path).get("2") == some[1]


def test_a_line_that_is_no_trial_hides_none_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    some = [trial(number, Variant("x"), 0.1) for number in (1, 2)]
    Journal(path).add(some[0])
    with path.open("ab") as file:
        file.write(b'{"key": "cut o\n{"of": "another version"}\n\x00\x00\n')
    Journal(path).add(some[1])
    assert [Journal(path).get(key) for key in "12"] == some


def test_the_first_convolution_of_the_example_is_slow_in_integers() -> None:
    assert kernels.slow(MODEL) == kernels.Slow(("/0/Conv",), (), ("/18/Gemm",))
