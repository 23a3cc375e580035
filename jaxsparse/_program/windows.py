"""The windows of the input of a convolution, as the rows of a matrix product."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["apart", "windows"]


def apart(params: Any, shape: Sequence[int]) -> bool:
    """Whether no element of the input is in two windows of a kernel of `shape`, as for 1x1."""
    sizes = [shape[i] for i in params["dimension_numbers"].rhs_spec[2:]]
    steps = zip(sizes, params["rhs_dilation"], params["window_strides"], strict=True)
    return all((n - 1) * dilation < stride for n, dilation, stride in steps)


def windows(x: jax.Array, params: Any, shape: Sequence[int]) -> jax.Array:
    """What each place of a convolution by a kernel of `shape` sums over.

    Returns `[batch, *places, *window, features]`, for a convolution without groups.
    """
    numbers = params["dimension_numbers"]
    batch, features, *places = numbers.lhs_spec
    sizes = [shape[i] for i in numbers.rhs_spec[2:]]
    strides, dilations = params["window_strides"], params["rhs_dilation"]
    inside = zip(params["padding"], params["lhs_dilation"], strict=True)
    x = lax.pad(
        x.transpose(batch, *places, features),
        jnp.zeros((), x.dtype),
        [(0, 0, 0), *((low, high, n - 1) for (low, high), n in inside), (0, 0, 0)],
    )
    extents = [(n - 1) * dilation + 1 for n, dilation in zip(sizes, dilations, strict=True)]
    counts = [
        max((length - extent) // stride + 1, 0)
        for length, extent, stride in zip(x.shape[1:-1], extents, strides, strict=True)
    ]
    rows, ndim = (x.shape[0], *counts), len(sizes)
    if list(strides) == sizes and set(dilations) == {1}:
        x = x[(slice(None), *(slice(a * b) for a, b in zip(counts, sizes, strict=True)))]
        pairs = itertools.chain(*zip(counts, sizes, strict=True))
        x = x.reshape(rows[0], *pairs, x.shape[-1])
        return x.transpose(0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1)

    def at(offset):
        starts = [i * dilation for i, dilation in zip(offset, dilations, strict=True)]
        along = zip(starts, counts, strides, strict=True)
        parts = (slice(start, start + count * stride, stride) for start, count, stride in along)
        return x[(slice(None), *parts)]

    every = [at(offset) for offset in itertools.product(*map(range, sizes))]
    return jnp.stack(every, -2).reshape(*rows, *sizes, x.shape[-1])
