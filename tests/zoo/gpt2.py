"""GPT-2 as in Hugging Face's Flax code: kernels `[features, inputs]`, transposed at use.

One kernel for q, k and v, and a tied head.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from zoo.entry import Along, Model, in_layers, linen, tokens

VOCABULARY, PLACES, WIDTH, HEADS = 20, 12, 16, 4


class Conv1D(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.02), (self.features, x.shape[-1]))
        kernel = jnp.asarray(kernel.transpose(), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        y = lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        return y + jnp.asarray(bias, jnp.float32)


class Attention(nn.Module):
    def setup(self):
        self.c_attn = Conv1D(3 * WIDTH)
        self.c_proj = Conv1D(WIDTH)

    def __call__(self, x):
        q, k, v = (
            part.reshape(*part.shape[:2], HEADS, -1)
            for part in jnp.split(self.c_attn(x), 3, axis=2)
        )
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        return self.c_proj(nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape))


class Mlp(nn.Module):
    def setup(self):
        self.c_fc = Conv1D(4 * WIDTH)
        self.c_proj = Conv1D(WIDTH)

    def __call__(self, x):
        return self.c_proj(nn.gelu(self.c_fc(x)))


class Block(nn.Module):
    def setup(self):
        self.ln_1 = nn.LayerNorm()
        self.attn = Attention()
        self.ln_2 = nn.LayerNorm()
        self.mlp = Mlp()

    def __call__(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def setup(self):
        self.blocks = [Block(name=str(i)) for i in range(2)]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Transformer(nn.Module):
    def setup(self):
        self.wte = nn.Embed(VOCABULARY, WIDTH)
        self.wpe = nn.Embed(PLACES, WIDTH)
        self.h = Blocks()
        self.ln_f = nn.LayerNorm()

    def __call__(self, ids):
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return self.ln_f(self.h(self.wte(ids) + self.wpe(places)))


class LanguageModel(nn.Module):
    """The head is tied by applying it, inside the model, to parameters assembled there."""

    def setup(self):
        self.transformer = Transformer()
        self.lm_head = nn.Dense(VOCABULARY, use_bias=False)

    def __call__(self, ids):
        x = self.transformer(ids)
        shared = self.transformer.variables["params"]["wte"]["embedding"].T
        return self.lm_head.apply({"params": {"kernel": shared}}, x)


MODELS = {
    "GPT-2": Model(
        lambda: linen(LanguageModel(), tokens(2, 6, below=VOCABULARY)),
        in_layers(
            "transformer/h/{}",
            {
                "attn/c_attn/kernel": Along(-1),
                "attn/c_proj/kernel": Along(-1),
                "mlp/c_fc/kernel": Along(-1),
                "mlp/c_proj/kernel": Along(-1),
            },
        ),
        products=2 * 4,
    )
}
