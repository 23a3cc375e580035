"""The language model of Flax's lm1b example, with boxed parameters, also under a mesh."""

import functools

import jax
import numpy as np
from flax import linen as nn

from zoo.entry import Along, Model, in_layers, linen, tokens

VOCABULARY, WIDTH, HEADS, HIDDEN = 20, 16, 4, 24
LOGICAL_AXES = (
    ("embed", None),
    ("mlp", "model"),
    ("kv", "model"),
    ("heads", "model"),
    ("vocab", "model"),
    ("activation_batch", "data"),
)

dense_init, bias_init = nn.initializers.xavier_uniform(), nn.initializers.normal(1e-6)
partitioned = nn.with_logical_partitioning


def norm(name):
    zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
    return nn.LayerNorm(
        bias_init=partitioned(zeros, ("embed",)),
        scale_init=partitioned(ones, ("embed",)),
        name=name,
    )


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        wide = nn.Dense(
            HIDDEN,
            kernel_init=partitioned(dense_init, ("embed", "mlp")),
            bias_init=partitioned(bias_init, ("mlp",)),
        )
        narrow = nn.Dense(
            WIDTH,
            kernel_init=partitioned(dense_init, ("mlp", "embed")),
            bias_init=partitioned(bias_init, ("embed",)),
        )
        return narrow(nn.relu(wide(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        attention = nn.MultiHeadDotProductAttention(
            num_heads=HEADS,
            qkv_features=WIDTH,
            kernel_init=partitioned(dense_init, ("embed", "kv")),
            bias_init=partitioned(bias_init, ("kv",)),
            use_bias=False,
            deterministic=True,
        )
        x = x + attention(norm("attention_norm")(x), mask=mask)
        return x + Mlp()(norm("mlp_norm")(x))


def sinusoids(length, width):
    angles = np.arange(length)[:, None] / 10_000 ** (2 * np.arange(width // 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(
            VOCABULARY,
            WIDTH,
            embedding_init=partitioned(nn.initializers.normal(1.0), ("vocab", "embed")),
            name="embed",
        )(ids)
        x = nn.with_logical_constraint(
            x + sinusoids(ids.shape[1], WIDTH), ("activation_batch", None, "embed")
        )
        mask = nn.make_causal_mask(ids)
        for i in range(2):
            x = Block(name=f"block_{i}")(x, mask)
        logits = nn.Dense(
            VOCABULARY,
            kernel_init=partitioned(dense_init, ("embed", "vocab")),
            bias_init=partitioned(bias_init, ("vocab",)),
            name="logits_dense",
        )
        return logits(norm("final_norm")(x))


def under_a_mesh(fn):
    """The function under a mesh, so that Flax constrains the sharding of every boxed parameter."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))

    @functools.wraps(fn)
    def run(*args):
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            nn.logical_axis_rules(LOGICAL_AXES),
        ):
            return fn(*args)

    return run


def lm1b():
    return linen(LanguageModel(), tokens(2, 6, below=VOCABULARY))


def lm1b_under_a_mesh():
    built = lm1b()
    return built._replace(fn=under_a_mesh(built.fn))


PLANNED = {
    **in_layers(
        "block_{}",
        {
            "MultiHeadDotProductAttention_0/query/kernel": Along(-3),
            "MultiHeadDotProductAttention_0/key/kernel": Along(-3),
            "MultiHeadDotProductAttention_0/value/kernel": Along(-3),
            "MultiHeadDotProductAttention_0/out/kernel": Along(-2, summed=(-3, -2)),
            "Mlp_0/Dense_0/kernel": Along(-2),
            "Mlp_0/Dense_1/kernel": Along(-2),
        },
    ),
    "logits_dense/kernel": Along(-2),
}

MODELS = {
    "lm1b, boxed": Model(lm1b, PLANNED, products=2 * 6 + 1),
    "lm1b, boxed, under a mesh": Model(lm1b_under_a_mesh, PLANNED, products=2 * 6 + 1),
}
