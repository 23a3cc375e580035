"""Sparse products that are delayed so that their kernel can fuse a bias and an activation."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from jaxsparse._execution.weights import ordered
from jaxsparse._kernels import ACTIVATIONS
from jaxsparse._packed.sparse24 import Sparse24
from jaxsparse._program.flow import Atom, Value, constant_axes
from jaxsparse._program.walk import called

__all__ = ["Product", "activation_at", "bias_of"]


@dataclasses.dataclass(frozen=True)
class Product:
    """A sparse product that is not computed yet.

    Attributes:
      multiply: computes it, given `bias` and `activation`.
      leaf: its compressed weight.
      outputs: the axes of the result that run over outputs of the weight, each with its atoms.
      bias: the bias to add, `[*output]`.
      activation: the activation to apply, as for `sparse_matmul`.
    """

    multiply: Callable
    leaf: Sparse24
    outputs: tuple[tuple[int, tuple[Atom, ...]], ...]
    bias: jax.Array | None = None
    activation: str | None = None

    def result(self) -> jax.Array:
        """Computes the product."""
        return self.multiply(bias=self.bias, activation=self.activation)


def bias_of(product: Product, eqn: Any, other: Any, value: Value) -> jax.Array | None:
    """The bias `[*output]` that an addition adds to every row of a product, or None."""
    shape = eqn.outvars[0].aval.shape
    places = dict(product.outputs)
    rows = {place for place in range(len(shape)) if place not in places}
    if jnp.ndim(other) != len(shape) or not rows <= constant_axes(value, jnp.shape(other), shape):
        return None
    bias = jnp.broadcast_to(other, shape)[
        tuple(0 if place in rows else slice(None) for place in range(len(shape)))
    ]
    return ordered(
        bias, [atom for place in sorted(places) for atom in places[place]], product.leaf
    ).reshape(product.leaf.output)


def activation_at(
    eqns: Sequence, first: int, operand: Any, readers: Mapping
) -> tuple[str, int] | None:
    """The activation that the equations from `first` on apply to `operand`, and their number.

    None if kernels do not support it. `readers` counts the readers of each value: the intermediate
    values must have no other reader, since a kernel does not return them.
    """
    for name, program in _activations(operand.aval.shape, operand.aval.dtype).items():
        window = eqns[first : first + len(program.eqns)]
        alike = dict(zip(program.invars, [operand], strict=True))
        if len(window) == len(program.eqns) and all(
            _same(a, b, alike) for a, b in zip(program.eqns, window, strict=True)
        ):
            inside = collections.Counter(
                atom for eqn in window for atom in eqn.invars if not isinstance(atom, Literal)
            )
            hidden = [operand, *(var for eqn in window[:-1] for var in eqn.outvars)]
            if all(inside[var] == readers[var] for var in hidden):
                return name, len(window)
    return None


def _same(expected: Any, eqn: Any, alike: dict) -> bool:
    """Whether an equation is the expected one; `alike` maps expected values to actual ones."""
    if expected.primitive is not eqn.primitive or len(expected.invars) != len(eqn.invars):
        return False
    for a, b in zip(expected.invars, eqn.invars, strict=True):
        if isinstance(a, Literal) != isinstance(b, Literal) or (
            a.val != b.val if isinstance(a, Literal) else alike[a] is not b
        ):
            return False
    alike.update(zip(expected.outvars, eqn.outvars, strict=True))
    program = called(expected)
    return (
        str(program) == str(called(eqn)) if program is not None else expected.params == eqn.params
    )


@functools.cache
def _activations(shape: tuple[int, ...], dtype: Any) -> dict[str, Jaxpr]:
    """The programs of the activations in `jax.nn` that kernels support."""
    spec = jax.ShapeDtypeStruct(shape, dtype)
    return {name: jax.make_jaxpr(getattr(jax.nn, name))(spec).jaxpr for name in ACTIVATIONS if name}
