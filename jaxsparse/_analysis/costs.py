"""Costs of a traced program: FLOPs of its products and bytes of its weights, dense and sparse."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import PyTree

from jaxsparse._plan.paths import leaf_paths
from jaxsparse._plan.pattern import Pattern
from jaxsparse._plan.plan import Plan, match
from jaxsparse._program.flow import Value, dots, input_value, is_looked_up
from jaxsparse._program.walk import open_program, walk

__all__ = ["Costs", "LeafCosts", "costs"]


class LeafCosts(NamedTuple):
    """The costs of one weight: the FLOPs of its products, and its bytes.

    Attributes:
      path: the path of the weight; empty for the rest of the program and of the parameters.
      shape: the shape of the weight; for the rest, the number of parameters.
      pattern: the pattern of the weight; None where it is dense.
      forward: the FLOPs of its products in inference, if it were dense.
      both: the FLOPs of its products in training, forward and backward, if it were dense.
      nbytes: its bytes, if it were dense.
    """

    path: str
    shape: tuple[int, ...]
    pattern: Pattern | None
    forward: int
    both: int
    nbytes: int

    @property
    def density(self) -> float:
        """The fraction of its weights that participate."""
        return self.pattern.density if self.pattern else 1.0

    @property
    def inference_flops(self) -> float:
        """The FLOPs of its products in inference."""
        return self.forward * self.density

    @property
    def training_flops(self) -> float:
        """The FLOPs of its products in one training step."""
        return self.both * self.density

    @property
    def inference_bytes(self) -> float:
        """The bytes of its participating weights and of their places."""
        places = self.pattern.place_bits(self.shape) if self.pattern else 0
        return self.nbytes * self.density + places / 8

    @property
    def training_bytes(self) -> float:
        """The bytes of all its weights and of their mask."""
        return self.nbytes + (math.prod(self.shape) / 8 if self.pattern else 0)


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of a model, by weight and in total; `print` them for a table.

    Attributes:
      leaves: one `LeafCosts` for each weight that is sparse or used by a product, in tree order,
        and one for the rest: the products without a weight (in training also those that compute the
        gradients of weights) and the bytes of the other parameters.
    """

    leaves: tuple[LeafCosts, ...]

    @property
    def inference_flops(self) -> float:
        """The FLOPs of one forward pass."""
        return sum(leaf.inference_flops for leaf in self.leaves)

    @property
    def training_flops(self) -> float:
        """The FLOPs of one forward and backward pass."""
        return sum(leaf.training_flops for leaf in self.leaves)

    @property
    def inference_bytes(self) -> float:
        """The bytes of the parameters with the sparse ones compressed."""
        return sum(leaf.inference_bytes for leaf in self.leaves)

    @property
    def training_bytes(self) -> float:
        """The bytes of the parameters and masks."""
        return sum(leaf.training_bytes for leaf in self.leaves)

    @property
    def dense(self) -> "Costs":
        """The same model without sparsity."""
        return Costs(tuple(leaf._replace(pattern=None) for leaf in self.leaves))

    def __str__(self):
        import tabulate  # here, so that only printing pays for the import

        def numbers(cost):
            flops, dense = (
                (cost.inference_flops, cost.training_flops),
                (cost.dense.inference_flops, cost.dense.training_flops),
            )
            return (
                flops[0] / 1e9,
                dense[0] / 1e9,
                flops[1] / 1e9,
                dense[1] / 1e9,
                cost.inference_bytes / 1e6,
                cost.dense.inference_bytes / 1e6,
            )

        header = (
            "leaf",
            "pattern",
            "inference GFLOPs",
            "dense",
            "training GFLOPs",
            "dense",
            "weights MB",
            "dense",
        )
        rows = [
            (leaf.path or "the rest", leaf.pattern or "dense", *numbers(Costs((leaf,))))
            for leaf in self.leaves
        ]
        return tabulate.tabulate(
            [*rows, ("all", "", *numbers(self))], header, floatfmt=".4g", disable_numparse=[0, 1]
        )


