"""A character language model, a vision transformer and a convolutional network, all small.

Patterns apply to the kernels `SPARSE`. `density` cuts the hidden width so that as many weights are
left as a pattern of that density keeps (SMALL). Products and attention are written in forms that
are fast on XLA:CPU.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

SPARSE = "*hidden_*/kernel"


def narrowed(width, density):
    return max(1, round(width * density))


@jax.custom_vjp
def product(x, kernel):
    """`x @ kernel` of matrices, with a transposed copy of x for the kernel's gradient.

    XLA:CPU does not make this copy by itself.
    """
    return x @ kernel


def _gradients(saved, g):
    x, kernel = saved
    return g @ kernel.T, jax.lax.optimization_barrier(x.T) @ g


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _gradients)


def products(x, kernel, dimensions=(((-1,), (0,)),), *_, **__):
    """The `dot_general` of a dense layer, flattened to matrices.

    The last axes of x are contracted with the first of the kernel.
    """
    axes = len(dimensions[0][0])
    left, right = x.shape[:-axes], kernel.shape[axes:]
    return product(x.reshape(math.prod(left), -1), kernel.reshape(-1, math.prod(right))).reshape(
        *left, *right
    )


def attention(query, key, value, mask=None, **_):
    """Softmax attention `[batch, time, heads, width]` that normalises last."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query / query.shape[-1] ** 0.5, key)
    scores = scores if mask is None else jnp.where(mask, scores, -1e9)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return (
        jnp.einsum("bhqk,bkhd->bqhd", weights, value) / jnp.einsum("bhqk->bqh", weights)[..., None]
    )


class Block(nn.Module):
    heads: int
    density: float

    @nn.compact
    def __call__(self, x, mask=None):
        width = x.shape[-1]
        attend = nn.MultiHeadDotProductAttention(
            self.heads,
            use_bias=False,
            attention_fn=attention,
            qkv_dot_general=products,
            out_dot_general=products,
        )
        x += attend(nn.LayerNorm()(x), mask=mask)
        h = nn.LayerNorm()(x).reshape(-1, width)
        h = nn.Dense(narrowed(4 * width, self.density), dot_general=products, name="hidden_in")(h)
        return x + nn.Dense(width, dot_general=products, name="hidden_out")(nn.gelu(h)).reshape(
            x.shape
        )


class LanguageModel(nn.Module):
    """Tokens int32 `[batch, time]` to logits `[batch, time, vocabulary]`."""

    vocabulary: int
    width: int
    depth: int
    heads: int
    density: float = 1.0

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x += self.param("places", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        for _ in range(self.depth):
            x = Block(self.heads, self.density)(x, nn.make_causal_mask(tokens))
        return nn.Dense(self.vocabulary, dot_general=products)(nn.LayerNorm()(x))


class VisionTransformer(nn.Module):
    """Images `[batch, 8, 8]`, cut into patches of 2x2, to logits `[batch, 10]`."""

    width: int
    depth: int
    heads: int
    density: float = 1.0

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(self.width, (2, 2), strides=2)(images[..., None]).reshape(
            len(images), 16, self.width
        )
        x += self.param("places", nn.initializers.normal(0.02), (16, self.width))
        for _ in range(self.depth):
            x = Block(self.heads, self.density)(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class Conv(nn.Module):
    """A 3x3 convolution as one product of nine shifted images.

    Inside a loop, XLA:CPU takes ten times as long for a real convolution.
    """

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        kernel = self.param(
            "kernel", nn.initializers.he_normal(), (3, 3, x.shape[-1], self.channels)
        )
        size = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        moved = [
            padded[:, i : i + size : self.stride, j : j + size : self.stride]
            for i in range(3)
            for j in range(3)
        ]
        return products(jnp.concatenate(moved, -1), kernel.reshape(-1, self.channels))


class ConvNet(nn.Module):
    """Images `[batch, 8, 8]` to logits `[batch, 10]`.

    `density` cuts the middle channels, which two kernels share.
    """

    width: int
    density: float = 1.0

    @nn.compact
    def __call__(self, images):
        x = nn.relu(Conv(self.width)(images[..., None]))
        x = nn.relu(
            nn.GroupNorm(1)(
                Conv(narrowed(2 * self.width, self.density), stride=2, name="hidden_in")(x)
            )
        )
        x = nn.relu(nn.GroupNorm(1)(Conv(2 * self.width, stride=2, name="hidden_out")(x)))
        return nn.Dense(10)(jnp.mean(x, (1, 2)))
