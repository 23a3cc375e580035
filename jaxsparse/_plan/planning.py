"""Makes plans from rules; axes are named by the rules or learnt from the traced program."""

import collections
import dataclasses
import fnmatch
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxsparse._plan.eligibility import Anywhere, sweeps, why_ineligible
from jaxsparse._plan.paths import leaf_paths
from jaxsparse._plan.pattern import Pattern, axes_in, why_not
from jaxsparse._plan.patterns import as_pattern
from jaxsparse._plan.plan import Leaf, Plan
from jaxsparse._program.arguments import is_traceable
from jaxsparse._program.uses import Use, uses

__all__ = ["learned_plan", "plan", "traced"]


def plan(
    params: PyTree,
    rules: Mapping[str, Pattern | str | Anywhere | None],
    fn: Callable | None = None,
    *args: Any,
    **kwargs: Any,
) -> Plan:
    """Plans the sparsity of any pytree of parameters.

    With a function, the axis of each weight is learnt from `fn(params, *args, **kwargs)`, which is
    traced once, abstractly: no arithmetic, no device memory. How the traced program uses a leaf
    decides. A weight is grouped along the innermost axis that its matrix product sums over (for a
    convolution the input channels), and by `TransposableNM` and `Block` along the innermost output
    axis too (for a convolution the output channels). Weights are followed to their products through
    casts, reshapes, transpositions, slices and concatenations, through scaling, normalisation and
    standardisation along the summed axis, and through `jit`, `vmap`, `scan`, `while_loop`, `cond`,
    `remat`, `shard_map` and custom derivatives. In a stack every weight is masked separately,
    unless all of them take the same input, as under `vmap(..., in_axes=(None, 0))`: then they count
    as one weight.

    Without a function, every rule must name its axes.

    Args:
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      rules: maps paths to patterns, or to None for dense. A path may contain `*`, `?` and `[...]`
        as in file names, where `*` also matches `/`. The first rule that matches a leaf decides; a
        leaf without a matching rule stays dense. A pattern that names its axes, as in `NM(2, 4,
        axis=0)`, is checked against the program; where the program does not determine the axes,
        those of the rule are used. A rule with such a wildcard and without an axis leaves heads
        dense, by their names, and for 2:4 the leaves whose product sums over a number that is not a
        multiple of 16 (of 32 for weights of 8 bits), unless its value is `anywhere(pattern)`.
      fn: the model, a function of (params, *args, **kwargs), such as `model.apply`. Use
        `functools.partial` to bind arguments that are not arrays.
      *args: the other arguments of `fn`, arrays or `jax.ShapeDtypeStruct`.
      **kwargs: its keyword arguments, likewise.

    Returns:
      The plan. A leaf that cannot follow its rule stays dense, with the reason in the report
      (`print` the plan). These are embedding tables, kernels of grouped convolutions and leaves
      that are not an operand of a product, unless their rule names the axis.

    Raises:
      TypeError: the value of a rule is not a pattern, or an argument of `fn` is not an array.
      ValueError: a rule matches no leaf; names a different axis than the program sums over; gives
        the exact path of a leaf that cannot follow it; or, without `fn`, names no axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params = {"w": jnp.zeros((2, 8)), "b": jnp.zeros((1, 2))}
      >>> model = lambda params, x: x @ params["w"].T + params["b"]
      >>> print(js.plan(params, {"w": "2:4"}, model, jnp.zeros((1, 8))))
      leaf    layer    shape      axis  pattern      density    bytes saved  note
      ------  -------  -------  ------  ---------  ---------  -------------  ---------------
      b                1x2              dense            1                   no rule matches
      w                2x8          -1  2:4              0.5             28
      1 of 2 leaves are sparse, with 16 of 18 weights; 10 weights participate (density 0.556).
      Compressed, they take 28 bytes less.
      >>> js.plan(params, {"w": js.NM(2, 4, axis=1)}).sparse["w"].pattern.axis
      -1

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 4.2, for the choice of layers
      (arXiv:2104.08378).
    """
    if fn is None:
        if args or kwargs:
            raise TypeError(
                "plan: there are arguments but no function. Pass as `fn` the function that takes "
                "them."
            )
        return _named_plan(params, rules)
    return learned_plan("plan", params, rules, traced("plan", fn, params, *args, **kwargs))


