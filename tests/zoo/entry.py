"""The entries of the zoo: a model, tables about it, and random weights."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsparse as js


class Along(NamedTuple):
    """Where the groups of a weight run, read from the model's code; axes count from the end.

    Attributes:
      axis: the axis that groups run along.
      stack: the axes over separate weights.
      summed: all axes that the product sums over, where `axis` is not the only one; empty where the
        rule named the axis.
    """

    axis: int
    stack: tuple[int, ...] = ()
    summed: tuple[int, ...] | None = None


class Built(NamedTuple):
    """A model as a function: `fn(params, *args)` returns a floating array.

    Attributes:
      fn: the function.
      params: random weights.
      args: its other arguments.
      module: the Linen module that `fn` applies, if any.
      init_args: the arguments of `module.init` after the key.
    """

    fn: Callable[..., jax.Array]
    params: Any
    args: tuple
    module: Any = None
    init_args: tuple = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and its tables, which are all written by hand.

    Attributes:
      build: makes the model.
      planned: the weights that a product sums over, by path; all others stay dense.
      products: the number of products in the traced program that run from compressed weights; the
        body of a scan counts once.
      decompressed: the planned weights with a product that cannot run compressed.
      rules: the rules of the plan.
    """

    build: Callable[[], Built]
    planned: Mapping[str, Along]
    products: int
    decompressed: frozenset[str] = frozenset()
    rules: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"*": js.anywhere("2:4")})


def random_like(shapes, scale=0.4):
    """Random numbers of the given shapes and dtypes; integers and keys do not change."""
    random = np.random.default_rng(0)

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(random.normal(scale=scale, size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


def tokens(*shape, below):
    """Random token numbers."""
    return jnp.asarray(np.random.default_rng(1).integers(below, size=shape), jnp.int32)


def floats(*shape):
    """A random floating input."""
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)


def linen(module, *args):
    """A Linen model whose only collection is `params`."""
    params = random_like(jax.eval_shape(module.init, jax.random.key(0), *args))
    return Built(module.apply, params, args, module, args)


def in_layers(name, table, count=2):
    """The table of one layer repeated for `count` layers, with their numbers for `{}` in `name`."""
    return {
        f"{name.format(i)}/{path}": along for i in range(count) for path, along in table.items()
    }
