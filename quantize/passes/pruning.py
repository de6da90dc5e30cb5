"""Pruning: fewer channels, or more zeros.

Law of this file: options with their reasons; the work is in `quantize.pruning`. A pruned model
answers worse until it is trained again (the pass `fine_tune`; examples/fashion_mnist/retrain.py
shows how), and a recipe that only prunes is judged like any other.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
import numpy as np

from edge_runtime.errors import UsageError
from edge_runtime.errors import did_you_mean as nearest
from quantize import onnx_door, onnxruntime_door
from quantize.passes import FLOAT, ONNX, PRUNED, Bench
from quantize.pruning import channels, choosing, cutting, groups, work
from quantize.pruning.seen import Seen, Sums

Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
# Calibration samples that say how strong a channel is: a mean over so many images is settled.
SAMPLES_MAX = 256


class Judged(NamedTuple):
    """A model, its groups, and what each of their channels is worth."""

    model: Any
    found: groups.Channels
    weights: dict[str, Any]
    seen: dict[str, Seen]
    scores: dict[int, Any]


class PruneChannels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whole channels go, with every weight that hangs on them: smaller and really faster.

    Attributes:
        ratio: share of the channels of each group that goes (with `across`: of all channels).
        ratios: other shares by the name of the node that makes the channels.
        across: rank the channels of all layers together: thin layers may lose little.
        keep_min: of each group, the share that stays in any case.
        multiple: channels kept are a multiple of this: SIMD kernels compute the rest anyway.
        importance: what decides who goes: the weights that make a channel (weights), or what it
            adds to the next layer on calibration samples (activations).
        norm: of the weights that make a channel, for importance: weights.
        compensate: with importance: activations, the channels that stay take on what they foretell
            of those that go, and the next layer's bias the rest. Then it counts what no other
            channel says, not how large a channel is.
        rounds: with importance: activations, cut a part at a time and look anew at what is left: a
            deep cut changes what the layers behind it see.
        exclude: nodes whose channels stay.
    """

    ratio: Share = 0.5
    ratios: dict[str, Share] = {}
    across: bool = False
    keep_min: Share = 0.1
    multiple: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    importance: Literal["weights", "activations"] = "weights"
    norm: Literal["l1", "l2"] = "l2"
    compensate: bool = True
    rounds: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    exclude: tuple[str, ...] = ()

    requires: ClassVar[frozenset[str]] = frozenset({ONNX, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({PRUNED})
    removes: ClassVar[frozenset[str]] = frozenset()

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply. Constants are folded first: exports compute shapes and pads."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "folded.onnx"
            onnxruntime_door.optimize(source, path)
            first = judged = self._judged(path, bench)
            wanted = self._wanted(first)
            rounds = self.rounds if self.importance == "activations" else 1
            for number in range(1, rounds + 1):
                if number > 1:
                    judged = self._judged(path, bench)
                counts = {
                    group: choosing.partway(
                        first.found.sizes[group], count, number / rounds, self.multiple
                    )
                    for group, count in wanted.items()
                }
                kept = choosing.best(judged.scores, counts)
                path = Path(folder) / f"round{number}.onnx"
                self._cut(judged, kept, path)
            before = work.macs(Path(folder) / "folded.onnx")
            shutil.copyfile(path, out)
        gone = sum(first.found.sizes[group] - count for group, count in wanted.items())
        bench.say(
            f"{gone} channels of {len(wanted)} groups went:"
            f" {before / 1e6:.2f} -> {work.macs(out) / 1e6:.2f} million multiplications"
        )

    def _judged(self, path: Path, bench: Bench) -> Judged:
        model = onnx_door.load(path)
        found, weights = understand(model)
        _check_names((*self.exclude, *self.ratios), model)
        seen = self._seen(found, path, bench)
        scores = {
            group: values
            for group, values in self._scores(found, weights, seen).items()
            if not set(self.exclude) & set(found.nodes[group])
        }
        return Judged(model, found, weights, seen, scores)

    def _wanted(self, first: Judged) -> dict[int, int]:
        """How many channels of each group stay in the end. Raises: UsageError, if all do."""
        wanted = choosing.counts(
            first.found,
            first.scores,
            self.ratio,
            self.ratios,
            self.multiple,
            self.across,
            self.keep_min,
        )
        if not wanted:
            raise UsageError(
                "no channel can go: " + (_reasons(first.found) or "the ratio is too small"),
                where="prune_channels",
            )
        return wanted

    def _cut(self, judged: Judged, kept: dict[int, Any], out: Path) -> None:
        model, found, weights, seen, _ = judged
        cutting.cut(model, found, kept, weights, seen if self.compensate else None)
        onnx_door.save(onnx_door.infer_shapes(model), out)

    def _seen(self, found: groups.Channels, source: Path, bench: Bench) -> dict[str, Seen]:
        """What calibration says; nothing where only the weights count."""
        if self.importance == "weights":
            return {}
        feeds = {name: array[:SAMPLES_MAX] for name, array in bench.calibration.items()}
        if not feeds or not len(next(iter(feeds.values()))):
            raise UsageError(
                "importance: activations needs calibration samples", where="prune_channels"
            )
        return observed(found, source, bench._replace(calibration=feeds))

    def _scores(
        self, found: groups.Channels, weights: dict[str, Any], seen: dict[str, Seen]
    ) -> dict[int, Any]:
        if self.importance == "weights":
            return choosing.by_weights(found, weights, self.norm)
        by = choosing.by_foresight if self.compensate else choosing.by_activations
        return by(found, weights, seen)

    def versions(self) -> dict[str, str]:
        return onnxruntime_door.versions()


class PruneWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The smallest weights of each layer become 0. The runs are as fast as before, for no backend
    skips zeros; the file is smaller once it is compressed, which is how bundles travel.

    Attributes:
        ratio: share of each weight tensor that becomes 0. exclude: nodes that keep theirs.
    """

    ratio: Share = 0.5
    exclude: tuple[str, ...] = ()

    requires: ClassVar[frozenset[str]] = frozenset({ONNX, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({PRUNED})
    removes: ClassVar[frozenset[str]] = frozenset()

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        model = onnx_door.load(source)
        onnx_door.lift_constants(model)
        _check_names(self.exclude, model)
        weights = onnx_door.arrays(model)
        chosen = {
            name
            for node in model.graph.node
            if node.op_type in _WEIGHTED and node.name not in self.exclude
            for name in node.input[1:2]
            if name in weights
        }
        if not chosen:
            raise UsageError("no Conv, Gemm or MatMul has constant weights", where="prune_weights")
        make = onnx_door.library().numpy_helper.from_array
        for item in model.graph.initializer:
            if item.name in chosen:
                item.CopyFrom(make(thinned(weights[item.name], self.ratio), item.name))
        onnx_door.save(model, out)

    def versions(self) -> dict[str, str]:
        return {"onnx": onnx_door.version()}


_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def thinned(values: Any, ratio: float) -> Any:
    """The array with the smallest `ratio` of its values set to 0."""
    count = int(values.size * ratio)
    flat = values.reshape(-1).copy()
    flat[np.argsort(np.abs(flat), kind="stable")[:count]] = 0
    return flat.reshape(values.shape)


def understand(model: Any) -> tuple[groups.Channels, dict[str, Any]]:
    """The groups of a model, and its weights; its Constant nodes become initializers."""
    onnx_door.lift_constants(model)
    weights = onnx_door.arrays(model)
    shapes = work.value_shapes(onnx_door.infer_shapes(model).graph)
    return channels.analyse(model.graph, shapes, weights), weights


def makers(path: Path) -> tuple[str, ...]:
    """Of each group of channels that may go, a node that makes it: a name for `ratios`."""
    found, _ = understand(onnx_door.load(path))
    return tuple(found.nodes[group][0] for group in found.prunable)


def observed(found: groups.Channels, source: Path, bench: Bench) -> dict[str, Seen]:
    """What calibration samples make of each value that is read.

    Raises:
        ModelError: the library does not run the model.
    """
    sums = {one.value: Sums(one.axis, one.cut.block) for one in found.readers}
    for values in onnxruntime_door.activations(source, bench.calibration, bench, set(sums)):
        for name, value in values.items():
            sums[name].add(value)
    return {name: one.seen() for name, one in sums.items()}


def _check_names(names: tuple[str, ...], model: Any) -> None:
    known = [node.name or node.output[0] for node in model.graph.node]
    for name in names:
        if name not in known:
            raise UsageError(f"the model has no node {name!r}", remedy=nearest(name, known))


def _reasons(found: groups.Channels) -> str:
    return "; ".join(
        f"those of {', '.join(found.nodes[group][:2])}: {reason}"
        for group, reason in list(found.frozen.items())[:3]
    )
