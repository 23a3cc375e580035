"""Channels of a model reordered, so that N:M keeps more of its weights."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jaxtyping import PyTree

from jaxsparse import _checks
from jaxsparse._plan.paths import leaf_paths
from jaxsparse._plan.pattern import Pattern, axes_in
from jaxsparse._plan.plan import Plan, match
from jaxsparse._program.arguments import is_array
from jaxsparse._pruning.channels import Channels, Place, channels
from jaxsparse._pruning.permutation import column_order

__all__ = ["ChannelAxis", "ChannelGroup", "PermuteResult", "permute"]


class ChannelAxis(NamedTuple):
    """Where channels are in a leaf.

    Attributes:
      path: the path of the leaf.
      shape: its shape, with axes split as reshapes of the program split them, such as into heads.
      axis: the axis of `shape` that runs over the channels.
      stack: the axes of `shape` over separate sets of channels, which have separate orders.
    """

    path: str
    shape: tuple[int, ...]
    axis: int
    stack: tuple[int, ...]


class ChannelGroup(NamedTuple):
    """Channels that share one order: all axes of weights that run over them.

    Attributes:
      weights: the paths of the planned weights whose n:m groups run over the channels.
      axes: where the channels are in all leaves that have them.
      size: how many channels there are.
      order: int `[*stack, size]`, where `stack` are separate sets of channels, as of each layer of
        a scan; the channel at place i was at place `order[..., i]`. None if they are left alone.
      kept: the sum of the scores that n:m keeps of `weights` in this order; NaN, like the next
        two, if the channels are left alone.
      before: the same in the given order.
      unstructured: the sum of as many scores, the largest of each row over the channels: no order
        keeps more.
      reason: why the channels are left alone; empty if they are not.
    """

    weights: tuple[str, ...]
    axes: tuple[ChannelAxis, ...]
    size: int
    order: np.ndarray | None
    kept: float
    before: float
    unstructured: float
    reason: str


class PermuteResult(NamedTuple):
    """A model whose channels are reordered; `print` it for a table.

    Attributes:
      params: the weights.
      groups: one `ChannelGroup` for the channels of each planned N:M weight, including those that
        are left alone.
    """

    params: Any
    groups: tuple[ChannelGroup, ...]

    def __str__(self):
        import tabulate  # here, so that only printing pays for the import

        def some(names):
            return "\n".join(
                names if len(names) <= 4 else [*names[:3], f"and {len(names) - 3} more"]
            )

        rows = []
        for group in self.groups:
            followers = [
                f"{one.path} axis {one.axis} of {'x'.join(map(str, one.shape))}"
                for one in group.axes
                if one.path not in group.weights
            ]
            top = group.unstructured
            shares = ("", "") if group.order is None else (group.before / top, group.kept / top)
            rows.append((some(group.weights), some(followers), group.size, *shares, group.reason))
        header = (
            "n:m weights",
            "also reordered",
            "channels",
            "before",
            "after",
            "left alone because",
        )
        done = sum(group.order is not None for group in self.groups)
        table = tabulate.tabulate(
            rows, header, floatfmt=".4f", disable_numparse=[0, 1, 5] if rows else True
        )
        return (
            f"{table}\n{done} of {len(rows)} groups of channels are reordered. Before and after: "
            "the scores that n:m keeps,\nas a share of those that unstructured sparsity of the "
            "same density keeps in each row."
        )


def permute(
    fn: Callable,
    params: PyTree,
    plan: Plan,
    *args: Any,
    scores: PyTree | None = None,
    rounds: int = 100,
    seconds: float = math.inf,
    seed: int = 0,
    progress: Callable[[str], Any] = lambda path: None,
) -> PermuteResult:
    """Reorders the channels of a model so that n:m keeps more, without changing its function.

    `fn` is traced, and its program shows which axes of the parameters run over the same channels:
    the outputs of one weight, its bias, the scales and biases of norms, and the axes of the weights
    that sum over these channels. Where the n:m groups of planned weights run over channels,
    `column_order` searches for an order of them; weights that sum over the same channels share it.
    Channels that residual sums join have one order for all layers. Layers that `lax.scan` stacks,
    experts and heads get separate orders where their channels are separate.

    Channels are left alone if their order matters to the program: those of arguments and outputs,
    and those that are cut, joined, looked up, counted, or used by an operation that is not
    followed. The result gives the reason.

    `fn` is run on `args` before and after, with products in the highest precision. All uses of
    `params` must be in `fn`: another function of them may not stay the same.

    Args:
      fn: a function of the parameters and the data, such as `model.apply`.
      params: pytree of trained weights, with the statistics of norms if the model has any.
      plan: which leaf follows which pattern; n:m leaves along one axis decide the orders.
      *args: what `fn` takes after the parameters; all leaves are arrays.
      scores: pytree of the structure of `params` with the scores whose sum is to be kept, finite
        and not negative; magnitudes unless given.
      rounds: the number of rounds of each search, as in `column_order`.
      seconds: the time for all searches, which share it evenly.
      seed: of the searches.
      progress: called with the path of each weight whose groups are found, for a progress bar.

    Returns:
      A `PermuteResult`: the weights, and for each group of channels the order and what it keeps.

    Raises:
      TypeError: `fn` is not callable, `plan` is not a plan, an argument is not an array, or
        `rounds` or `seed` is not an integer.
      ValueError: `params` do not match the plan; the plan has no n:m leaf; the parameters or the
        arguments are traced or abstract; the scores do not match or are not finite; `fn` returns
        NaN, so that its outputs cannot be compared.
      RuntimeError: an output differs after the reordering, relative to its largest value, by more
        than the square root of the machine epsilon of the coarsest type in the program; integers
        and booleans must be equal.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxsparse as js
      >>> def model(params, x):
      ...     hidden = jax.nn.silu(x @ params["gate"]) * (x @ params["up"])
      ...     return hidden @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> shapes = {"gate": (16, 64), "up": (16, 64), "down": (64, 16)}
      >>> params = {name: jax.random.normal(key, shape)
      ...           for key, (name, shape) in zip(keys[1:], shapes.items(), strict=True)}
      >>> x = jax.random.normal(keys[0], (8, 16))
      >>> plan = js.plan(params, {"*": "2:4"}, model, x)
      >>> result = js.permute(model, params, plan, x)
      >>> bool(jnp.allclose(model(result.params, x), model(params, x), rtol=1e-4, atol=1e-3))
      True
      >>> group = result.groups[0]
      >>> [(one.path, one.axis) for one in group.axes]
      [('down', 0), ('gate', 1), ('up', 1)]
      >>> group.kept > group.before
      True
      >>> result.groups[1].reason
      'an argument of the function has them'

    References:
      Pool and Yu, Channel Permutations for N:M Sparsity (NeurIPS 2021), section 3; Mishra et al.,
      Accelerating Sparse Deep Neural Networks, section 4.1 (arXiv:2104.08378).
    """
    if not callable(fn):
        raise TypeError(
            f"permute: `fn` is a {type(fn).__name__}, not a function. Pass the function that runs "
            "the model."
        )
    planned = match(plan, params, "permute")
    rounds = _checks.integer(rounds, "permute: `rounds`")
    seed = _checks.integer(seed, "permute: `seed`")
    leaves, structure = jax.tree.flatten(params)
    paths = leaf_paths(params)
    patterns = [leaf.pattern if leaf else None for leaf in planned]
    _check_concrete(leaves, args)
    wanted = {
        i: axes_in(pattern, jnp.ndim(leaves[i]))[0]
        for i, pattern in enumerate(patterns)
        if pattern and len(pattern.groups) == 1
    }
    if not wanted:
        raise ValueError(
            "permute: the plan has no leaf under N:M along one axis, which an order of channels "
            'would help. Plan some as "2:4".'
        )
    ranked = _checked_scores(leaves, structure, scores, paths, wanted)
    try:
        with jax.default_matmul_precision("highest"):
            program = jax.make_jaxpr(fn)(params, *args)
    except Exception as error:
        error.add_note("permute: this is the error of `fn`, called with `params` and `args`.")
        raise
    run, data = jax.jit(jaxpr_as_fun(program)), jax.tree.leaves(args)
    before = _outputs(run(*leaves, *data))
    if any(np.isnan(output).any() for output in before):
        raise ValueError(
            "permute: `fn` returns NaN for these arguments, so its outputs cannot be compared. "
            "Pass data for which it returns numbers."
        )

    shared, epsilon = channels(program, [jnp.shape(leaf) for leaf in leaves], wanted.items())
    shared = [
        one._replace(reason=one.reason or _unsuitable(one, leaves, paths, patterns))
        for one in shared
    ]
    left = sum(not one.reason for one in shared)
    end = time.monotonic() + seconds
    groups = []
    for one in shared:
        weights = one.wanted
        order, sums = None, (math.nan,) * 3
        if not one.reason:
            ((n, m),) = cast(Pattern, patterns[weights[0].leaf]).groups
            share = (end - time.monotonic()) / left
            matrices = [_rows(ranked[place.leaf], place) for place in weights]
            order, sums = _search(
                np.concatenate(matrices, -2), n, m, rounds=rounds, seconds=share, seed=seed
            )
            left -= 1
            for place in one.places:
                leaves[place.leaf] = _reordered(leaves[place.leaf], place, order)
        names = tuple(paths[place.leaf] for place in weights)
        axes = tuple(
            ChannelAxis(paths[place.leaf], place.shape, place.axis, place.stack)
            for place in one.places
        )
        size = weights[0].shape[weights[0].axis]
        groups.append(ChannelGroup(names, axes, size, order, *sums, one.reason))
        for path in names:
            progress(path)
    _check_equal(before, _outputs(run(*leaves, *data)), epsilon)
    return PermuteResult(jax.tree.unflatten(structure, leaves), tuple(groups))


def _check_concrete(leaves: Sequence, args: tuple) -> None:
    """Checks that the arguments are arrays, and nothing is abstract."""
    for path, leaf in jax.tree.leaves_with_path(args):
        if not is_array(leaf):
            raise TypeError(
                f"permute: argument {jax.tree_util.keystr(path)} of `fn` is a "
                f"{type(leaf).__name__}, not an array. Bind it with functools.partial."
            )
    abstract = jax.core.Tracer | jax.ShapeDtypeStruct
    if any(isinstance(leaf, abstract) for leaf in (*leaves, *jax.tree.leaves(args))):
        raise ValueError(
            "permute: the parameters or the arguments are traced or abstract, but the search takes "
            "concrete ones. Call it outside of jit, vmap and grad."
        )


def _checked_scores(
    leaves: Sequence, structure: Any, scores: PyTree, paths: Sequence[str], wanted: Any
) -> dict[int, np.ndarray]:
    """The scores of the leaves that decide orders, by the index of the leaf."""
    given = leaves
    if scores is not None:
        given, scored = jax.tree.flatten(scores)
        if scored != structure:
            raise ValueError(
                f"permute: `scores` have the structure {scored}, but `params` have {structure}. "
                "Pass one array for each leaf of `params`."
            )
    ranked = {}
    for i in wanted:
        array = np.asarray(given[i], np.float32)
        if array.shape != jnp.shape(leaves[i]):
            raise ValueError(
                f"permute: the scores of {paths[i]} have shape {array.shape}, but the leaf has "
                f"{jnp.shape(leaves[i])}. Pass one score for each weight."
            )
        if not np.isfinite(array).all() or (scores is not None and (array < 0).any()):
            what = "the weight" if scores is None else "its scores"
            raise ValueError(
                f"permute: {paths[i]}: {what} must be finite"
                f"{'' if scores is None else ' and not negative'}. Pass such values."
            )
        ranked[i] = np.abs(array)
    return ranked


def _unsuitable(
    shared: Channels, leaves: Sequence, paths: Sequence[str], patterns: Sequence[Pattern | None]
) -> str:
    """Why the patterns of the weights with these channels rule out an order, or nothing."""
    kinds = set()
    for place in shared.places:
        pattern = patterns[place.leaf]
        if pattern and place.whole in axes_in(pattern, jnp.ndim(leaves[place.leaf])):
            if len(pattern.groups) != 1:
                return f"{paths[place.leaf]} is planned as {pattern}, which an order would break up"
            if place not in shared.wanted:
                return f"they are parts of the axis of {paths[place.leaf]}, around its groups"
            kinds |= {pattern.groups[0]}
    if len(kinds) > 1:
        return f"their weights are planned as {' and '.join(f'{n}:{m}' for n, m in sorted(kinds))}"
    ((_, m),), first = kinds, shared.wanted[0]
    size = first.shape[first.axis]
    return f"groups of {m} span parts of {size} that a reshape splits off" if size % m else ""


def _rows(scores: np.ndarray, place: Place) -> np.ndarray:
    """The scores as matrices `[*stack, rows, channels]`."""
    stack = [place.shape[axis] for axis in place.stack]
    split = scores.reshape(place.shape)
    first = np.moveaxis(split, (*place.stack, place.axis), (*range(len(stack)), -1))
    return first.reshape(*stack, -1, place.shape[place.axis])


def _search(matrices: np.ndarray, n: int, m: int, *, seconds: float, **options: Any) -> Any:
    """The order of the columns of each matrix, and the sums that it keeps."""
    *stack, _, k = matrices.shape
    order, sums = np.empty((*stack, k), int), np.zeros(3)
    end = time.monotonic() + seconds
    for i, index in enumerate(np.ndindex(*stack)):
        share = (end - time.monotonic()) / (math.prod(stack) - i)
        best = column_order(matrices[index], n, m, seconds=share, **options)
        order[index] = best.order
        sums += (best.kept, best.before, best.unstructured)
    return order, sums.tolist()


def _reordered(leaf: Any, place: Place, order: np.ndarray) -> Any:
    """A leaf with its channels in another order."""
    axes = (*place.stack, place.axis)
    shape = [n if axis in axes else 1 for axis, n in enumerate(place.shape)]
    index = order.transpose(np.argsort(axes)).reshape(shape)
    numpy = np if isinstance(leaf, np.ndarray) else jnp
    split = leaf.reshape(place.shape)
    return numpy.take_along_axis(split, index, place.axis).reshape(leaf.shape)


def _outputs(arrays: Sequence[jax.Array]) -> list[np.ndarray]:
    """The outputs of a program, those of floating point in the widest types."""

    def wide(array):
        if jnp.issubdtype(array.dtype, jax.dtypes.extended):
            array = jax.random.key_data(array)
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            return np.asarray(array)
        complex_ = jnp.issubdtype(array.dtype, jnp.complexfloating)
        return np.asarray(array).astype(np.complex128 if complex_ else np.float64)

    return list(map(wide, arrays))


def _check_equal(before: list[np.ndarray], after: list[np.ndarray], epsilon: float) -> None:
    """Checks that the outputs of a program are the same up to rounding."""
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        difference = _difference(old, new)
        if not difference <= math.sqrt(epsilon):
            raise RuntimeError(
                f"permute: output {i} of `fn` differs by {difference:.2g} of its largest value "
                "after the channels were reordered, so the result is not returned. If `fn` "
                "computes the same at each call, and does not turn rounding into integers as "
                "argmax does, this is an error of the library: leave out of the plan the weights "
                "that cause it."
            )


def _difference(old: np.ndarray, new: np.ndarray) -> float:
    """The largest difference, relative to the largest finite value; infinite if others differ."""
    if not np.issubdtype(old.dtype, np.inexact):
        return 0.0 if np.array_equal(old, new) else math.inf
    finite = np.isfinite(old)
    if not np.array_equal(old[~finite], new[~finite]):
        return math.inf
    error = float(np.abs(new[finite] - old[finite]).max(initial=0))
    scale = float(np.abs(old[finite]).max(initial=0))
    return error / scale if scale else math.inf if error else 0.0
