"""The state of one walk over a graph: groups of channels, and what hangs on them.

Law of this file: bookkeeping, no rule of any operator. A *group* is a set of channels that can only
go together; a *layout* says how a value's axis is made of groups; a *cut* is a weight's axis with
its layout. Groups are joined when values meet, and split when values of different make meet: a
group is then two, and everything that was said of it holds for both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
Shapes = dict[str, tuple[int | None, ...]]


class Layout(NamedTuple):
    """How an axis is made of groups: their channels one after the other, `block` elements each.

    `block` is more than 1 after a Flatten: the H x W values of each channel stand together.
    """

    axis: int
    groups: tuple[int, ...]
    block: int = 1


class Cut(NamedTuple):
    """A weight that loses slices of `axis` when channels of the layout's groups go."""

    weight: str
    axis: int
    groups: tuple[int, ...]
    block: int


class Maker(NamedTuple):
    """Slices of a weight's axis, from `start` on, that make the channels of a group."""

    weight: str
    axis: int
    start: int


class Reader(NamedTuple):
    """A value whose axis is read by a weight: what a channel adds to the next layer.

    `bias` of the reading node, where what a channel adds on average can be added instead; or empty.
    """

    value: str
    axis: int
    cut: Cut
    bias: str


class Stated(NamedTuple):
    """A size that is written into a constant, and changes."""

    constant: str
    place: int
    groups: tuple[int, ...]
    block: int


class Channels(NamedTuple):
    """What was found.

    Attributes:
        sizes: of each group, by its number. prunable: groups whose channels may go.
        cuts: all weights that hang on groups. made_by, readers: for importance.
        frozen: why a group may not be pruned.
        stated: constants that state a size which changes.
        depthwise: convolutions with a filter for each channel: (output's name, groups).
        nodes: the nodes that make a group's channels.
    """

    sizes: dict[int, int]
    prunable: tuple[int, ...]
    cuts: tuple[Cut, ...]
    made_by: dict[int, tuple[Maker, ...]]
    readers: tuple[Reader, ...]
    frozen: dict[int, str]
    stated: tuple[Stated, ...]
    depthwise: tuple[tuple[str, tuple[int, ...]], ...]
    nodes: dict[int, tuple[str, ...]]


