"""Times planning and tracing of a 70-billion-parameter language model, scanned and unrolled.

Nothing runs on a device.

    python benchmarks/planning.py
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax
import tabulate
import timing
from flax import linen as nn

import jaxsparse as js

WIDTH, HEADS, GROUPS, INNER, DEPTH, VOCABULARY = 8192, 64, 8, 28672, 80, 128256  # of Llama 3 70B


def rotated(x):
    """Rotary embeddings of `[batch, time, heads, width]`."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 5e5 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        def project(features, name, axis=-1):
            return nn.DenseGeneral(features, axis=axis, use_bias=False, name=name)

        h = nn.RMSNorm(name="attention_norm")(x)
        q, k, v = (
            project((n, WIDTH // HEADS), name)(h)
            for n, name in ((HEADS, "q"), (GROUPS, "k"), (GROUPS, "v"))
        )
        mixed = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x += project(WIDTH, "o", axis=(-2, -1))(mixed)
        h = nn.RMSNorm(name="mlp_norm")(x)
        return x + project(WIDTH, "down")(
            nn.silu(project(INNER, "gate")(h)) * project(INNER, "up")(h)
        ), None


class Llama(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
        if self.scanned:
            x, _ = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
            )(name="blocks")(x, None)
        else:
            for i in range(DEPTH):
                x, _ = Block(name=f"block_{i}")(x)
        return nn.Dense(VOCABULARY, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


def seconds(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def row(scanned):
    """The row of the table for one form of the model."""
    model, tokens = Llama(scanned), jax.ShapeDtypeStruct((1, 128), jnp.int32)
    plan, planning = seconds(lambda: js.flax.plan(model, {"*/kernel": "2:4"}, tokens))
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    tx = js.recipes.explore_exploit(optax.adamw(1e-3), plan)
    state, init = seconds(lambda: jax.eval_shape(tx.init, params))
    _, update = seconds(lambda: jax.make_jaxpr(tx.update)(params, state, params))

    def masked(params, state, tokens):
        with js.flax.intercept(state):
            return model.apply(params, tokens)

    _, dense = seconds(lambda: jax.make_jaxpr(lambda *args: model.apply(*args))(params, tokens))
    _, forward = seconds(lambda: jax.make_jaxpr(masked)(params, state, tokens))
    packed = jax.eval_shape(
        lambda params, state: js.compress(params, js.masks(state), plan), params, state
    )
    _, compressed = seconds(lambda: jax.make_jaxpr(js.sparsify(model.apply))(packed, tokens))
    name = "scanned" if scanned else "unrolled"
    return (name, len(plan.sparse), planning, init, update, dense, forward, compressed)


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    row(True)  # warms up, so that one-time work of the process is not counted
    rows = [row(scanned) for scanned in (True, False)]
    header = (
        "layers",
        "sparse leaves",
        "plan s",
        "init s",
        "update s",
        "dense forward s",
        "masked forward s",
        "compressed forward s",
    )
    print(tabulate.tabulate(rows, header, floatfmt=".2f"))
    timing.save("planning", header=header, rows=rows)


if __name__ == "__main__":
    main()
