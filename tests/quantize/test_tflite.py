"""Models in .tflite: parts of them quantized, looked into, searched.

What needs ai-edge-quantizer is run by `make test-quantize`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_runtime.backends import backend
from edge_runtime.errors import EdgeError, ModelError, UsageError
from quantize import (
    building,
    causes,
    checks,
    cli,
    litert_door,
    models,
    moves,
    observing,
    ranges,
    scratch,
    search,
    sensitivity,
    tflite_ops,
)
from quantize.datasets import Dataset, Split
from quantize.kernels import Slow
from quantize.moves import Facts
from quantize.passes import Bench
from quantize.passes.tflite import TfliteFloat16, TfliteInt8, TfliteWeights
from quantize.recipe import Calibration, Data, Recipe, Search, Variant
from quantize.sensitivity import Question
from quantize.tflite_ops import Graph, Operator, Tensor
from quantize.trials import Found, Trial
from tests import tflite_writer as writer
from tests.quantize.inline import InlineExecutor

Array = np.ndarray[Any, Any]

EXAMPLE = Path("examples/fashion_mnist").resolve()
MODEL = EXAMPLE / "fp32.tflite"
LAST, WIDE = "serving_default_logits_output", "*Linear_11;*"

needs_quantizer = pytest.mark.skipif(
    importlib.util.find_spec("ai_edge_quantizer") is None,
    reason="ai_edge_quantizer is not installed (make test-quantize)",
)


def blobs(count: int, seed: int) -> Array:
    """Blobs of light [count, 1, 28, 28]."""
    noise = np.random.Generator(np.random.PCG64(seed)).random((count, 1, 7, 7), dtype=np.float32)
    return noise.repeat(4, axis=2).repeat(4, axis=3)


def bench(path: Path, samples: dict[str, Array]) -> Bench:
    source = models.read(path)
    return Bench(samples, source.inputs, source.outputs, source.batch_axis, 0, lambda _: None)


@pytest.fixture(scope="module")
def clothes() -> Bench:
    return bench(MODEL, {"input": blobs(64, 1)})


def answers(path: Path, samples: Array) -> Array:
    run = backend("litert").load(path, {}).run
    return np.concatenate([run({"input": one[None]})["logits"] for one in samples])


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four products, and in the third a channel that is thousands of times louder than what counts.

    That channel is not used afterwards; its range swallows all the others' integers.
    """
    folder = tmp_path_factory.mktemp("fragile")
    rng = np.random.Generator(np.random.PCG64(4))
    shapes = [(16, 32), (32, 32), (32, 32), (32, 8)]
    weights = [rng.normal(size=shape).astype(np.float32) / 4 for shape in shapes]
    weights[2][:, 0] *= 3000
    weights[3][0, :] = 0
    tensors, operators = [writer.Tensor("x", [-1, 16])], []
    for number, array in enumerate(weights):
        tensors += [
            writer.Tensor(f"w{number}", array.T.shape, data=array.T.astype("<f4").tobytes()),
            writer.Tensor(f"h{number}", [-1, array.shape[1]]),
        ]
        operators.append(
            writer.Operator(
                writer.FULLY_CONNECTED,
                [2 * number, 2 * number + 1, -1],
                [2 * number + 2],
                writer.FULLY_CONNECTED_OPTIONS,
            )
        )
    graph = writer.Graph(tensors, operators, [0], [len(tensors) - 1])
    (folder / "fragile.tflite").write_bytes(writer.model(graph))
    x = rng.normal(size=(600, 16)).astype(np.float32)
    y = (x @ weights[0] @ weights[1] @ weights[2] @ weights[3]).argmax(axis=1)
    np.savez(folder / "data.npz", x=x, y=y)
    return folder / "fragile.tflite", folder / "data.npz"


# --- the graph, without any quantizer -------------------------------------------------------------