class Walk:
    """What is known after some of the graph's nodes."""

    def __init__(self, graph: Any, shapes: Shapes, weights: dict[str, Array]) -> None:
        self.weights = weights
        self.layouts: dict[str, Layout] = {}
        self.depthwise: list[tuple[str, tuple[int, ...]]] = []
        self._shapes = shapes
        self._sizes: dict[int, int] = {}
        self._cuts: list[Cut] = []
        self._readers: list[Reader] = []
        self._stated: list[Stated] = []
        self._made_by: dict[int, list[Maker]] = {}
        self._nodes: dict[int, list[str]] = {}
        self._frozen: dict[int, str] = {}
        self._parent: dict[int, int] = {}
        self._parts: dict[int, tuple[int, int]] = {}
        self._uses = Counter(names_used(graph))

    # -- groups ------------------------------------------------------------------------------------

    def new_group(self, maker: Maker, node: Any) -> int:
        """A group of the channels that all slices of a weight's axis make."""
        size = self.weights[maker.weight].shape[maker.axis]
        return self._new(size, [maker], [node.name or node.output[0]])

    def _new(self, size: int, made_by: list[Maker], nodes: list[str]) -> int:
        number = len(self._parent)
        self._parent[number] = number
        self._sizes[number] = size
        self._made_by[number], self._nodes[number] = made_by, nodes
        return number

    def leaves(self, groups: Iterable[int]) -> tuple[int, ...]:
        """What the groups are now, after joins and splits."""
        found: list[int] = []
        for group in groups:
            while self._parent[group] != group:
                group = self._parent[group]
            parts = self._parts.get(group)
            found += self.leaves(parts) if parts else (group,)
        return tuple(found)

    def align(self, one: Layout, other: Layout) -> bool:
        """Make two layouts of one length one: groups are split until they pair, then joined."""
        if one.axis != other.axis or one.block != other.block:
            return False
        if self.length(one) != self.length(other):
            return False
        while True:
            pairs = list(zip(self.leaves(one.groups), self.leaves(other.groups), strict=False))
            uneven = next(
                (pair for pair in pairs if self._size(pair[0]) != self._size(pair[1])), None
            )
            if uneven is None:
                break
            small, large = sorted(uneven, key=self._size)
            self._split(large, self._size(small))
        for a, b in pairs:
            self._join(a, b)
        return True

    def apart(self, layout: Layout, sizes: list[int]) -> list[Layout]:
        """The layout as several, of so many channels each; groups are split where one ends."""
        rest, found = list(self.leaves(layout.groups)), []
        for wanted in sizes:
            taken: list[int] = []
            while wanted > 0:
                rest[:1] = self.leaves(rest[:1])
                if self._size(rest[0]) > wanted:
                    self._split(rest[0], wanted)
                    rest[:1] = self.leaves(rest[:1])
                taken.append(rest.pop(0))
                wanted -= self._size(taken[-1])
            found.append(layout._replace(groups=tuple(taken)))
        return found

    def freeze(self, value: str, reason: str) -> None:
        """Nothing of this value may go."""
        layout = self.layouts.get(value)
        for group in self.leaves(layout.groups) if layout else ():
            self._frozen.setdefault(group, reason)

    def freeze_group(self, group: int, reason: str) -> None:
        self._frozen.setdefault(group, reason)

    def _size(self, group: int) -> int:
        return self._sizes[group]

    def _join(self, a: int, b: int) -> None:
        a, b = self.leaves((a, b))
        if a != b:
            self._parent[b] = a
            self._made_by[a] += self._made_by[b]
            self._nodes[a] += self._nodes[b]

    def _split(self, group: int, at: int) -> None:
        makers, nodes = self._made_by[group], self._nodes[group]
        later = [one._replace(start=one.start + at) for one in makers]
        self._parts[group] = (
            self._new(at, list(makers), list(nodes)),
            self._new(self._sizes[group] - at, later, list(nodes)),
        )

    # -- values and weights ------------------------------------------------------------------------

    def shape(self, value: str) -> tuple[int | None, ...]:
        if value in self.weights:
            return tuple(self.weights[value].shape)
        return self._shapes.get(value, ())

    def length(self, layout: Layout) -> int:
        """Elements of the axis."""
        return sum(self._sizes[group] for group in layout.groups) * layout.block

    def own(self, constant: str) -> Array | None:
        """The constant, if it is one and nobody else uses it."""
        return self.weights.get(constant) if self._uses[constant] == 1 else None

    def cut(self, weight: str, axis: int, layout: Layout) -> bool:
        """Note a weight; False if it is none, is shared, or does not fit."""
        array = self.own(weight)
        if array is None or array.shape[axis] != self.length(layout):
            return False
        self._cuts.append(Cut(weight, axis, layout.groups, layout.block))
        return True

    def read(self, value: str, weight: str, axis: int, layout: Layout, bias: str) -> bool:
        """Note a weight that reads the channels of a value."""
        if not self.cut(weight, axis, layout):
            return False
        usable = self.own(bias) is not None and self.weights[bias].ndim == 1
        self._readers.append(Reader(value, layout.axis, self._cuts[-1], bias if usable else ""))
        return True

    def state(self, constant: str, place: int, layout: Layout) -> bool:
        """Note a size; False if the constant is shared."""
        if self.own(constant) is None:
            return False
        self._stated.append(Stated(constant, place, layout.groups, layout.block))
        return True

    def give(self, node: Any, layout: Layout) -> bool:
        self.layouts[node.output[0]] = layout
        return True

    # -- outcome -----------------------------------------------------------------------------------

    def mark(self) -> tuple[int, int, int, int]:
        """Where the notes stand; `forget` returns there."""
        return len(self._cuts), len(self._readers), len(self._stated), len(self.depthwise)

    def forget(self, mark: tuple[int, int, int, int]) -> None:
        notes: tuple[list[Any], ...] = (self._cuts, self._readers, self._stated, self.depthwise)
        for kept, count in zip(notes, mark, strict=True):
            del kept[count:]

    def result(self) -> Channels:
        """Everything, by what the groups are at the end."""
        frozen: dict[int, str] = {}
        for group, reason in self._frozen.items():
            for leaf in self.leaves((group,)):
                frozen.setdefault(leaf, reason)
        groups = [group for group in self._parent if self.leaves((group,)) == (group,)]
        return Channels(
            {group: self._sizes[group] for group in groups},
            tuple(group for group in groups if group not in frozen and self._sizes[group] > 1),
            tuple(self._now(one) for one in self._cuts),
            {group: tuple(self._made_by[group]) for group in groups},
            tuple(one._replace(cut=self._now(one.cut)) for one in self._readers),
            frozen,
            tuple(self._now(one) for one in self._stated),
            tuple((name, self.leaves(groups)) for name, groups in self.depthwise),
            {group: tuple(self._nodes[group]) for group in groups},
        )

    def _now(self, one: Any) -> Any:
        return one._replace(groups=self.leaves(one.groups))


def names_used(graph: Any) -> Iterator[str]:
    """The name of a value at each place that uses it: nodes, their subgraphs, the outputs."""
    yield from (out.name for out in graph.output)
    for node in graph.node:
        yield from node.input
        yield from captured(node)


def captured(node: Any) -> Iterator[str]:
    """Names that the subgraphs of a node (If, Loop) use, those of the outer graph among them."""
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            yield from names_used(graph)
