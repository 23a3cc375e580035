"""A single layer as the whole model runs sparse and compressed, whatever axes it sums over."""

import jax
import numpy as np
import pytest
from flax import linen as nn

import jaxsparse as js

X = jax.random.normal(jax.random.key(1), (2, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        nn.Dense(4),
        nn.DenseGeneral((2, 3)),
        nn.DenseGeneral(4, axis=(1, 2)),
        nn.DenseGeneral(4, axis=(-1, 1)),  # Flax sorts the axes, which have the same size
        nn.Conv(4, (3,)),
        nn.Einsum((4, 8), "bti,ji->btj"),
        nn.MultiHeadDotProductAttention(num_heads=2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_masked_and_compressed_forward_agree_with_sparse_params(model):
    plan = js.flax.plan(model, {"*": js.anywhere("2:4")}, X)

    @jax.jit
    def outputs(params):
        def apply(params):
            return model.apply(params, X)

        masks = js.magnitude_masks(params, plan)
        with js.flax.intercept(masks):
            masked = apply(params)
        with js.flax.intercept():
            compressed = apply(js.compress(params, masks, plan))
        return apply(params), apply(js.effective_params(params, masks)), masked, compressed

    dense, expected, masked, compressed = outputs(jax.jit(model.init)(jax.random.key(0), X))
    assert not np.allclose(expected, dense, atol=1e-3)
    np.testing.assert_allclose(masked, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(compressed, expected, rtol=1e-5, atol=1e-5)
