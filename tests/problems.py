"""Integer problems whose products are exact in every kernel."""

import jax.numpy as jnp
import lanes
import numpy as np

import jaxsparse as js


def problem(n, m, k, dtype=jnp.bfloat16, layout="mma16", seed=0):
    """x `[n, k]`, a packed weight, a float32 bias and the exact product without it."""
    rng = np.random.default_rng(seed)
    mask, weights = lanes.prune(rng, m, k)
    plan = js.plan({"w": jnp.zeros((k, m))}, {"w": js.NM(2, 4, axis=0)})
    packed = js.compress(
        {"w": jnp.asarray(weights.T, dtype)}, {"w": jnp.asarray(mask.T)}, plan, layout=layout
    )["w"]
    x = rng.integers(-4, 5, (n, k)).astype(np.float32)
    bias = rng.integers(-9, 10, m).astype(np.float32)
    return jnp.asarray(x, dtype), packed, bias, x @ (weights * mask).T
