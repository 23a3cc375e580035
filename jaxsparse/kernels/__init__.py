"""Kernels for 2:4 products, one file each, and what decides between them. Nothing here imports Pallas."""

import jax.numpy as jnp

__all__ = ["ACTIVATIONS"]

ACTIVATIONS = {  # all by one tanh, which every kernel has
    None: lambda x: x,
    "relu": lambda x: jnp.maximum(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1.0 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
    "silu": lambda x: 0.5 * x * (1.0 + jnp.tanh(0.5 * x)),
}
