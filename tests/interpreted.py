"""The kernels on a CPU, in the GPU interpret mode of Pallas, with arithmetic on arrays in place of their register-level blocks."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxsparse import layouts
from jaxsparse.compress import expand
from jaxsparse.kernels import ampere, decode, hopper


def dense(values, metadata):
    """Values `[64 * r, 32 * c]` and metadata `[r, c, 128]` to the weight `[64 * r, 64 * c]`; `[64, 32]` and `[1, 1, 128]` at the least."""
    return expand(values, layouts.untile(metadata, values.shape[0], values.shape[1] // 8))


def hopper_ops(config, values_tiling, x_tiling):
    def step(total, values, x, metadata):
        return total + jnp.dot(dense(values[...], metadata[...]), x[...].T, preferred_element_type=jnp.float32)

    return hopper.Ops(lambda: jnp.zeros((64, config.tile_n), jnp.float32), step, lambda total: total, lambda result: result)


def ampere_ops(config):
    def fetch(source, target):
        target[...] = source[...]

    def step(total, values, x, metadata):
        return total + jnp.dot(dense(values[...], metadata[...][:, None]), x[...].T, preferred_element_type=jnp.float32)

    def store(tile, y):
        y[...] = tile[...]

    return ampere.Ops(fetch, lambda pending: None, step, lambda: None, store)


def decode_ops(config, n, has_bias):
    def step(total, values_ref, x_ref, metadata_ref, m0, i):
        rows, k = x_ref.shape
        m0, i = m0[0], i[0]
        x, metadata = x_ref[...], metadata_ref[...]
        x = jnp.pad(x, ((0, n - rows), (0, 0)))
        weight = expand(values_ref[...], layouts.untile(metadata, values_ref.shape[0], k // 16))
        weight = lax.dynamic_slice_in_dim(weight, m0, config.tile_m).reshape(config.tile_m // 16, 16, k)
        owner = jnp.arange(k) // decode.TILE_K
        parts = []
        for warp in range(decode.WARPS):
            ours = (owner // (4 * config.unroll) == i) & (owner % 4 == warp)
            parts.append(jnp.einsum("pmk,nk->pmn", weight * ours, x, preferred_element_type=jnp.float32))
        return total + jnp.stack(parts, 1).reshape(total.shape)

    def reduce(total, scratch, *rest):
        *bias, m0 = rest
        scratch[...] = total
        sums = scratch[...].reshape(config.tile_m // 16, decode.WARPS, 16, n).sum(1).reshape(config.tile_m, n)
        return (sums + bias[0][pl.ds(m0[0], config.tile_m)][:, None] if has_bias else sums).T

    def store(result, y, m0):
        y[:, pl.ds(m0[0], config.tile_m)] = result[: y.shape[0]]

    return decode.Ops(step, reduce, store)


def params():
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax 0.11 does not export it

    return {"interpret": InterpretGPUParams()}
