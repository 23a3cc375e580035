"""Plans: which leaf follows which pattern, and why the others stay dense."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxsparse._plan.paths import by_path
from jaxsparse._plan.pattern import Pattern
from jaxsparse._registration import register_static

__all__ = ["Leaf", "Plan", "check_plan", "map_planned", "match"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameters in a plan.

    Attributes:
      path: its path, such as `"encoder/layers_0/kernel"`; a leading `params/` is dropped.
      shape: its shape.
      pattern: its pattern, with axes counted from the end; None if the leaf stays dense.
      summed: the axes that the matmul sums over together, counted from the end, ending with the
        first axis of the pattern; empty if the plan was made without a function to learn them from.
      stack: the axes that run over separate weights, as under `nn.scan`, counted from the end.
      layer: the kind of module that owns it, if known.
      reason: why it stays dense; for a sparse leaf, why its axis is taken from the rule.
      dtype: its dtype, if known; plans that differ in it alone are equal.
    """

    path: str
    shape: tuple[int, ...]
    pattern: Pattern | None
    summed: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    layer: str = ""
    reason: str = ""
    dtype: str = dataclasses.field(default="", compare=False)

    @property
    def density(self) -> float:
        """The fraction of its weights that participate."""
        return self.pattern.density if self.pattern else 1.0

    @property
    def bytes_saved(self) -> int:
        """The bytes that `compress` saves; 0 if it does not support the pattern."""
        if not self.dtype or self.pattern is None or self.pattern.groups[:1] != ((2, 4),):
            return 0
        inner = math.prod(self.shape[axis] for axis in self.summed or (self.pattern.axes or ())[:1])
        rows = math.prod(self.shape) // inner
        return rows * (inner // 2 * jnp.dtype(self.dtype).itemsize - 2 * -(-inner // 16))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which leaf of the parameters follows which pattern; `print` it for the reasons.

    It is a static value: hashable, and a pytree without leaves, so it passes through `jit` inside
    an optimizer state.

    Attributes:
      leaves: one `Leaf` for each leaf of the parameters, in tree order.
    """

    leaves: tuple[Leaf, ...]

    @functools.cached_property
    def sparse(self) -> dict[str, Leaf]:
        """The sparse leaves by path."""
        return {leaf.path: leaf for leaf in self.leaves if leaf.pattern is not None}

    @functools.cached_property
    def density(self) -> float:
        """The fraction of all weights that participate."""
        sizes = [math.prod(leaf.shape) for leaf in self.leaves]
        return sum(
            size * leaf.density for size, leaf in zip(sizes, self.leaves, strict=True)
        ) / max(sum(sizes), 1)

    @functools.cached_property
    def _hash(self):
        return hash(self.leaves)

    def __hash__(self):
        return self._hash

    def __getstate__(self):
        return {"leaves": self.leaves}  # the hash of a string differs between processes

    def __str__(self):
        import tabulate  # here, so that only printing pays for the import

        def shape(leaf):
            return "x".join(map(str, leaf.shape)) or "scalar"

        def axes(leaf):
            return leaf.pattern and ", ".join(map(str, leaf.pattern.axes))

        header = ("leaf", "layer", "shape", "axis", "pattern", "density", "bytes saved", "note")
        rows = [
            (
                leaf.path,
                leaf.layer,
                shape(leaf),
                axes(leaf),
                leaf.pattern or "dense",
                leaf.density,
                leaf.bytes_saved or None,
                leaf.reason,
            )
            for leaf in self.leaves
        ]
        total = sum(math.prod(leaf.shape) for leaf in self.leaves)
        planned = sum(math.prod(leaf.shape) for leaf in self.sparse.values())
        table = tabulate.tabulate(
            rows,
            header,
            floatfmt=".3g",
            intfmt=",",
            missingval="",
            disable_numparse=[0, 1, 2, 7] if rows else True,
        )
        saved = sum(leaf.bytes_saved for leaf in self.sparse.values())
        return (
            f"{table}\n{len(self.sparse)} of {len(self.leaves)} leaves are sparse, with "
            f"{planned:,} of {total:,} weights; {self.density * total:,.0f} weights participate "
            f"(density {self.density:.3f})."
            + (f"\nCompressed, they take {saved:,} bytes less." if saved else "")
        )


def check_plan(call: str, plan: Any) -> None:
    """Raises a TypeError if `plan` is not a plan."""
    if not isinstance(plan, Plan):
        raise TypeError(
            f"{call}: `plan` is a {type(plan).__name__}. Make one with jaxsparse.plan, "
            "jaxsparse.flax.plan or jaxsparse.nnx.plan."
        )


def match(plan: Plan, tree: PyTree, call: str, what: str = "parameters") -> list[Leaf | None]:
    """The sparse `Leaf` of every leaf of a tree, in tree order, or None where it is dense.

    Args:
      plan: the plan.
      tree: a pytree with the sparse leaves of the plan.
      call: the name of the public function, for errors.
      what: what the tree holds, for errors.

    Raises:
      TypeError: `plan` is not a plan.
      ValueError: the tree lacks a sparse leaf of the plan, or has it with another shape.
    """
    check_plan(call, plan)
    leaves = by_path(tree)
    missing = plan.sparse.keys() - leaves.keys()
    if missing:
        raise ValueError(
            f"{call}: the plan makes {min(missing)} sparse, but the {what} have no such leaf. "
            f"They have: {', '.join(leaves)}. Pass the {what} that the plan was made for, or plan "
            "these."
        )
    for path, planned in plan.sparse.items():
        if jnp.shape(leaves[path]) != planned.shape:
            raise ValueError(
                f"{call}: {path} has shape {jnp.shape(leaves[path])} in the {what}, but the plan "
                f"was made for {planned.shape}. Make a plan for these parameters."
            )
    return [plan.sparse.get(path) for path in leaves]


def map_planned(
    f: Callable[..., Any],
    plan: Plan,
    tree: PyTree,
    *rest: PyTree,
    call: str,
    what: str = "parameters",
    dense: Callable[[Any], Any] = lambda leaf: leaf,
) -> Any:
    """Replaces the sparse leaves of a tree by `f(planned, leaf, *others)`.

    Args:
      f: a function of the planned `Leaf`, the leaf of the tree and those of the other trees.
      plan: the plan.
      tree: a pytree with the sparse leaves of the plan.
      *rest: pytrees of the same structure.
      call: the name of the public function, for errors.
      what: what the tree holds, for errors.
      dense: a function of a dense leaf; the identity unless given.
    """
    planned = match(plan, tree, call, what)
    leaves, structure = jax.tree.flatten(tree)
    others = (
        zip(*(jax.tree.leaves(one) for one in rest), strict=True) if rest else [()] * len(leaves)
    )
    joined = zip(planned, leaves, others, strict=True)
    return jax.tree.unflatten(
        structure, [f(leaf, x, *xs) if leaf else dense(x) for leaf, x, xs in joined]
    )


def _encoded(plan: Plan) -> list:
    for leaf in plan.sparse.values():
        if leaf.pattern is not None and leaf.pattern.schedule is not None:
            raise ValueError(
                f"jax.export: the density of {leaf.path} follows a schedule, which cannot be "
                "exported. Use a plan whose densities are numbers."
            )
    return [
        {**vars(leaf), "pattern": leaf.pattern and _encoded_pattern(leaf.pattern)}
        for leaf in plan.leaves
    ]


def _encoded_pattern(pattern: Any) -> list:
    fields = {f.name: getattr(pattern, f.name) for f in dataclasses.fields(pattern) if f.init}
    return [type(pattern).__name__, fields]


def _decoded(leaves: list) -> Plan:
    kinds = {kind.__name__: kind for kind in Pattern.__subclasses__()}

    def untupled(fields):
        return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}

    def leaf(fields):
        name, arguments = fields.pop("pattern") or (None, None)
        pattern = kinds[name](**untupled(arguments)) if name else None
        return Leaf(**untupled(fields), pattern=pattern)

    return Plan(tuple(map(leaf, leaves)))


register_static(Plan, _encoded, _decoded)
