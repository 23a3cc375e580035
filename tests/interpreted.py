"""The kernels on a CPU, in the GPU interpret mode of Pallas, with arithmetic on arrays in place of their register-level blocks."""

import jax.numpy as jnp

from jaxsparse import layouts
from jaxsparse.compress import expand
from jaxsparse.kernels import hopper


def dense(values, metadata):
    """Values `[64 * r, 32 * c]` and metadata `[r, c, 128]` to the weight `[64 * r, 64 * c]`; `[64, 32]` and `[1, 1, 128]` at the least."""
    return expand(values, layouts.untile(metadata, values.shape[0], values.shape[1] // 8))


def hopper_ops(config, values_tiling, x_tiling):
    def step(total, values, x, metadata):
        return total + jnp.dot(dense(values[...], metadata[...]), x[...].T, preferred_element_type=jnp.float32)

    return hopper.Ops(lambda: jnp.zeros((64, config.tile_n), jnp.float32), step, lambda total: total, lambda result: result)


def params():
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax 0.11 does not export it

    return {"interpret": InterpretGPUParams()}
