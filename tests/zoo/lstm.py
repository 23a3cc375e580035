"""A translator of LSTMs in Linen: an encoder under `nn.RNN`, a decoder under `nn.scan`.

The decoder attends to the encoder's states.
"""

import jax.numpy as jnp
from flax import linen as nn

from zoo.entry import Along, Model, linen, tokens

VOCABULARY, WIDTH, HIDDEN = 20, 16, 24


class DecoderStep(nn.Module):
    """One step: the cell reads the token and the previous context."""

    @nn.compact
    def __call__(self, carry, x, encoded):
        state, context = carry
        state, h = nn.LSTMCell(HIDDEN, name="cell")(state, jnp.concatenate([x, context], axis=-1))
        query = nn.Dense(HIDDEN, use_bias=False, name="query")(h)
        weights = nn.softmax(jnp.einsum("bh,bth->bt", query, encoded))
        context = jnp.einsum("bt,bth->bh", weights, encoded)
        mixed = nn.tanh(nn.Dense(HIDDEN, name="mix")(jnp.concatenate([h, context], axis=-1)))
        return (state, context), mixed


class Seq2seq(nn.Module):
    @nn.compact
    def __call__(self, sources, targets):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        encoder = nn.RNN(
            nn.OptimizedLSTMCell(HIDDEN, name="encoder_cell"), return_carry=True, name="encoder"
        )
        state, encoded = encoder(embed(sources))
        step = nn.scan(
            DecoderStep,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=(1, nn.broadcast),
            out_axes=1,
        )
        _, mixed = step(name="decoder")(
            (state, jnp.zeros_like(encoded[:, 0])), embed(targets), encoded
        )
        return nn.Dense(VOCABULARY, name="projection")(mixed)


def seq2seq():
    return linen(Seq2seq(), tokens(2, 5, below=VOCABULARY), tokens(2, 4, below=VOCABULARY))


GATES = [f"{source}{gate}" for source in "ih" for gate in "ifgo"]

MODELS = {
    "LSTM translator": Model(
        seq2seq,
        {
            **{f"encoder_cell/{gate}/kernel": Along(-2) for gate in GATES},
            **{f"decoder/cell/{gate}/kernel": Along(-2) for gate in GATES},
            "decoder/query/kernel": Along(-2),
            "decoder/mix/kernel": Along(-2),
            "projection/kernel": Along(-2),
        },
        # the encoder's cell concatenates the four kernels of a source before one product
        products=2 + 8 + 3,
    )
}