def test_operators_are_named_by_what_they_make_and_their_multiplications_are_counted() -> None:
    graph = litert_door.graph(MODEL)
    kinds = [one.kind for one in graph.operators]
    assert kinds[:3] == ["RESHAPE", "DEPTHWISE_CONV_2D", "CONV_2D"] and len(kinds) == 11
    assert graph.operators[-1].name == LAST
    # 1, 32, 32, 64, 64 channels of 3 x 3 on 28 x 28 and 14 x 14; 3136 x 64 and 64 x 10.
    wanted = 784 * 9 * (32 + 32 * 32) + 196 * 9 * (32 * 64 + 64 * 64) + 3136 * 64 + 64 * 10
    assert sum(map(tflite_ops.macs, graph.operators)) == wanted
    assert sum(tflite_ops.shares(graph).values()) == pytest.approx(1)
    assert tflite_ops.work(graph, 4) == 4 * wanted
    assert tflite_ops.work(litert_door.graph(EXAMPLE / "static.tflite"), 4) == wanted
    assert tflite_ops.work(litert_door.graph(EXAMPLE / "dynamic.tflite"), 4) == wanted
    slow = tflite_ops.slow(graph)
    assert len(slow.thin) == 1 and "Conv2d_0" in slow.thin[0]
    assert slow.depthwise == () and slow.last == (LAST,)


def test_inner_tensors_hold_what_the_backend_answers(clothes: Bench) -> None:
    feeds = {"input": clothes.calibration["input"][:5]}
    seen = list(litert_door.activations(MODEL, feeds, clothes))
    assert len(seen) == 5 and all(len(one) == 12 for one in seen)
    assert np.allclose(seen[3][LAST], answers(MODEL, feeds["input"][3:4]), atol=1e-4)
    assert (seen[0]["serving_default_input"] == feeds["input"][0]).all()
    by_served_name = next(litert_door.activations(MODEL, feeds, clothes, {"logits"}))
    assert (by_served_name["logits"] == seen[0][LAST]).all()


def test_a_free_batch_axis_is_run_in_batches(fragile: tuple[Path, Path]) -> None:
    x = np.load(fragile[1])["x"][:70]
    told = bench(fragile[0], {"x": x})
    assert told.batch_axis == 0
    runs = list(litert_door.activations(fragile[0], {"x": x}, told))
    assert [len(one["h3"]) for one in runs] == [32, 32, 6]
    alone = list(litert_door.activations(fragile[0], {"x": x}, told, {"h3"}, 1))
    assert len(alone) == 70 and set(alone[0]) == {"h3"}
    whole = np.concatenate([one["h3"] for one in runs])
    assert np.allclose(whole, np.concatenate([one["h3"] for one in alone]), rtol=1e-3)


def test_ranges_of_an_int8_file_are_those_its_integers_can_say(clothes: Bench) -> None:
    graph = litert_door.graph(EXAMPLE / "static.tflite")
    found = tflite_ops.ranges(graph)
    assert found["serving_default_input"] == pytest.approx((0, 1), abs=0.01)
    low, high = found[LAST]
    seen = litert_door.activations(
        EXAMPLE / "static.tflite", {"input": clothes.calibration["input"][:9]}, clothes, {LAST}
    )
    logits = np.concatenate([one[LAST] for one in seen])
    assert low <= logits.min() < 0 < logits.max() <= high + 1e-6
    assert tflite_ops.ranges(litert_door.graph(MODEL)) == {}
    assert LAST in tflite_ops.quantized(graph)
    assert tflite_ops.quantized(litert_door.graph(MODEL)) == frozenset()


def operator(kind: str, reads: list[int], makes: list[int]) -> Operator:
    def tensors(numbers: list[int]) -> tuple[Tensor, ...]:
        return tuple(Tensor(one, f"t{one}", (1,), "float32") for one in numbers)

    return Operator(kind, tensors(reads), tensors(makes))


def test_what_only_moves_values_between_floats_stays_float() -> None:
    """input -> RESHAPE -> TRANSPOSE -> CONV -> MAX_POOL -> CONV -> RESHAPE -> output."""
    kinds = ["RESHAPE", "TRANSPOSE", "CONV_2D", "MAX_POOL_2D", "CONV_2D", "RESHAPE"]
    graph = Graph(
        tuple(operator(kind, [n], [n + 1]) for n, kind in enumerate(kinds)),
        (Tensor(0, "t0", (1,), "float32"),),
        (Tensor(6, "t6", (1,), "float32"),),
    )

    def kept(*floats: str) -> list[str]:
        return [one.name for one in tflite_ops.between_floats(graph, floats)]

    assert kept() == []
    assert kept("t3") == ["t1", "t2"]
    assert kept("t5") == ["t6"]
    assert kept("t3", "t5") == ["t1", "t2", "t4", "t6"]


