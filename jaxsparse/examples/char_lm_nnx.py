"""The Transformer of `char_lm` in Flax NNX: the same architecture as NNX Modules."""

import jax.numpy as jnp
from flax import nnx

from jaxsparse.examples.char_lm import CONTEXT

__all__ = ["Block", "Transformer", "convert"]


class Block(nnx.Module):
    def __init__(self, width, heads, *, rngs):
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, use_bias=False, decode=False, rngs=rngs
        )
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x += self.attention(self.norm_attention(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.norm_mlp(x))))


class Transformer(nnx.Module):
    """Tokens int32 `[batch, time]` to logits `[batch, time, vocabulary]`."""

    def __init__(self, vocabulary, width, depth, heads=4, *, rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def blocks(rngs):
            return Block(width, heads, rngs=rngs)

        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)  # tied: also computes the logits
        self.places = nnx.Param(nnx.initializers.normal(0.3)(rngs.params(), (CONTEXT, width)))
        # mixes in the preceding characters from the first step on
        self.recent = nnx.Conv(width, width, kernel_size=(4,), padding="CAUSAL", rngs=rngs)
        self.blocks = blocks(rngs)  # one Block whose weights are stacked along axis 0
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens):
        x = jnp.sqrt(self.embed.features) * self.embed(tokens) + self.places[: tokens.shape[1]]
        x += self.recent(x)
        x = nnx.scan(Block.__call__, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)
        return self.embed.attend(self.norm(x))


def convert(linen_params):
    """Renames the weights of the Linen Transformer for this one.

    Use `nnx.update(model, convert(linen_params))`.
    """
    top = dict(linen_params["params"])
    blocks = dict(top.pop("blocks"))
    blocks |= {"norm_attention": blocks.pop("LayerNorm_0"), "norm_mlp": blocks.pop("LayerNorm_1")}
    return top | {"norm": top.pop("LayerNorm_0"), "blocks": blocks}
