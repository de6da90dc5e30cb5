"""The door to torch-pruning: channels of a module go, with everything that hangs on them.

Law of this file: the only one that imports torch_pruning. Layers that make the module's outputs
keep theirs; whatever else cannot go, the library's dependency graph says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import ModelError, UsageError, did_you_mean
from quantize import foreign, torch_door, torch_modules
from quantize.passes import Bench
from quantize.torch_modules import Module

if TYPE_CHECKING:
    from quantize.passes.torch import TorchPrune

Array = np.ndarray[Any, Any]


def version() -> str:
    _library()
    from importlib import metadata

    return metadata.version("torch-pruning")


def pruned(made: Module, given: Sequence[Array], how: TorchPrune, bench: Bench) -> Module:
    """The module with fewer channels, trained after each round where `how.train` says how.

    Args:
        given: samples [samples, ...] in the order of forward's arguments. made: it is changed.

    Raises:
        UsageError: the library or a function is missing, an unknown name, nothing can go.
        ModelError: the library or the training failed; names the remedy.
    """
    torch, shapes = torch_door.library(), _shapes(made, given)
    one = tuple(
        torch.from_numpy(np.ascontiguousarray(array)) for array in torch_modules.alone(given)
    )
    with foreign.ours("torch-pruning cannot follow the module", Path(made.source)):
        before = _counted(made.module, one)
        pruner = _pruner(made.module, one, how)
    for number in range(1, how.rounds + 1):
        with foreign.ours("torch-pruning failed", Path(made.source)):
            pruner.step()
        if how.train:
            bench.say(f"round {number} of {how.rounds}: training")
            made = made._replace(module=_trained(made.module, how, bench, number == how.rounds))
        made.module.eval()
    _check(made.module, shapes, _shapes(made, given))
    after = _counted(made.module, one)
    if after[1] >= before[1]:
        raise UsageError("no channel can go", where="torch_prune", remedy="a larger ratio")
    bench.say(
        f"{before[0] / 1e6:.2f} -> {after[0] / 1e6:.2f} million multiplications (torch-pruning's"
        f" count), {before[1]} -> {after[1]} parameters"
    )
    return made._replace(weights_sha256=torch_modules.weights_sha256(made.module))


def _counted(module: Any, one: tuple[Any, ...]) -> tuple[float, int]:
    """Multiplications of one sample (biases and pools among them), and parameters."""
    macs, parameters = _library().utils.count_ops_and_params(module, one)
    return macs, parameters


def _pruner(module: Any, one: tuple[Any, ...], how: TorchPrune) -> Any:
    library = _library()
    return library.pruner.BasePruner(
        module,
        one,
        importance=_importance(library, how.importance),
        global_pruning=how.across,
        pruning_ratio=how.ratio,
        max_pruning_ratio=1 - how.keep_min,
        iterative_steps=how.rounds,
        ignored_layers=[*_named(module, how.exclude), *_of_outputs(library, module, one)],
        round_to=how.multiple,
    )


def _trained(module: Any, how: TorchPrune, bench: Bench, last: bool) -> Any:
    """Raises: ModelError where another module came back that the next round could not cut."""
    back = torch_door.trained(module, how.train, bench.seed, bench.say, "torch_prune")
    if back is not module and not last:
        raise ModelError(
            f"{how.train} returned another module, and the next round cuts the first",
            where="torch_prune",
            remedy="train the module in place, or rounds: 1",
        )
    return back


def _check(module: Any, wanted: list[tuple[int, ...]], shapes: list[tuple[int, ...]]) -> None:
    if shapes != wanted:
        raise ModelError(
            f"its outputs became {shapes}, expected {wanted}",
            where="torch_prune",
            remedy="name the layers that make them in `exclude`",
        )
    torch = torch_door.library()
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"weight {name!r} is not finite after training",
                where="torch_prune",
                remedy="a smaller learning rate",
            )


def _shapes(made: Module, given: Sequence[Array]) -> list[tuple[int, ...]]:
    return [array.shape for _, array in torch_modules.outputs(made, torch_modules.alone(given))]


def _importance(library: Any, name: str) -> Any:
    kinds = {
        "l2": lambda: library.importance.GroupMagnitudeImportance(p=2),
        "l1": lambda: library.importance.GroupMagnitudeImportance(p=1),
        "lamp": lambda: library.importance.LAMPImportance(p=2),
    }
    return kinds[name]()


def _named(module: Any, names: Sequence[str]) -> list[Any]:
    """Raises: UsageError for a name that no part of the module has."""
    known = dict(module.named_modules())
    for name in names:
        if name not in known:
            raise UsageError(
                f"the module has no {name!r}", where="exclude", remedy=did_you_mean(name, known)
            )
    return [known[name] for name in names]


def _of_outputs(library: Any, module: Any, one: tuple[Any, ...]) -> list[Any]:
    """Layers whose channels are elements of an output."""
    graph = library.DependencyGraph().build_dependency(module, example_inputs=one)
    output = library.ops.OPTYPE.OUTPUT
    return [
        group[0][0].target.module
        for group in graph.get_all_groups()
        if any(dependency.target.type == output for dependency, _ in group)
    ]


def _library() -> Any:
    try:
        with foreign.quiet():
            import torch_pruning
    except (ImportError, OSError) as e:
        raise UsageError(
            f"torch-pruning does not import: {e}",
            remedy="pip install 'edge-runtime[quantize-torch]'",
        ) from e
    return torch_pruning
