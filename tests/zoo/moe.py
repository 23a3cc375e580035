"""A mixture of experts as in Mixtral, with three ways to run the experts.

A router selects two experts, stored in stacks, for each token.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from zoo.entry import Along, Model, in_layers, linen, tokens

VOCABULARY, WIDTH, HIDDEN, EXPERTS, CHOSEN, HEADS = 20, 16, 24, 4, 2, 4


def dispatched(x, gates, chosen, w1, w3, w2):
    """Each expert has a buffer of rows; one-hot products move tokens there and back."""
    capacity = x.shape[0]
    hot = jax.nn.one_hot(chosen, EXPERTS)  # [T, chosen, E]
    rank = jnp.cumsum(hot.reshape(-1, EXPERTS), axis=0).reshape(hot.shape) - 1
    places = hot[..., None] * jax.nn.one_hot(rank.astype(int), capacity)  # [T, chosen, E, C]
    combine, dispatch = jnp.einsum("tk,tkec->tec", gates, places), places.sum(axis=1)
    rows = jnp.einsum("tec,td->ecd", dispatch, x)
    hidden = nn.silu(jnp.einsum("ecd,edf->ecf", rows, w1)) * jnp.einsum("ecd,edf->ecf", rows, w3)
    return jnp.einsum("tec,ecd->td", combine, jnp.einsum("ecf,efd->ecd", hidden, w2))


def ragged(x, gates, chosen, w1, w3, w2):
    """Tokens are sorted by expert and multiplied in runs of unequal length."""
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS).astype(jnp.int32)
    rows = x[order // CHOSEN]
    hidden = nn.silu(lax.ragged_dot(rows, w1, sizes)) * lax.ragged_dot(rows, w3, sizes)
    out = lax.ragged_dot(hidden, w2, sizes)
    unsorted = jnp.zeros_like(out).at[order].set(out).reshape(*chosen.shape, WIDTH)
    return jnp.einsum("tk,tkd->td", gates, unsorted)


def gathered(x, gates, chosen, w1, w3, w2):
    """Every token gathers the weights of its experts."""
    hidden = nn.silu(jnp.einsum("td,tkdf->tkf", x, w1[chosen])) * jnp.einsum(
        "td,tkdf->tkf", x, w3[chosen]
    )
    return jnp.einsum("tk,tkd->td", gates, jnp.einsum("tkf,tkfd->tkd", hidden, w2[chosen]))


class SparseMoe(nn.Module):
    run: callable

    @nn.compact
    def __call__(self, x):
        rows = x.reshape(-1, WIDTH)
        logits = nn.Dense(EXPERTS, use_bias=False, name="router")(rows)
        gates, chosen = lax.top_k(nn.softmax(logits), CHOSEN)
        gates /= gates.sum(axis=-1, keepdims=True)
        init = nn.initializers.lecun_normal(batch_axis=0)
        w1 = self.param("w1", init, (EXPERTS, WIDTH, HIDDEN))
        w3 = self.param("w3", init, (EXPERTS, WIDTH, HIDDEN))
        w2 = self.param("w2", init, (EXPERTS, HIDDEN, WIDTH))
        return self.run(rows, gates, chosen, w1, w3, w2).reshape(x.shape)


class Mixtral(nn.Module):
    run: callable

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed_tokens")(ids)
        mask = nn.make_causal_mask(ids)
        for i in range(2):
            attention = nn.MultiHeadDotProductAttention(
                num_heads=HEADS, use_bias=False, name=f"layers_{i}_attn"
            )
            x = x + attention(nn.RMSNorm()(x), mask=mask)
            x = x + SparseMoe(self.run, name=f"layers_{i}_moe")(nn.RMSNorm()(x))
        return nn.Dense(VOCABULARY, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))


def mixtral(run):
    return linen(Mixtral(run), tokens(2, 4, below=VOCABULARY))


PLANNED = {
    **in_layers(
        "layers_{}_attn",
        {
            "query/kernel": Along(-3),
            "key/kernel": Along(-3),
            "value/kernel": Along(-3),
            "out/kernel": Along(-2, summed=(-3, -2)),
        },
    ),
    **in_layers(
        "layers_{}_moe",
        {
            "router/kernel": Along(-2),
            "w1": Along(-2, stack=(-3,)),
            "w3": Along(-2, stack=(-3,)),
            "w2": Along(-2, stack=(-3,)),
        },
    ),
    "lm_head/kernel": Along(-2),
}
EXPERT_WEIGHTS = frozenset(f"layers_{i}_moe/{w}" for i in range(2) for w in ("w1", "w3", "w2"))

MODELS = {
    "MoE, dispatch and combine": Model(
        lambda: mixtral(dispatched), PLANNED, products=2 * (4 + 1 + 3) + 1
    ),
    "MoE, ragged products": Model(
        lambda: mixtral(ragged), PLANNED, products=2 * (4 + 1) + 1, decompressed=EXPERT_WEIGHTS
    ),
    "MoE, gathered experts": Model(
        lambda: mixtral(gathered), PLANNED, products=2 * (4 + 1) + 1, decompressed=EXPERT_WEIGHTS
    ),
}