def test_a_star_in_a_name_stands_for_any_text_and_nothing_else_is_special() -> None:
    graph = Graph((operator("CONV_2D", [0], [1]), operator("CONV_2D", [1], [11])), (), ())
    assert [one.name for one in tflite_ops.named(graph, ["t1*"], "exclude")] == ["t1", "t11"]
    assert [one.name for one in tflite_ops.named(graph, ["t1"], "exclude")] == ["t1"]
    with pytest.raises(UsageError, match=r"no operator 't\.\*'"):
        tflite_ops.named(graph, ["t.*"], "exclude")


@pytest.mark.parametrize("option", ["exclude", "four_bits", "sixteen_bits"])
def test_an_unknown_operator_is_an_error_with_the_nearest_name(option: str) -> None:
    graph = litert_door.graph(MODEL)
    with pytest.raises(UsageError) as caught:
        tflite_ops.named(graph, [LAST.replace("logits", "logit")], option)
    assert LAST in caught.value.remedy and caught.value.where == option


def test_only_what_can_have_weights_of_four_bits_may_be_asked_for_them() -> None:
    with pytest.raises(UsageError, match="DEPTHWISE_CONV_2D"):
        tflite_ops.four_bits(litert_door.graph(MODEL), ["*Conv2d_0;1"], "four_bits")


# --- ranges ---------------------------------------------------------------------------------------


def test_a_percentile_cuts_both_ends_and_keeps_zero() -> None:
    values = np.concatenate([np.linspace(-1, 1, 10_000), [-50.0, 80.0]]).astype(np.float32)
    found = ranges.histograms(lambda: [{"t": values}, {"t": np.abs(values)}])
    low, high = ranges.percentile(found, 99.0)["t"]
    assert -1.2 < low < -0.9 and 0.9 < high < 1.2
    assert ranges.percentile(found, 100)["t"] == pytest.approx((-50, 80))
    assert ranges.percentile(ranges.histograms(lambda: [{"t": values + 60}]), 99)["t"][0] == 0


def test_a_moving_average_forgets_and_extremes_do_not() -> None:
    runs = [{"t": np.array([-1.0, 1.0])}, {"t": np.array([-1.0, 101.0])}] + [
        {"t": np.array([-1.0, 1.0])}
    ] * 100
    assert ranges.averaged(runs)["t"] == pytest.approx((-1, 1), abs=0.05)
    assert ranges.extremes(runs)["t"] == (-1, 101)


# --- passes ---------------------------------------------------------------------------------------


def made(how: Any, told: Bench, out: Path, source: Path = MODEL) -> Graph:
    how.apply(source, out, told)
    return litert_door.graph(out)


@needs_quantizer
def test_excluded_operators_stay_float_and_what_moves_values_between_them(
    clothes: Bench, tmp_path: Path
) -> None:
    graph = made(TfliteInt8(exclude=("*Conv2d_0;1",)), clothes, tmp_path / "m.tflite")
    kinds = [one.kind for one in graph.operators]
    assert kinds[:4] == ["RESHAPE", "DEPTHWISE_CONV_2D", "QUANTIZE", "CONV_2D"]
    first, third = graph.operators[1], graph.operators[3]
    assert first.weights is not None and first.weights.datatype == "float32"
    assert third.weights is not None and third.weights.datatype == "int8"
    want = answers(MODEL, clothes.calibration["input"])
    got = answers(tmp_path / "m.tflite", clothes.calibration["input"])
    assert (want.argmax(axis=1) == got.argmax(axis=1)).mean() > 0.9


@needs_quantizer
def test_weights_of_four_bits_make_the_file_smaller_and_the_answers_stay(
    clothes: Bench, tmp_path: Path
) -> None:
    for how in (TfliteInt8, TfliteWeights):
        whole, part = tmp_path / "8.tflite", tmp_path / "4.tflite"
        made(how(), clothes, whole)
        made(how(four_bits=(WIDE,)), clothes, part)
        # 3136 x 64 weights in half a byte instead of one.
        assert whole.stat().st_size - part.stat().st_size == pytest.approx(3136 * 32, rel=0.05)
        want, got = (answers(one, clothes.calibration["input"]) for one in (MODEL, part))
        assert (want.argmax(axis=1) == got.argmax(axis=1)).mean() > 0.9