def costs(fn: Callable, plan: Plan, params: PyTree, *args: Any) -> Costs:
    """Counts the FLOPs and bytes of a model in inference and training, dense and under a plan.

    The programs of `fn` and of its gradient with respect to the parameters are traced abstractly.
    Their matrix products and convolutions are counted, with two FLOPs for each multiply-add: under
    `scan` once for each iteration, under `remat` again where they are recomputed, and in a `cond`
    those of the costlier branch. The window of a convolution counts in full, as is customary, even
    where it covers padding; zeros that dilate an input do not count. Products with a sparse weight,
    forward and backward, count at its density, whether or not hardware skips the other weights.
    Gradients of weights count in full, since all weights learn. Elementwise operations, masks and
    the optimizer are not counted.

    In inference a sparse weight takes its participating values and their places. `NM` and
    `TransposableNM` need, for each value, the bits that select one of m places; for 2:4 that is the
    size of `Sparse24` without the filler in its last words. `Unstructured` needs one bit a weight,
    and `Block` one bit a block. In training a sparse weight takes all of its values and one bit of
    mask for each. Gradients and the optimizer state are the same as in the dense model and are left
    out.

    Args:
      fn: the model, a function of (params, *args), such as `model.apply` of Flax. Its output is any
        pytree; the gradient is that of the sum of its elements. It may mask its weights with
        `effective_weight` or `jnp.where`; that does not change the costs. Use `functools.partial`
        to bind non-array arguments.
      plan: which leaf follows which pattern. A density that follows a schedule counts with its last
        value.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      *args: the other arguments of `fn`, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The costs, by weight. A product belongs to the weight that reaches it through casts, reshapes,
      transpositions, slices and masks, and to the sparser of two weights. A sparse weight that is
      used in any other way shows 0.

    Raises:
      TypeError: `plan` is not a plan.
      ValueError: `params` do not match the plan; or the program has products that cannot be
        counted: in a `while` loop, whose length is unknown, in a `shard_map` or a hand-written
        kernel, or of an unknown kind.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params = {"w": jnp.zeros((64, 32), jnp.bfloat16), "b": jnp.zeros(32, jnp.bfloat16)}
      >>> plan, x = js.plan(params, {"w": js.NM(2, 4, axis=0)}), jnp.zeros((10, 64), jnp.bfloat16)
      >>> model = lambda params, x: x @ params["w"] + params["b"][None]
      >>> cost = js.analysis.costs(model, plan, params, x)
      >>> cost.inference_flops, cost.dense.inference_flops  # 2 * 10 * 64 * 32, halved
      (20480.0, 40960.0)
      >>> cost.training_flops  # and the gradient of w, which is dense
      61440.0
      >>> cost.inference_bytes, cost.training_bytes
      (2368.0, 4416.0)

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers,
      appendix D (arXiv:2402.04744).
    """
    sparse = match(plan, params, "costs")
    densities = [leaf.density if leaf else 1.0 for leaf in sparse]

    def train(params, *args):
        out, pull = jax.vjp(lambda params: fn(params, *args), params)
        return out, pull(jax.tree.map(_cotangent, out))

    def count(program):
        jaxpr, fold = jax.make_jaxpr(program)(params, *args).jaxpr, _Flops(densities)
        weights = [
            input_value(i, jnp.shape(leaf)) for i, leaf in enumerate(jax.tree.leaves(params))
        ]
        walk(jaxpr, [*weights, *[Value()] * (len(jaxpr.invars) - len(weights))], fold)
        return fold.flops

    forward, both = count(fn), count(train)
    leaves, rest = [], LeafCosts("", (0,), None, forward[None], both[None], 0)
    for i, (path, leaf, planned) in enumerate(
        zip(leaf_paths(params), jax.tree.leaves(params), sparse, strict=True)
    ):
        size, nbytes = (
            math.prod(jnp.shape(leaf)),
            math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize,
        )
        if planned or both[i]:
            leaves.append(
                LeafCosts(
                    path,
                    jnp.shape(leaf),
                    planned.pattern if planned else None,
                    forward[i],
                    both[i],
                    nbytes,
                )
            )
        else:
            rest = rest._replace(shape=(rest.shape[0] + size,), nbytes=rest.nbytes + nbytes)
    return Costs((*leaves, rest))


def _cotangent(out):
    inexact = jnp.issubdtype(jnp.result_type(out), jnp.inexact)
    return jnp.ones_like(out) if inexact else np.zeros(jnp.shape(out), jax.dtypes.float0)


Flops = collections.Counter[int | None]


