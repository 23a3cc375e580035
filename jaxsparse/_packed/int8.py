"""Weights and activations of 8 bits: their scales, their rounding and their products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from jaxsparse._checks import AnArray
from jaxsparse._packed.sparse24 import Sparse24

__all__ = ["input_scales", "scaled_product", "to_int8"]

MOST = 127  # symmetric: -128 is not used


def to_int8(w: Sparse24) -> Sparse24:
    """Rounds the values of a weight to int8, with one scale for each output."""
    dtype = w.dtype if w.dtype.itemsize > 1 else jnp.dtype(jnp.float32)
    wide = dtype if dtype.itemsize > 4 else jnp.dtype(jnp.float32)
    values = w.values.astype(wide)
    exact = jnp.abs(values).max(-1) / MOST
    # rounded up to the dtype, so that no weight is clipped
    scale = exact.astype(dtype)
    scale = jnp.where(
        scale.astype(wide) < exact, jnp.nextafter(scale, jnp.full((), jnp.inf, dtype)), scale
    )
    scale = _without_zeros(scale)
    return Sparse24(
        _rounded(values, scale[..., None].astype(wide)),
        w.with_layout("canonical").metadata,
        w.contracting,
        w.output,
        w.kinds,
        transposable=w.transposable,
        scale=scale,
        activations="float",
    )


def input_scales(most: Float[AnArray, "*shape"]) -> Float[Array, "*shape"]:
    """The scales under which magnitudes up to `most` are rounded to int8."""
    return _without_zeros(most / MOST)


def scaled_product(
    multiply: Callable, x: Float[AnArray, "*stack N K"], w: Sparse24, dtype: Any
) -> Float[Array, "*stack N M"]:
    """The product of x with a weight of int8, in `dtype`.

    `multiply(x, values, metadata, out_dtype=)` multiplies by values without a scale.
    """
    if w.activations == "float":
        y = multiply(x, w.values, w.metadata, out_dtype=dtype)
    else:
        y = _integer_product(multiply, x.astype(dtype), w, dtype)
    return y * w.scale[..., None, :].astype(dtype)


def _integer_product(multiply, x, w, dtype):
    """The product with x rounded to int8, differentiable as if x were not rounded."""
    if w.activations == "token":
        scale = input_scales(lax.stop_gradient(jnp.abs(x).max(-1, keepdims=True)))
    else:
        scale = lax.stop_gradient(w.input_scale[..., None, None].astype(dtype))

    @jax.custom_jvp
    def product(x, values, metadata, scale):
        sums = multiply(
            _rounded(x, scale), values, metadata, out_dtype=jnp.dtype(jnp.int32), precision=None
        )
        return sums.astype(dtype) * scale

    @product.defjvp
    def _(primals, tangents):
        _, values, metadata, _ = primals
        return product(*primals), multiply(tangents[0], values, metadata, out_dtype=dtype)

    return product(x, w.values, w.metadata, scale)


def _rounded(x: Float[AnArray, "..."], scale: Float[AnArray, "..."]) -> Int8[Array, "..."]:
    """The nearest multiples of a scale, ties to the even ones, clipped."""
    return jnp.clip(jnp.round(x / scale), -MOST, MOST).astype(jnp.int8)


def _without_zeros(scale):
    return jnp.where(scale == 0, jnp.ones((), scale.dtype), scale)