@needs_quantizer
def test_one_operator_can_have_activations_of_sixteen_bits(clothes: Bench, tmp_path: Path) -> None:
    graph = made(TfliteInt8(sixteen_bits=(LAST,)), clothes, tmp_path / "m.tflite")
    last = [one for one in graph.operators if one.kind == "FULLY_CONNECTED"][-1]
    assert [one.datatype for one in (last.inputs[0], last.outputs[0])] == ["int16", "int16"]
    (said,) = causes._of_tflite(graph)
    assert said.startswith("slower: 1 operators") and LAST in said
    assert tflite_ops.work(graph, 4) > tflite_ops.work(
        made(TfliteInt8(), clothes, tmp_path / "8.tflite"), 4
    )


@needs_quantizer
def test_float16_halves_the_file_and_keeps_the_answers(clothes: Bench, tmp_path: Path) -> None:
    out = tmp_path / "half.tflite"
    made(TfliteFloat16(), clothes, out)
    assert out.stat().st_size < 0.52 * MODEL.stat().st_size
    assert models.read(out).precision == "fp16"
    samples = clothes.calibration["input"][:10]
    assert np.allclose(answers(out, samples), answers(MODEL, samples), atol=0.05)


@needs_quantizer
@pytest.mark.parametrize("method", ["average", "minmax", "percentile", "mse"])
def test_each_method_gives_ranges_within_what_was_seen(
    method: str, clothes: Bench, tmp_path: Path
) -> None:
    how = msgspec.convert({"method": method, "percentile": 99.0}, TfliteInt8)
    told = clothes._replace(cache=tmp_path)
    low, high = tflite_ops.ranges(made(how, told, tmp_path / "m.tflite"))[LAST]
    seen = ranges.extremes(litert_door.activations(MODEL, clothes.calibration, clothes, {LAST}, 1))[
        LAST
    ]
    step = (high - low) / 255
    if method == "minmax":
        assert (low, high) == pytest.approx(seen, abs=step)
    else:
        assert seen[0] - step < low < 0 < high < seen[1] + step
    if method in ("average", "percentile"):
        assert high - low < 0.999 * (seen[1] - seen[0])


