"""T5 as in T5X: kernels stored as matrices and reshaped at use, relative positions."""

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from zoo.entry import Along, Model, in_layers, linen, tokens

VOCABULARY, WIDTH, HEADS, HEAD_WIDTH, HIDDEN, BUCKETS, LAYERS = 20, 16, 4, 8, 24, 8, 2


class DenseGeneral(nn.Module):
    """A layer that stores its kernel as a matrix and reshapes it for the product."""

    features: tuple[int, ...]
    axes: tuple[int, ...] = (-1,)

    @nn.compact
    def __call__(self, x):
        axes = tuple(axis % x.ndim for axis in self.axes)
        inputs = tuple(x.shape[axis] for axis in axes)
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (math.prod(inputs), math.prod(self.features))
        )
        kernel = jnp.reshape(jnp.asarray(kernel, x.dtype), inputs + self.features)
        return lax.dot_general(x, kernel, ((axes, tuple(range(len(axes)))), ((), ())))


class LayerNorm(nn.Module):
    """The normalisation of T5, without mean and bias."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        return x * lax.rsqrt(jnp.mean(lax.square(x), axis=-1, keepdims=True) + 1e-6) * scale


class Embed(nn.Module):
    one_hot: bool

    def setup(self):
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), (VOCABULARY, WIDTH))

    def __call__(self, ids):
        if self.one_hot:
            hot = jnp.array(ids[..., None] == jnp.arange(VOCABULARY), jnp.float32)
            return jnp.dot(hot, self.embedding)
        return self.embedding[ids]

    def attend(self, x):
        return jnp.dot(x, self.embedding.T)


class RelativePositions(nn.Module):
    """A number for each head and bucket of distances, looked up by a product with one-hot rows."""

    bidirectional: bool

    @nn.compact
    def __call__(self, queries, keys):
        distance = np.arange(keys)[None] - np.arange(queries)[:, None]
        buckets = np.clip(
            distance + (BUCKETS // 2 if self.bidirectional else BUCKETS - 1), 0, BUCKETS - 1
        )
        table = self.param("rel_embedding", nn.initializers.normal(), (HEADS, BUCKETS))
        hot = jnp.array(jnp.arange(BUCKETS)[:, None, None] == buckets, jnp.float32)
        return lax.dot_general(table, hot, (((1,), (0,)), ((), ())))[None]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, source, bias=None):
        heads = (HEADS, HEAD_WIDTH)
        q = DenseGeneral(heads, name="query")(x)
        k = DenseGeneral(heads, name="key")(source)
        v = DenseGeneral(heads, name="value")(source)
        weights = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        weights = nn.softmax(weights if bias is None else weights + bias)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return DenseGeneral((WIDTH,), axes=(-2, -1), name="out")(mixed)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate, linear = (
            nn.gelu(DenseGeneral((HIDDEN,), name="wi_0")(x)),
            DenseGeneral((HIDDEN,), name="wi_1")(x),
        )
        return DenseGeneral((WIDTH,), name="wo")(gate * linear)


class EncoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x, bias):
        normed = LayerNorm(name="pre_attention_layer_norm")(x)
        x = x + Attention(name="attention")(normed, normed, bias)
        return x + Mlp(name="mlp")(LayerNorm(name="pre_mlp_layer_norm")(x)), None


class DecoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x, encoded, bias):
        normed = LayerNorm(name="pre_self_attention_layer_norm")(x)
        x = x + Attention(name="self_attention")(normed, normed, bias)
        x = x + Attention(name="encoder_decoder_attention")(
            LayerNorm(name="pre_cross_attention_layer_norm")(x), encoded
        )
        return x + Mlp(name="mlp")(LayerNorm(name="pre_mlp_layer_norm")(x)), None


class Stack(nn.Module):
    """The layers of the encoder or the decoder, and the final norm."""

    layer: type[nn.Module]
    scan: bool

    @nn.compact
    def __call__(self, x, *args):
        if self.scan:
            lifted = nn.scan(
                nn.remat(self.layer, prevent_cse=False),
                variable_axes={"params": 1},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=LAYERS,
                metadata_params={nn.meta.PARTITION_NAME: "layers"},
            )
            x, _ = lifted(name="layers")(x, *args)
        else:
            for i in range(LAYERS):
                x, _ = self.layer(name=f"layers_{i}")(x, *args)
        return LayerNorm(name="final_norm")(x)


class T5(nn.Module):
    scan: bool = False
    one_hot: bool = False
    tied: bool = False

    @nn.compact
    def __call__(self, sources, targets):
        embed = Embed(self.one_hot, name="token_embedder")
        bias = RelativePositions(True, name="encoder_relpos_bias")(
            sources.shape[1], sources.shape[1]
        )
        encoded = Stack(EncoderLayer, self.scan, name="encoder")(embed(sources), bias)
        length = targets.shape[1]
        bias = RelativePositions(False, name="decoder_relpos_bias")(length, length)
        bias = jnp.where(jnp.tril(jnp.ones((length, length), bool)), bias, -1e10)
        x = Stack(DecoderLayer, self.scan, name="decoder")(embed(targets), encoded, bias)
        if self.tied:
            return embed.attend(x / jnp.sqrt(WIDTH))
        return DenseGeneral((VOCABULARY,), name="logits_dense")(x)


def t5(**options):
    return linen(T5(**options), tokens(2, 6, below=VOCABULARY), tokens(2, 4, below=VOCABULARY))


def attention(name, along):
    return {f"{name}/{kernel}/kernel": along for kernel in ("query", "key", "value", "out")}


def layers(along):
    """The table of a stack of layers.

    Kernels are stored as matrices, so all are grouped along their first axis; if they are stacked
    along axis 1, that is -3.
    """
    mlp = {f"mlp/{kernel}/kernel": along for kernel in ("wi_0", "wi_1", "wo")}
    encoder = {**attention("attention", along), **mlp}
    decoder = {
        **attention("self_attention", along),
        **attention("encoder_decoder_attention", along),
        **mlp,
    }
    return encoder, decoder


ENCODER, DECODER = layers(Along(-2))
SCANNED_ENCODER, SCANNED_DECODER = layers(Along(-3, stack=(-2,)))

MODELS = {
    "T5, scan along axis 1, tied": Model(
        lambda: t5(scan=True, tied=True),
        {
            **in_layers("encoder/layers", SCANNED_ENCODER, 1),
            **in_layers("decoder/layers", SCANNED_DECODER, 1),
        },
        products=7 + 11,
    ),
    "T5, one-hot lookups": Model(
        lambda: t5(one_hot=True),
        {
            **in_layers("encoder/layers_{}", ENCODER),
            **in_layers("decoder/layers_{}", DECODER),
            "logits_dense/kernel": Along(-2),
        },
        products=2 * 7 + 2 * 11 + 1,
    ),
}