def _named_plan(params: PyTree, rules: Any) -> Plan:
    """Makes a plan from rules that name their axes."""
    ranks = collections.defaultdict(set)

    def decide(path, leaf, rule, pattern):
        if pattern.axes is None:
            raise ValueError(
                f"plan: rule {rule!r} gives {pattern} without an axis for {path} of shape "
                f"{jnp.shape(leaf)}; the axis is never guessed from a shape. {pattern.hint} Or "
                "pass the function that uses the parameters, as in plan(params, rules, fn, *args)."
            )
        decided = _with_named_axes("plan", path, leaf, rule, pattern, "")
        if decided.pattern is not None and decided.pattern.axes and len(decided.shape) > 1:
            ranks[rule].add(len(decided.shape))
        return decided

    result = apply_rules("plan", params, rules, decide)
    for rule, counts in ranks.items():
        if len(counts) > 1:
            warnings.warn(
                f"plan: rule {rule!r} names one axis for weights of "
                f"{' and '.join(map(str, sorted(counts)))} axes, whose products may sum over "
                "different ones. Pass the function that uses the parameters, as in plan(params, "
                "rules, fn, *args), to learn the axes, or write one rule for each kind.",
                stacklevel=3,
            )
    return result


def _with_named_axes(
    call: str, path: str, leaf: Any, rule: str, pattern: Pattern, note: str
) -> Leaf:
    """A leaf with the axes that its rule names."""
    shape = jnp.shape(leaf)
    reason = why_not(pattern, shape, jnp.result_type(leaf))
    if reason and rule.removeprefix("params/") == path:
        raise ValueError(
            f"{call}: {path} of shape {shape} cannot be {pattern}: {reason}. Choose another axis "
            "or pattern, pad it, or leave it dense."
        )
    if reason:
        return Leaf(path, shape, None, reason=reason)
    return Leaf(
        path,
        shape,
        pattern.along(tuple(axis - len(shape) for axis in axes_in(pattern, len(shape)))),
        reason=note,
    )


def traced(call: str, fn: Callable, params: PyTree, *args: Any, **kwargs: Any) -> list[set[Use]]:
    """Traces `fn(params, *args, **kwargs)` and finds how it uses each leaf of `params`."""
    for path, leaf in jax.tree.leaves_with_path((args, kwargs)):
        if not is_traceable(leaf):
            raise TypeError(
                f"{call}: argument {jax.tree_util.keystr(path)} of `fn` is a "
                f"{type(leaf).__name__}, not an array. Bind it with functools.partial, as in "
                "functools.partial(model.apply, method=...)."
            )
    names: list[tuple[str, int]] = []
    while True:
        try:
            program = jax.make_jaxpr(fn, axis_env=names or None)(params, *args, **kwargs)
            break
        except NameError as error:
            # a named axis, of vmap or a mesh, that only the training step binds
            unbound = re.search(r"unbound axis name: (\w+)", str(error))
            if unbound is None or unbound[1] in dict(names):
                raise
            names.append((unbound[1], 1))
        except jax.errors.ConcretizationTypeError as error:
            error.add_note(
                f"{call}: the arguments of `fn` are traced. Use functools.partial to bind those "
                "that it branches on."
            )
            raise
    return uses(program.jaxpr, [jnp.shape(leaf) for leaf in jax.tree.leaves(params)])


def learned_plan(
    call: str,
    params: PyTree,
    rules: Mapping[str, Pattern | str | Anywhere | None],
    used: list[set[Use]],
) -> Plan:
    """Makes a plan whose axes come from the program; `used` holds the uses of each leaf."""
    known = dict(zip(leaf_paths(params), used, strict=True))

    def decide(path, leaf, rule, pattern):
        return _decide(call, path, leaf, rule, pattern, known[path])

    return apply_rules(call, params, rules, decide)


