"""Gemma in Linen: custom `Einsum` modules, grouped-query attention, rotary positions.

It has a gated MLP and a tied embedding.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.entry import Along, Model, in_layers, linen, tokens

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, HIDDEN, LAYERS = 20, 16, 4, 2, 8, 24, 2


def rotate(x, positions):
    """Rotary positions for `[B, T, N, H]`."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] / 10_000 ** (jnp.arange(half) / half)
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def soft_cap(x, cap):
    return jnp.tanh(x / cap) * cap


class Einsum(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        w = self.param("w", nn.initializers.normal(), self.shape)
        return jnp.einsum(equation, x, w)


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],))
        normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return normed * (1 + scale)


class Embedder(nn.Module):
    def setup(self):
        self.input_embedding = self.param(
            "input_embedding", nn.initializers.normal(), (VOCABULARY, WIDTH)
        )

    def encode(self, ids):
        return self.input_embedding[(ids,)] * jnp.sqrt(WIDTH).astype(jnp.float32)

    def decode(self, x):
        return jnp.dot(x, self.input_embedding.T)


class Attention(nn.Module):
    kv_heads: int = KV_HEADS
    qk_norm: bool = False

    def setup(self):
        if self.kv_heads == HEADS:
            self.qkv_einsum = Einsum((3, HEADS, WIDTH, HEAD_WIDTH))
        else:
            self.q_einsum = Einsum((HEADS, WIDTH, HEAD_WIDTH))
            self.kv_einsum = Einsum((2, self.kv_heads, WIDTH, HEAD_WIDTH))
        self.attn_vec_einsum = Einsum((HEADS, HEAD_WIDTH, WIDTH))
        if self.qk_norm:
            self.query_norm = RMSNorm()
            self.key_norm = RMSNorm()

    def __call__(self, x, positions, mask):
        if self.kv_heads == HEADS:
            q, k, v = self.qkv_einsum("BTD,SNDH->SBTNH", x)
        else:
            q = self.q_einsum("BTD,NDH->BTNH", x)
            k, v = self.kv_einsum("BSD,CKDH->CBSKH", x)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, positions) * HEAD_WIDTH**-0.5, rotate(k, positions)
        batch, length, *_ = q.shape
        q = q.reshape(batch, length, self.kv_heads, HEADS // self.kv_heads, HEAD_WIDTH)
        logits = soft_cap(jnp.einsum("BTKGH,BSKH->BTKGS", q, k), 50.0)
        probabilities = nn.softmax(jnp.where(mask[:, :, None, None, :], logits, -2e38))
        encoded = jnp.einsum("BTKGS,BSKH->BTKGH", probabilities, v).reshape(
            batch, length, HEADS, HEAD_WIDTH
        )
        return self.attn_vec_einsum("BTNH,NHD->BTD", encoded)


class FeedForward(nn.Module):
    transposed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal()
        if self.transposed:
            w = self.param("gating_einsum", init, (2, HIDDEN, WIDTH))
            gates = jnp.einsum("...F,NHF->...NH", x, w)
            gated = nn.gelu(gates[..., 0, :]) * gates[..., 1, :]
        else:
            w = self.param("gating_einsum", init, (2, WIDTH, HIDDEN))
            gated = nn.gelu(jnp.dot(x, w[0])) * jnp.dot(x, w[1])
        return jnp.dot(gated, self.param("linear", init, (HIDDEN, WIDTH)))


class Block(nn.Module):
    kv_heads: int = KV_HEADS
    qk_norm: bool = False
    transposed: bool = False

    def setup(self):
        self.pre_attention_norm = RMSNorm()
        self.attn = Attention(self.kv_heads, self.qk_norm)
        self.pre_ffw_norm = RMSNorm()
        self.mlp = FeedForward(self.transposed)

    def __call__(self, x, positions, mask):
        x = x + self.attn(self.pre_attention_norm(x), positions, mask)
        return x + self.mlp(self.pre_ffw_norm(x)), None


class Gemma(nn.Module):
    scan: bool = False
    kv_heads: int = KV_HEADS
    qk_norm: bool = False
    transposed: bool = False

    @nn.compact
    def __call__(self, ids):
        embedder = Embedder(name="embedder")
        x = embedder.encode(ids)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        mask = jnp.tril(jnp.ones((1, ids.shape[1], ids.shape[1]), bool))
        options = {
            "kv_heads": self.kv_heads,
            "qk_norm": self.qk_norm,
            "transposed": self.transposed,
        }
        if self.scan:
            block = nn.remat(
                Block, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable
            )
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=LAYERS,
            )
            x, _ = layers(**options, name="layers")(x, positions, mask)
        else:
            for i in range(LAYERS):
                x, _ = Block(**options, name=f"layer_{i}")(x, positions, mask)
        return soft_cap(embedder.decode(RMSNorm(name="final_norm")(x)), 30.0)


def gemma(**options):
    return linen(Gemma(**options), tokens(2, 6, below=VOCABULARY))


MODELS = {
    "Gemma, unrolled": Model(
        gemma,
        in_layers(
            "layer_{}",
            {
                "attn/q_einsum/w": Along(-2),
                "attn/kv_einsum/w": Along(-2),
                "attn/attn_vec_einsum/w": Along(-2, summed=(-3, -2)),
                "mlp/gating_einsum": Along(-2, stack=(-3,)),
                "mlp/linear": Along(-2),
            },
        ),
        products=2 * 6,
    ),
    "Gemma, scan of remat": Model(
        lambda: gemma(scan=True),
        {
            "layers/attn/q_einsum/w": Along(-2, stack=(-4,)),
            "layers/attn/kv_einsum/w": Along(-2, stack=(-5,)),
            "layers/attn/attn_vec_einsum/w": Along(-2, stack=(-4,), summed=(-3, -2)),
            "layers/mlp/gating_einsum": Along(-2, stack=(-4, -3)),
            "layers/mlp/linear": Along(-2, stack=(-3,)),
        },
        products=6,
    ),
    "Gemma 3, transposed gates": Model(
        lambda: gemma(kv_heads=HEADS, qk_norm=True, transposed=True),
        in_layers(
            "layer_{}",
            {
                "attn/qkv_einsum/w": Along(-2),
                "attn/attn_vec_einsum/w": Along(-2, summed=(-3, -2)),
                "mlp/gating_einsum": Along(-1),
                "mlp/linear": Along(-2),
            },
        ),
        products=2 * 4,
    ),
}
