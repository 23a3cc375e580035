"""The check that a model is sparse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

PARAMS = {
    "a": jax.random.normal(jax.random.key(0), (8, 16)),
    "b": {"w": jax.random.normal(jax.random.key(1), (16, 8))},
    "bias": jnp.ones(16),
}
PATTERNS = [
    js.NM(2, 4, axis=0),
    js.NM(1, 8, axis=0),
    js.TransposableNM(2, 4, axes=(0, 1)),
    js.Unstructured(0.3),
    js.Block((2, 4), 0.5, axes=(0, 1)),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masked_weights_pass_and_one_weight_more_does_not(pattern):
    plan = js.plan(PARAMS, {"a": pattern, "b/w": pattern})
    masks = js.magnitude_masks(PARAMS, plan)
    sparse = js.effective_params(PARAMS, masks)
    js.assert_sparse(sparse, plan)
    place = tuple(np.argwhere(~np.asarray(masks["b"]["w"]))[0])
    sparse["b"]["w"] = sparse["b"]["w"].at[place].set(9.0)
    with pytest.raises(AssertionError, match=r"1 of 2 planned leaves is not sparse\.\n  b/w, plan"):
        js.assert_sparse(sparse, plan)
    with pytest.raises(AssertionError, match=r"2 of 2 planned leaves are .*\n  a, .*\n  b/w, "):
        js.assert_sparse(PARAMS, plan)


def test_weights_that_are_0_or_nan_or_compressed():
    plan = js.plan(PARAMS, {"a": js.NM(2, 4, axis=0)})
    masks = js.magnitude_masks(PARAMS, plan)
    js.assert_sparse(jax.tree.map(jnp.zeros_like, PARAMS), plan)
    js.assert_sparse(js.compress(PARAMS, masks, plan), plan)
    one = js.plan(PARAMS, {"a": js.NM(1, 4, axis=0)})
    with pytest.raises(AssertionError, match="a, planned as 1:4: 64 of 128 weights are not 0"):
        js.assert_sparse(js.compress(PARAMS, masks, plan), one)
    wrong = PARAMS | {"a": js.effective_params(PARAMS, masks)["a"].at[:4, 0].set(jnp.nan)}
    with pytest.raises(AssertionError, match="2 of them break the pattern"):
        js.assert_sparse(wrong, plan)