@needs_quantizer
def test_ranges_are_found_once_for_all_settings_with_the_same_calibration(
    clothes: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = clothes._replace(cache=tmp_path)
    made(TfliteInt8(), told, tmp_path / "first.tflite")
    first = (tmp_path / "first.tflite").read_bytes()
    runs: list[Path] = []
    real = litert_door.activations

    def counted(source: Path, *rest: Any, **more: Any) -> Any:
        runs.append(source)
        return real(source, *rest, **more)

    monkeypatch.setattr(litert_door, "activations", counted)
    made(TfliteInt8(four_bits=(WIDE,), exclude=(LAST,)), told, tmp_path / "second.tflite")
    assert runs == []
    made(TfliteInt8(), told, tmp_path / "third.tflite")
    assert (tmp_path / "third.tflite").read_bytes() == first
    made(TfliteInt8(samples=8), told, tmp_path / "other.tflite")
    assert runs == [MODEL]


@needs_quantizer
@pytest.mark.parametrize("how", [TfliteInt8(exclude=("*",)), TfliteWeights(exclude=("*",))])
def test_nothing_left_to_quantize_is_said(how: Any, clothes: Bench, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing was quantized.*excluded"):
        made(how, clothes, tmp_path / "m.tflite")


@needs_quantizer
def test_a_model_with_subgraphs_is_refused_where_it_would_have_to_be_calibrated(
    tmp_path: Path,
) -> None:
    path = tmp_path / "counter.tflite"
    path.write_bytes(writer.counter())
    told = bench(path, {"x": np.ones((3, 1), np.float32)})
    with pytest.raises(UsageError, match="2 subgraphs") as caught:
        TfliteInt8().apply(path, tmp_path / "m.tflite", told)
    assert "tflite_weights" in caught.value.remedy


@needs_quantizer
def test_inputs_of_integers_and_a_file_without_signature_work(tmp_path: Path) -> None:
    """ids INT32 [N] -> rows of a table -> a product; named by its tensors."""
    rng = np.random.Generator(np.random.PCG64(7))
    table, weights = rng.normal(size=(50, 16)), rng.normal(size=(8, 16))
    graph = writer.Graph(
        [
            writer.Tensor("ids", [-1], writer.INT32),
            writer.Tensor("table", [50, 16], data=table.astype("<f4").tobytes()),
            writer.Tensor("rows", [-1, 16]),
            writer.Tensor("weights", [8, 16], data=weights.astype("<f4").tobytes()),
            writer.Tensor("scores", [-1, 8]),
        ],
        [
            writer.Operator(36, [1, 0], [2], 23),  # GATHER, GatherOptions
            writer.Operator(
                writer.FULLY_CONNECTED, [2, 3, -1], [4], writer.FULLY_CONNECTED_OPTIONS
            ),
        ],
        [0],
        [4],
    )
    path, out = tmp_path / "ids.tflite", tmp_path / "m.tflite"
    path.write_bytes(writer.model(graph))
    ids = np.arange(50, dtype=np.int32)
    quantized = made(TfliteInt8(), bench(path, {"ids": ids}), out, path)
    assert "scores" in tflite_ops.quantized(quantized)
    want, got = (backend("litert").load(one, {}).run({"ids": ids})["scores"] for one in (path, out))
    assert float(np.abs(want - got).max()) < 0.1 * float(np.abs(want).max())


# --- what tensors hold ----------------------------------------------------------------------------


def look(mine: Array, other: Array, folder: Path, **options: Any) -> observing.Observed:
    """What a run with one int8 variant would say of its data."""
    source = models.read(MODEL)
    variant = Variant("int8", "litert", passes=({"use": "tflite_int8", **options},))
    (chain,) = building.chains([variant], source)
    calibration, evaluation = (
        Dataset({"input": mine}, None, "a"),
        Dataset({"input": other}, None, "b"),
    )
    kept = scratch.Scratch(folder)
    built = building.build(chain, source, calibration, 0, kept, lambda _: None)
    assert built.refusal == ""
    split = Split(calibration, evaluation)
    given = {"logits": answers(MODEL, other)}
    return observing.observe(source, split, [built], given, "logits", lambda _: None)


@needs_quantizer
def test_clipped_ranges_of_a_tflite_file_are_named_and_clean_ones_are_not(tmp_path: Path) -> None:
    mine, other = blobs(64, 1), blobs(64, 2)
    clean = look(mine, other, tmp_path, method="minmax")
    assert [one.fault for one in clean.findings] == []
    seen = {one.name: one for one in clean.activations}
    logits = seen[LAST]
    assert len(seen) > 8 and sum(logits.calibration) == 64 * 10
    assert logits.clippings["int8"].calibration == 0
    clipped = look(mine, other, tmp_path, method="percentile", percentile=90)
    assert [one.fault for one in clipped.findings] == [checks.CLIPPED]
    cut = {one.name: one.clippings["int8"].calibration for one in clipped.activations}
    assert 0.02 < cut[LAST] < 0.2


@needs_quantizer
def test_a_calibration_set_that_shows_too_little_is_named(tmp_path: Path) -> None:
    mine, other = blobs(64, 1) * np.float32(0.4), blobs(100, 2)
    found = look(mine, other, tmp_path, method="minmax")
    assert checks.TRUNCATED in [one.fault for one in found.findings]


# --- sensitivity and search -----------------------------------------------------------------------


@needs_quantizer
def test_the_layer_that_breaks_a_tflite_model_is_found_and_left_out(
    fragile: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sensitivity", str(fragile[0]), "--data", str(fragile[1]), "--drop-max", "0.1"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss_all"] > 0.2
    assert {one["name"] for one in found["layers"]} == {"h0", "h1", "h2", "h3"}
    assert {one["name"] for one in found["layers"][:2]} <= {"h2", "h3"}
    assert 1 <= len(found["exclude"]) < 4 and "h2" in found["exclude"]
    assert found["loss_excluded"] <= 0.1
    assert cli.main(words) == 0
    assert "exclude: [h" in capsys.readouterr().out


@needs_quantizer
def test_every_layer_of_the_tflite_example_is_judged(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=blobs(90, 3))
    found = sensitivity.of_model(
        Question(MODEL, str(tmp_path / "x.npz"), samples=40), lambda _: None
    )
    assert [one.operator for one in found.layers].count("CONV_2D") == 3
    assert len(found.layers) == 6
    assert sum(one.macs_share for one in found.layers) == pytest.approx(1, abs=0.01)
    for one in found.layers:
        assert 5 < one.sqnr_db < 60 and 5 < one.own_sqnr_db <= one.alone_sqnr_db + 1


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_quantizer", None)
    np.savez(tmp_path / "x.npz", x=blobs(60, 3))
    assert cli.main(["sensitivity", str(MODEL), "--data", str(tmp_path / "x.npz")]) == 2
    assert "edge-runtime[quantize-litert]" in capsys.readouterr().err


FACTS = Facts(
    "tflite",
    frozenset({"CONV_2D", "FULLY_CONNECTED"}),
    Slow(("a",), (), ("d",)),
    tuple("dbca"),
    tuple("abcd"),
    tuple("cd"),
)


def finished(number: int, loss: float, **options: Any) -> Trial:
    variant = Variant(f"s{number:02d}", "litert", passes=({"use": "tflite_int8", **options},))
    return Trial(f"k{number}", number, variant, "", Found("", loss, 0.0, 1000 - number, 10))


@pytest.mark.parametrize("stage", [moves.for_speed, moves.by_sensitivity, moves.in_four_bits])
def test_stages_build_upon_the_best_tflite_settings(
    stage: Callable[[Facts, list[Trial], Search], list[moves.Idea]],
) -> None:
    found = [finished(1, 0.01), finished(2, 0.0, method="minmax"), finished(3, 0.0, activations=16)]
    ideas = stage(FACTS, found, Search())
    assert ideas and len({str(one.variant.passes) for one in ideas}) == len(ideas)
    lists = [one.variant.passes[-1] for one in ideas]
    assert all(one.get("exclude") or one.get("four_bits") for one in lists)
    assert all("activations" not in one for one in lists)
    if stage is moves.in_four_bits:
        assert {tuple(one["four_bits"]) for one in lists} == {tuple("abcd"), ("c", "d"), ("c",)}


def test_neighbours_of_a_tflite_setting_change_ranges_sides_and_bits() -> None:
    found = [finished(1, 0.01, method="minmax", four_bits=["c"])]
    ideas = [one for seed in range(40) for one in moves.neighbours(FACTS, found, Search(), seed)]
    whys = {one.why.split(": ", 1)[1] for one in ideas}
    assert "other ranges" in whys
    assert {"c changes bits", "d changes sides", "a changes bits"} <= whys
    assert all(one.variant.passes[-1].get("method") != "entropy" for one in ideas)


@needs_quantizer
def test_the_search_mixes_and_is_smaller_than_every_single_setting_of_eight_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shots = [one for one in moves.SHOTS["tflite", "litert"] if one.step.get("activations") != 16]
    monkeypatch.setitem(moves.SHOTS, ("tflite", "litert"), (shots[1], shots[4]))
    x = blobs(130, 1)
    np.savez(tmp_path / "x.npz", x=x, y=answers(MODEL, x).argmax(axis=1))
    told = {"backends": ("litert",), "rounds": 3, "time_s_max": 1000.0, "trials_max": 11}
    recipe = Recipe(
        "clothes",
        str(MODEL),
        Data(str(tmp_path / "x.npz")),
        calibration=Calibration(samples=32),
        variants=(Variant("fp32", "litert"),),
        search=msgspec.convert(told, Search),
    )
    with InlineExecutor() as executor:
        found = search.search(recipe, tmp_path / "work", executor, lambda _: None)
    assert len(found.layers) == 6
    mixed = [one for one in found.trials if "exclude" in one.variant.passes[-1]]
    small = [one for one in found.trials if "four_bits" in one.variant.passes[-1]]
    assert mixed and small
    plain = [
        one
        for one in found.trials
        if one.found and set(one.variant.passes[-1]) <= {"use", "method", "compute"}
    ]
    assert all(one.found and one.found.work > 0 for one in plain)
    best = min(one.found.size_bytes for one in small if one.found)
    assert best < 0.7 * min(one.found.size_bytes for one in plain if one.found)


def test_a_broken_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "m.tflite").write_bytes(b"\0\0\0\0TFL3 nothing")
    with pytest.raises(EdgeError, match=r"m\.tflite|LiteRT failed"):
        litert_door.graph(tmp_path / "m.tflite")