class _Flops:
    """The fold that counts the FLOPs of each weight's products."""

    def __init__(self, densities: Sequence[float]):
        self.densities = densities
        self.flops = Flops()

    def visit(self, eqn: Any, values: list[Value], outputs: list[Value]) -> None:
        name = eqn.primitive.name
        if name in _PRODUCTS:
            shares = [
                {origin.source: origin.share for origin in value.origins} for value in values[:2]
            ]
            if name == "dot_general":  # rows looked up in a table are an input, not a weight
                pairs = zip(dots(eqn), (values[1], values[0]), strict=True)
                shares = [
                    {
                        origin.source: origin.share
                        for origin in values[i].origins
                        if not is_looked_up(origin, summed, free, other)
                    }
                    for (i, summed, _, free), other in pairs
                ]
            owners = min(
                filter(None, shares),
                key=lambda one: min(map(self.densities.__getitem__, one)),
                default={None: 1.0},
            )
            for source, share in owners.items():
                self.flops[source] += round(_PRODUCTS[name](eqn) * share / sum(owners.values()))
        elif _uncounted(eqn):
            raise ValueError(
                f"costs: the program has matrix products in `{name}`, where they cannot be "
                "counted. Pass a function that computes the same with jax.numpy, jax.lax and, for "
                "its loops, lax.scan."
            )

    def lose(self, eqn: Any, values: list[Value]) -> None:
        """Ignores these values: products with them belong to no weight."""

    def enter(self, eqn: Any) -> "_Flops":
        return _Flops(self.densities)

    def leave(self, eqn: Any, inner: "list[_Flops]") -> None:
        name = eqn.primitive.name
        counted = [one.flops for one in inner]
        if name in ("while", "shard_map") and any(counted):
            raise ValueError(
                f"costs: the program has matrix products in `{name}`, where they cannot be "
                "counted. Pass a function that computes the same with jax.numpy, jax.lax and, for "
                "its loops, lax.scan."
            )
        times = eqn.params["length"] if name == "scan" else 1
        self.flops.update(
            {source: times * flops for source, flops in max(counted, key=Flops.total).items()}
        )


def _programs(params: PyTree) -> Iterator[Jaxpr]:
    """The programs among the parameters of an equation."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, Jaxpr | ClosedJaxpr):
                yield open_program(one)


def _uncounted(eqn: Any) -> bool:
    """Whether an equation that is not a product itself contains one, or may contain one."""
    name = eqn.primitive.name
    if "dot" in name or "matmul" in name or name == "ffi_call":
        return True
    return any(
        one.primitive.name in _PRODUCTS or _uncounted(one)
        for jaxpr in _programs(eqn.params)
        for one in jaxpr.eqns
    )


def _matrix_product(eqn: Any) -> int:
    ((summed, _), _), (lhs, _) = (
        eqn.params["dimension_numbers"],
        (atom.aval.shape for atom in eqn.invars),
    )
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in summed)


def _convolution(eqn: Any) -> int:
    """The FLOPs of a convolution.

    In each dimension, any two of input, window position and output determine the third, so the
    number of multiply-adds is at most the smallest number of pairs.
    """
    (lhs, rhs), out = (atom.aval.shape for atom in eqn.invars), eqn.outvars[0].aval.shape
    numbers = eqn.params["dimension_numbers"]
    (_, _, *inputs), (_, channels, *window), (batch, features, *outputs) = (
        numbers.lhs_spec,
        numbers.rhs_spec,
        numbers.out_spec,
    )
    multiply_adds = (
        math.prod(sorted((lhs[i], rhs[k], out[o]))[:2])
        for i, k, o in zip(inputs, window, outputs, strict=True)
    )
    return 2 * out[batch] * out[features] * rhs[channels] * math.prod(multiply_adds)


def _ragged_product(eqn: Any) -> int:
    """The FLOPs of a ragged product, where every left row meets the matrix of its group."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (summed, _), _ = numbers.dot_dimension_numbers
    lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    # the gradient of the groups' matrices: each row counts in one group only
    summed_groups = set(numbers.lhs_ragged_dimensions) & set(summed)
    groups = out[0] if summed_groups else 1
    return 2 * math.prod(out) * math.prod(lhs[axis] for axis in summed) // groups


_PRODUCTS = {
    "dot_general": _matrix_product,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged_product,
}
