"""A Gemma in NNX as a function of its parameters; its layers in a list or in a stack.

It has einsums, grouped queries and a tied embedding.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.entry import Along, Built, Model, in_layers, random_like, tokens
from zoo.gemma import rotate

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, HIDDEN, LAYERS = 20, 16, 4, 2, 8, 24, 2


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q_einsum = nnx.Einsum("BTD,NDH->BTNH", (HEADS, WIDTH, HEAD_WIDTH), rngs=rngs)
        self.kv_einsum = nnx.Einsum("BSD,CKDH->CBSKH", (2, KV_HEADS, WIDTH, HEAD_WIDTH), rngs=rngs)
        self.out = nnx.LinearGeneral(
            (HEADS, HEAD_WIDTH), WIDTH, axis=(-2, -1), use_bias=False, rngs=rngs
        )

    def __call__(self, x):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        q = rotate(self.q_einsum(x), positions) * HEAD_WIDTH**-0.5
        k, v = self.kv_einsum(x)
        k = rotate(k, positions)
        grouped = q.reshape(*x.shape[:2], KV_HEADS, HEADS // KV_HEADS, HEAD_WIDTH)
        logits = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(causal, logits, -2e38))
        return self.out(jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(q.shape))


class FeedForward(nnx.Module):
    def __init__(self, rngs):
        self.gate_proj = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(jax.nn.gelu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.pre_attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attn = Attention(rngs)
        self.pre_ffw_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mlp = FeedForward(rngs)

    def __call__(self, x):
        x = x + self.attn(self.pre_attention_norm(x))
        return x + self.mlp(self.pre_ffw_norm(x))


class Gemma(nnx.Module):
    def __init__(self, rngs, scan):
        self.embedder = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.scan = scan
        if scan:
            self.layers = nnx.vmap(Block, in_axes=0, out_axes=0)(rngs.split(LAYERS))
        else:
            self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.final_norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, ids):
        x = self.embedder(ids) * WIDTH**0.5
        if self.scan:

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x, layer):
                return layer(x)

            x = run(x, self.layers)
        else:
            for layer in self.layers:
                x = layer(x)
        return self.embedder.attend(self.final_norm(x))


def gemma(scan):
    model = nnx.eval_shape(lambda: Gemma(nnx.Rngs(0), scan))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)

    def fn(params, ids):
        return nnx.merge(graph, params, rest)(ids)

    return Built(fn, random_like(params), (tokens(2, 6, below=VOCABULARY),))


MODELS = {
    "NNX Gemma": Model(
        lambda: gemma(scan=False),
        in_layers(
            "layers/{}",
            {
                "attn/q_einsum/kernel": Along(-2),
                "attn/kv_einsum/kernel": Along(-2),
                "attn/out/kernel": Along(-2, summed=(-3, -2)),
                "mlp/gate_proj/kernel": Along(-2),
                "mlp/up_proj/kernel": Along(-2),
                "mlp/down_proj/kernel": Along(-2),
            },
        ),
        products=2 * 6,
    ),
    "NNX Gemma, scan": Model(
        lambda: gemma(scan=True),
        {
            "layers/attn/q_einsum/kernel": Along(-2, stack=(-4,)),
            "layers/attn/kv_einsum/kernel": Along(-2, stack=(-5,)),
            "layers/attn/out/kernel": Along(-2, stack=(-4,), summed=(-3, -2)),
            "layers/mlp/gate_proj/kernel": Along(-2, stack=(-3,)),
            "layers/mlp/up_proj/kernel": Along(-2, stack=(-3,)),
            "layers/mlp/down_proj/kernel": Along(-2, stack=(-3,)),
        },
        products=6,
    ),
}
