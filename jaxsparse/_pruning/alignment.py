"""Channels of the values of a program, joined wherever they must be aligned."""

import collections
import itertools
from collections.abc import Iterable, Sequence

__all__ = ["Alignment", "Axes"]

# for each axis of a value, the node of its channels; None if all elements along it are equal
Axes = tuple[int | None, ...]


class Alignment:
    """The channels that axes of values run over: nodes, which are joined, split and frozen.

    Channels may be reordered together unless they are frozen. A node that is split runs over pairs
    of other channels, as those of heads are pairs of a head and a channel in it; these may be
    reordered in its place.
    """

    def __init__(self):
        self.parents: list[int] = []
        self.reasons: dict[int, str] = {}  # of frozen nodes
        self.splits: dict[int, tuple[int, int, int]] = {}  # the outer, the inner, their number
        self.values: set[tuple[Axes, Axes]] = set()  # with the loops around them
        self.sums: set[tuple[int, Axes]] = set()  # summed channels, and what is aligned there
        self.used: set[int] = set()

    def new(self, reason: str = "") -> int:
        node = len(self.parents)
        self.parents.append(node)
        if reason:
            self.reasons[node] = reason
        return node

    def fresh(self, shape: Sequence[int], reason: str = "") -> Axes:
        """The axes of a value that nothing is known of."""
        return tuple(self.new(reason) if n != 1 else None for n in shape)

    def root(self, node: int) -> int:
        while self.parents[node] != node:
            self.parents[node] = node = self.parents[self.parents[node]]
        return node

    def join(self, *nodes: int | None) -> int | None:
        """Makes the channels of aligned axes the same."""
        roots = sorted({self.root(node) for node in nodes if node is not None})
        if not roots:
            return None
        first, *others = roots
        splits = [self.splits.pop(root) for root in roots if root in self.splits]
        for root in others:
            self.parents[root] = first
        if splits:
            self.splits[first] = splits[0]
        for outer, inner, size in splits[1:]:
            for pair in zip(self.split(first, size), (outer, inner), strict=True):
                self.join(*pair)
        return first

    def split(self, node: int | None, size: int) -> tuple[int | None, int | None]:
        """Splits channels into runs of a size: the channels of the runs, and those inside."""
        if node is None:
            return None, None
        root = self.root(node)
        if root not in self.splits:
            self.splits[root] = self.new(), self.new(), size
        outer, inner, n = self.splits[root]
        if n == size:
            return outer, inner
        if n % size == 0:
            middle, last = self.split(inner, size)
            return self.merge(outer, middle, n // size), last
        if size % n == 0:
            first, middle = self.split(outer, size // n)
            return first, self.merge(middle, inner, n)
        reason = "reshapes split them in ways that do not fit"
        self.freeze([(root,)], reason)
        return self.new(reason), self.new(reason)

    def merge(self, outer: int | None, inner: int | None, size: int) -> int | None:
        """The channels of an axis that runs over two others, the inner one of a size."""
        if outer is None and inner is None:
            return None
        node = self.new()
        pair = [self.new() if one is None else one for one in (outer, inner)]
        self.splits[node] = pair[0], pair[1], size
        return node

    def factors(self, node: int | None, size: int = 0) -> list[tuple[int | None, int]]:
        """The channels that an axis of a size runs over in row-major order, and their numbers."""
        if node is None or self.root(node) not in self.splits:
            return [(None if node is None else self.root(node), size)]
        outer, inner, n = self.splits[self.root(node)]
        return [*self.factors(outer, size // n), *self.factors(inner, n)]

    def roots(self, nodes: Iterable[int | None]) -> list[int]:
        """All channels that axes run over."""
        pairs = itertools.chain.from_iterable(map(self.factors, nodes))
        return [root for root, _ in pairs if root is not None]

    def freeze(self, values: Iterable[Axes], reason: str) -> None:
        for axes in values:
            for node in axes:
                if node is not None:
                    self.reasons.setdefault(self.root(node), reason)

    def frozen(self) -> dict[int, str]:
        """The reasons of all frozen channels, by root; the first, if there are several."""
        reasons: dict[int, str] = {}
        for node, reason in self.reasons.items():
            for root in self.roots([node]):
                reasons.setdefault(root, reason)
        return reasons

    def note(self, values: Iterable[Axes], loops: Axes) -> None:
        self.values.update((axes, loops) for axes in values)

    def stacks(self, reordered: set[int]) -> dict[int, list[int]]:
        """For all channels, the others on whose position their order may depend.

        Each value with the channels must have exactly one axis over the others or be in a loop over
        them, and where the channels are summed, the others must be aligned. They are not among
        those that are `reordered`.
        """
        around: dict[int, set[int]] = {}

        def keep(root, others):
            around[root] = around.get(root, others) & others

        for axes, loops in self.values:
            counts = collections.Counter(self.roots((*axes, *loops)))
            for root in counts:
                keep(root, {one for one, n in counts.items() if n == 1})
        for node, aligned in self.sums:
            for root in self.roots([node]):
                keep(root, set(self.roots(aligned)))
        return {root: sorted(others - {root} - reordered) for root, others in around.items()}
