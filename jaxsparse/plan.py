"""Rules to a plan: which leaf follows which pattern, and why the others stay dense."""

import collections
import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxsparse.patterns import Pattern, as_pattern, axes_in, why_not

__all__ = ["Leaf", "Plan", "check_plan", "leaf_paths", "match", "plan"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameters in a plan.

    Attributes:
      path: its path, as `"encoder/layers_0/kernel"`; a leading `params/` is dropped.
      shape: its shape.
      pattern: the pattern it follows, its axes counted from the end; None where it stays dense.
      contracting: how many neighbouring axes, the last of them the pattern's first, the matmul sums over together.
      stack: the axes that run over separate weights, as under `nn.scan`, counted from the end.
      layer: the kind of module that owns it, if known.
      reason: why it stays dense.
    """

    path: str
    shape: tuple[int, ...]
    pattern: Pattern | None
    contracting: int = 1
    stack: tuple[int, ...] = ()
    layer: str = ""
    reason: str = ""

    @property
    def density(self) -> float:
        """The fraction of its weights that participate."""
        return self.pattern.density if self.pattern else 1.0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
    """Which leaf of the parameters follows which pattern. `print` it: it says why the others stay dense.

    It is a static value: hashable, and a pytree without leaves, so it travels in optimizer states through `jit`.

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
        return sum(size * leaf.density for size, leaf in zip(sizes, self.leaves, strict=True)) / max(sum(sizes), 1)

    @functools.cached_property
    def _hash(self):
        return hash(self.leaves)

    def __hash__(self):
        return self._hash

    def __getstate__(self):
        return {"leaves": self.leaves}  # strings hash otherwise in another process

    def __str__(self):
        import tabulate  # only those who print a plan pay for it

        def shape(leaf):
            return "x".join(map(str, leaf.shape)) or "scalar"

        def axes(leaf):
            return leaf.pattern and ", ".join(map(str, leaf.pattern.axes))

        header = ("leaf", "layer", "shape", "axis", "pattern", "density", "why dense")
        rows = [
            (leaf.path, leaf.layer, shape(leaf), axes(leaf), leaf.pattern or "dense", leaf.density, leaf.reason) for leaf in self.leaves
        ]
        total = sum(math.prod(leaf.shape) for leaf in self.leaves)
        planned = sum(math.prod(leaf.shape) for leaf in self.sparse.values())
        table = tabulate.tabulate(rows, header, floatfmt=".3g", missingval="", disable_numparse=[0, 1, 2, 6] if rows else True)
        return (
            f"{table}\n{len(self.sparse)} of {len(self.leaves)} leaves are sparse, with {planned:,} of {total:,} weights; "
            f"{self.density * total:,.0f} weights participate (density {self.density:.3f})."
        )


def leaf_paths(tree) -> list[str]:
    """The path of every leaf, in tree order, without a leading `params/`; a box around it, as Flax makes, adds nothing."""
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    children = collections.defaultdict(set)
    for path in paths:
        for i, key in enumerate(path):
            children[path[:i]].add(key)

    def unboxed(path):  # out of nnx.Variable, nn.Partitioned, whose one child is `value`
        return unboxed(path[:-1]) if path and children[path[:-1]] == {jax.tree_util.GetAttrKey("value")} else path

    return [jax.tree_util.keystr(unboxed(path), simple=True, separator="/").removeprefix("params/") for path in paths]


def plan(params, rules: Mapping[str, Pattern | str | None]) -> Plan:
    """Plans the sparsity of any pytree of parameters; every rule names its axes.

    For Flax modules `jaxsparse.flax.plan` learns the axes from the model itself.

    Args:
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      rules: from a path, or a pattern of paths with `*`, `?` and `[...]` as in file names (`*` also crosses `/`),
        to a pattern with its axes, as in `NM(2, 4, axis=0)`, or to None for dense. The first rule that matches a
        leaf decides. A leaf that no rule matches stays dense.

    Returns:
      The plan. A leaf that a rule with a wildcard sweeps in but that cannot follow it stays dense, with the reason
      in the report.

    Raises:
      TypeError: a rule gives something that is no pattern.
      ValueError: a rule matches no leaf, names no axis, or names a leaf exactly that cannot follow it.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params = {"w": jnp.zeros((8, 2)), "b": jnp.zeros(2)}
      >>> print(js.plan(params, {"w": js.NM(2, 4, axis=0)}))
      leaf    layer    shape      axis  pattern      density  why dense
      ------  -------  -------  ------  ---------  ---------  ---------------
      b                2                dense            1    no rule matches
      w                8x2          -2  2:4              0.5
      1 of 2 leaves are sparse, with 16 of 18 weights; 10 weights participate (density 0.556).
    """

    def decide(path, leaf, rule, pattern):
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if pattern.axes is None:
            raise ValueError(
                f"plan: rule {rule!r} gives {pattern} without an axis for {path} of shape {shape}; the axis is never guessed from "
                f"a shape. {pattern.hint}"
            )
        reason = why_not(pattern, shape, dtype)
        if reason and rule.removeprefix("params/") == path:
            raise ValueError(
                f"plan: {path} of shape {shape} cannot be {pattern}: {reason}. Choose another axis or pattern, pad it, or leave it dense."
            )
        if reason:
            return Leaf(path, shape, None, reason=reason)
        return Leaf(path, shape, pattern.along(tuple(axis - len(shape) for axis in axes_in(pattern, len(shape)))))

    return apply_rules("plan", params, rules, decide)


def apply_rules(call: str, params, rules: Mapping[str, Pattern | str | None], decide: Callable[..., Leaf]) -> Plan:
    """The plan in which `decide(path, leaf, rule, pattern)` settles every leaf that a rule makes sparse."""
    if not isinstance(rules, Mapping):
        raise TypeError(f'{call}: `rules` must map paths to patterns, as in {{"*/kernel": "2:4"}}, not {rules!r}.')
    for rule in rules:
        if not isinstance(rule, str):
            raise TypeError(f'{call}: rule {rule!r} is not a path. Write it as text, as in "encoder/kernel" or "*/kernel".')
    patterns = {rule: None if spec is None else as_pattern(spec, f"{call}: rule {rule!r}") for rule, spec in rules.items()}
    matched = dict.fromkeys(patterns, False)

    def settle(path, leaf):
        rules = [rule for rule in patterns if path == rule or fnmatch.fnmatchcase(path, rule.removeprefix("params/"))]
        matched.update(dict.fromkeys(rules, True))
        if not rules:
            return Leaf(path, jnp.shape(leaf), None, reason="no rule matches")
        if patterns[rules[0]] is None:
            return Leaf(path, jnp.shape(leaf), None, reason=f"rule {rules[0]!r} says dense")
        return decide(path, leaf, rules[0], patterns[rules[0]])

    paths = leaf_paths(params)
    for path, leaf in zip(paths, jax.tree.leaves(params), strict=True):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            raise TypeError(f"{call}: {path} is a {type(leaf).__name__}, not an array. Pass arrays or jax.ShapeDtypeStruct.")
    leaves = tuple(map(settle, paths, jax.tree.leaves(params)))
    idle = [rule for rule, used in matched.items() if not used]
    if idle:
        raise ValueError(f"{call}: rule {idle[0]!r} matches no leaf. The leaves are: {', '.join(paths)}.")
    return Plan(leaves)


def check_plan(call: str, plan):
    if not isinstance(plan, Plan):
        raise TypeError(f"{call}: `plan` is a {type(plan).__name__}. Make one with jaxsparse.plan or jaxsparse.flax.plan.")


def match(plan: Plan, tree, call: str) -> list[Leaf | None]:
    """For every leaf of `tree`, in tree order, its sparse `Leaf` in `plan`, or None where it is dense.

    Raises:
      TypeError: `plan` is no plan.
      ValueError: the tree lacks a sparse leaf of the plan, or has it in another shape.
    """
    check_plan(call, plan)
    paths, leaves = leaf_paths(tree), jax.tree.leaves(tree)
    missing = plan.sparse.keys() - set(paths)
    if missing:
        raise ValueError(
            f"{call}: the plan makes {min(missing)} sparse, but the parameters have no such leaf. They have: {', '.join(paths)}. "
            "Pass the parameters that the plan was made for, or plan these."
        )
    for path, leaf in zip(paths, leaves, strict=True):
        planned = plan.sparse.get(path)
        if planned is not None and jnp.shape(leaf) != planned.shape:
            raise ValueError(
                f"{call}: {path} has shape {jnp.shape(leaf)}, but the plan was made for {planned.shape}. Plan these parameters."
            )
    return [plan.sparse.get(path) for path in paths]
