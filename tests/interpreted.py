"""The kernels on a CPU, in the GPU interpret mode of Pallas.

Arithmetic on arrays replaces their register-level operations.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsparse._kernels import ampere, decode, hopper
from jaxsparse._packed import layouts
from jaxsparse._packed.sparse24 import expand


def dense(values, metadata):
    """Expands values `[64 * r, 32 * c]` and metadata `[r, c, 128]` to `[64 * r, 64 * c]`."""
    return expand(values, layouts.untile(metadata, values.shape[0], values.shape[1] // 8))


def hopper_ops(config):
    def step(total, values, x, metadata):
        return total + jnp.dot(
            dense(values[...], metadata[...]), x[...].T, preferred_element_type=jnp.float32
        )

    def turn(result, out):
        out[...] = result.T

    return hopper.Ops(
        lambda: jnp.zeros((64, config.tile_n), jnp.float32), step, lambda total: total, turn
    )


def ampere_ops(config):
    def fetch(source, target):
        target[...] = source[...]

    def step(total, values, x, metadata):
        return total + jnp.dot(
            dense(values[...], metadata[...][:, None]), x[...].T, preferred_element_type=jnp.float32
        )

    def store(tile, y):
        y[...] = tile[...]

    return ampere.Ops(fetch, lambda pending: None, step, lambda: None, store)


def decode_ops(config, n, has_bias):
    warps, share = decode.WARPS * config.warpgroups, config.tile_m // config.warpgroups

    def step(total, values_ref, x_ref, metadata_ref, m0, i):
        rows, k = x_ref.shape
        m0, i, warpgroup = m0[0], i[0], lax.axis_index("warpgroup")
        x = jnp.pad(x_ref[...], ((0, n - rows), (0, 0)))
        weight = expand(
            values_ref[...], layouts.untile(metadata_ref[...], values_ref.shape[0], -(-k // 16))
        )
        weight = jnp.pad(weight, ((0, -values_ref.shape[0] % config.tile_m), (0, 0)))
        weight = lax.dynamic_slice_in_dim(weight, m0, config.tile_m).reshape(
            config.tile_m // 16, 16, k
        )
        owner = jnp.arange(k) // decode.TILE_K
        parts = []
        for warp in range(decode.WARPS):
            ours = (owner // (warps * config.unroll) == i) & (owner % warps == 4 * warpgroup + warp)
            parts.append(
                jnp.einsum(
                    "pmk,nk->pmn",
                    jnp.where(ours[None, None], weight, 0),
                    x,
                    preferred_element_type=jnp.float32,
                )
            )
        return total + jnp.stack(parts, 1).reshape(total.shape)

    def gather(total, place, barrier):
        place[...] = total
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    def reduce(sums, *rest):
        *bias, m0 = rest
        parts = (
            sums[..., :n]
            .reshape(config.warpgroups, config.tile_m // 16, decode.WARPS, 16, n)
            .sum((0, 2))
            .reshape(config.tile_m, n)
        )
        if has_bias:
            parts = (
                parts
                + lax.dynamic_slice_in_dim(
                    jnp.pad(bias[0][...], (0, config.tile_m)), m0[0], config.tile_m
                )[:, None]
            )
        return lax.dynamic_slice_in_dim(parts, lax.axis_index("warpgroup") * share, share).T

    def store(result, y, m0):
        first = m0[0] + lax.axis_index("warpgroup") * share
        for feature in range(share):

            @pl.when(first + feature < y.shape[1])
            def _(feature=feature):
                y[:, pl.ds(first + feature, 1)] = result[: y.shape[0], feature : feature + 1]

    return decode.Ops(step, gather, reduce, store, (plgpu.Barrier(num_arrivals=config.warpgroups),))


def params():
    from jax._src.pallas.mosaic_gpu.interpret.params import (
        InterpretGPUParams,  # jax 0.11 does not export it
    )

    return {"interpret": InterpretGPUParams()}