def _decide(call: str, path: str, leaf: Any, rule: str, pattern: Pattern, used: set[Use]) -> Leaf:
    shape = jnp.shape(leaf)
    ndim, count = len(shape), len(pattern.multiples)
    products = [use for use in used if not use.reason]
    axes = {tuple(axis - ndim for axis in _innermost(use, shape)[:count]) for use in products}
    against = [use for use in used if use.reason and (use.decides or not products)]
    reason = min(against, key=lambda use: (not use.decides, use.reason)).reason if against else ""
    if not used:
        reason = "not used by the function when it is called with these arguments"
    elif not reason and len(axes) > 1:
        reason = (
            f"shared by products that sum over different axes {sorted({one[0] for one in axes})}"
        )
    elif not reason and any(len(one) < count for one in axes):
        reason = "the product has no output axis of its own"
    if reason:
        if pattern.axes:
            return _with_named_axes(call, path, leaf, rule, pattern, f"axis as named: {reason}")
        return Leaf(path, shape, None, reason=reason)
    (learned,) = axes
    if (
        pattern.axes is not None
        and tuple(axis - ndim if axis >= 0 else axis for axis in pattern.axes) != learned
    ):
        named, expected = (", ".join(map(str, one)) for one in (pattern.axes, learned))
        raise ValueError(
            f"{call}: rule {rule!r} names axis {named} for {path} of shape {shape}, but the "
            f"program sums over axis {expected}. "
            f'Leave the axis out, as in "{pattern.along(None)}".'
        )
    pattern = pattern.along(learned)
    cannot = why_not(pattern, shape, jnp.result_type(leaf))
    if cannot:
        return Leaf(path, shape, None, reason=cannot)
    stack = tuple(sorted({axis - ndim for use in products for axis in use.stack}))
    return Leaf(path, shape, pattern, _summed_by_all(products, ndim), stack)


def _innermost(use: Use, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The innermost axis that a product sums over, and its innermost output axis, if it has one."""
    outputs = [
        axis
        for axis, n in enumerate(shape)
        if axis not in use.summed and axis not in use.stack and n != 1
    ]
    return (use.summed[-1], *outputs[-1:])


def _summed_by_all(products: list[Use], ndim: int) -> tuple[int, ...]:
    """The axes that every product of a weight sums over; groups run along the last."""
    common = set.intersection(*(set(use.summed) for use in products))
    *others, last = (axis for axis in products[0].summed if axis in common)
    # a convolution whose window comes after its channels: a sum of products, one for each position
    if others and max(others) > last:
        others = []
    return tuple(axis - ndim for axis in (*others, last))


def apply_rules(
    call: str,
    params: PyTree,
    rules: Mapping[str, Pattern | str | Anywhere | None],
    decide: Callable[..., Leaf],
) -> Plan:
    """Makes a plan; `decide(path, leaf, rule, pattern)` plans the leaves with a sparse rule."""
    if not isinstance(rules, Mapping):
        raise TypeError(
            f'{call}: `rules` must map paths to patterns, as in {{"*/kernel": "2:4"}}, not '
            f"{rules!r}."
        )
    for rule in rules:
        if not isinstance(rule, str):
            raise TypeError(
                f'{call}: rule {rule!r} is not a path. Write it as text, as in "encoder/kernel" or '
                '"*/kernel".'
            )
    specs = {
        rule: spec.pattern if isinstance(spec, Anywhere) else spec for rule, spec in rules.items()
    }
    patterns = {
        rule: None if spec is None else as_pattern(spec, f"{call}: rule {rule!r}")
        for rule, spec in specs.items()
    }
    matched = dict.fromkeys(patterns, False)

    def settle(path, leaf):
        matching = [
            rule
            for rule in patterns
            if path == rule or fnmatch.fnmatchcase(path, rule.removeprefix("params/"))
        ]
        matched.update(dict.fromkeys(matching, True))
        if not matching:
            return Leaf(path, jnp.shape(leaf), None, reason="no rule matches")
        rule, pattern = matching[0], patterns[matching[0]]
        if pattern is None:
            return Leaf(path, jnp.shape(leaf), None, reason=f"rule {rule!r} says dense")
        decided = decide(path, leaf, rule, pattern)
        asked = not sweeps(rule) or pattern.axes is not None or isinstance(rules[rule], Anywhere)
        why = "" if asked or not decided.pattern else why_ineligible(decided, jnp.result_type(leaf))
        return Leaf(path, decided.shape, None, reason=why) if why else decided

    paths = leaf_paths(params)
    for path, leaf in zip(paths, jax.tree.leaves(params), strict=True):
        if not is_traceable(leaf):
            raise TypeError(
                f"{call}: {path} is a {type(leaf).__name__}, not an array. Pass arrays or "
                "jax.ShapeDtypeStruct."
            )
    leaves = tuple(
        dataclasses.replace(settle(path, leaf), dtype=str(getattr(leaf, "dtype", "")))
        for path, leaf in zip(paths, jax.tree.leaves(params), strict=True)
    )
    idle = [rule for rule, used in matched.items() if not used]
    if idle:
        raise ValueError(
            f"{call}: rule {idle[0]!r} matches no leaf. The leaves are: {', '.join(paths)}."
        )
    return Plan(leaves)
