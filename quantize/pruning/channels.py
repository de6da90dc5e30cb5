"""Which channels of a graph belong together, and which weights must be cut with them.

Law of this file: the one walk in the graph's (topological) order; it reads and changes nothing. An
operator without a rule, or a case that its rule does not know, freezes the groups of its inputs.

Source of the idea: Fang et al. 2023, "DepGraph: towards any structural pruning".
"""

from __future__ import annotations

from typing import Any

from quantize.pruning.groups import Array, Channels, Cut, Shapes, Walk, captured
from quantize.pruning.rules import RULES

__all__ = ["Channels", "Cut", "analyse"]


def analyse(graph: Any, shapes: Shapes, weights: dict[str, Array]) -> Channels:
    """Find groups and cuts.

    Args:
        graph: a GraphProto in topological order. shapes: of all values, None where not known.
        weights: constant tensors by name.
    """
    walk = Walk(graph, shapes, weights)
    for node in graph.node:
        _visit(walk, node)
    for out in graph.output:
        walk.freeze(out.name, "it is an output of the model")
    return walk.result()


def _visit(walk: Walk, node: Any) -> None:
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    mark = walk.mark()
    if rule is None or not rule(walk, node):
        walk.forget(mark)
        for name in (*node.input, *captured(node)):
            walk.freeze(name, f"{node.op_type} {node.name or node.output[0]} needs them all")
