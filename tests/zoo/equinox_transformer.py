"""A transformer in Equinox: modules are pytrees, kernels are `[outputs, inputs]`.

The batch is a `vmap`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from zoo.entry import Along, Built, Model, in_layers, random_like, tokens

VOCABULARY, PLACES, WIDTH, HEADS, HIDDEN = 20, 12, 16, 4, 24


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm_1: eqx.nn.LayerNorm
    norm_2: eqx.nn.LayerNorm
    wide: eqx.nn.Linear
    narrow: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.norm_1 = eqx.nn.LayerNorm(WIDTH)
        self.norm_2 = eqx.nn.LayerNorm(WIDTH)
        self.wide = eqx.nn.Linear(WIDTH, HIDDEN, key=keys[1])
        self.narrow = eqx.nn.Linear(HIDDEN, WIDTH, key=keys[2])

    def __call__(self, x):
        normed = jax.vmap(self.norm_1)(x)
        mask = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
        x = x + self.attention(normed, normed, normed, mask=mask)
        hidden = jax.nn.gelu(jax.vmap(self.wide)(jax.vmap(self.norm_2)(x)))
        return x + jax.vmap(self.narrow)(hidden)


class Transformer(eqx.Module):
    embed: eqx.nn.Embedding
    places: jax.Array
    layers: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.places = jnp.zeros((PLACES, WIDTH))
        self.layers = [Block(keys[1]), Block(keys[2])]
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=keys[3])

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids) + self.places[: len(ids)]
        for layer in self.layers:
            x = layer(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


class Stacked(eqx.Module):
    """The same transformer with layers made by `vmap` and run by `scan`."""

    embed: eqx.nn.Embedding
    layers: Block
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.layers = eqx.filter_vmap(Block)(jax.random.split(keys[1], 2))
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=keys[2])

    def __call__(self, ids):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, layer):
            return eqx.combine(layer, static)(x), None

        x, _ = jax.lax.scan(step, jax.vmap(self.embed)(ids), arrays)
        return jax.vmap(self.head)(x)


def equinox(cls):
    shapes, static = eqx.partition(
        eqx.filter_eval_shape(cls, jax.random.key(0)),
        lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
    )

    def fn(params, ids):
        return jax.vmap(eqx.combine(params, static))(ids)

    return Built(fn, random_like(shapes), (tokens(2, 6, below=VOCABULARY),))


PROJECTIONS = ("query_proj", "key_proj", "value_proj", "output_proj")
KERNELS = [*(f"attention/{name}/weight" for name in PROJECTIONS), "wide/weight", "narrow/weight"]

MODELS = {
    "Equinox": Model(
        lambda: equinox(Transformer),
        {**in_layers("layers/{}", dict.fromkeys(KERNELS, Along(-1))), "head/weight": Along(-1)},
        products=2 * 6 + 1,
    ),
    "Equinox, scan": Model(
        lambda: equinox(Stacked),
        {
            **in_layers("layers", dict.fromkeys(KERNELS, Along(-1, stack=(-3,))), 1),
            "head/weight": Along(-1),
        },
        products=6 + 1,
    ),
}
