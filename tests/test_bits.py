"""Masks packed at one bit a weight keep every bit."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse._masks import bits


@pytest.mark.slow
@hypothesis.given(
    st.lists(st.integers(0, 17), min_size=1, max_size=3), st.integers(0, 2), st.integers(0, 99)
)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_round_trip(shape, axis, seed):
    axis %= len(shape)
    mask = np.random.default_rng(seed).random(shape) < 0.5
    packed = bits.pack(mask, axis)
    np.testing.assert_array_equal(packed, np.packbits(mask, axis, bitorder="little"))
    np.testing.assert_array_equal(bits.unpack(packed, shape[axis], axis), mask)
    np.testing.assert_array_equal(
        jax.vmap(lambda m: bits.unpack(bits.pack(m, axis), shape[axis], axis))(mask[None])[0], mask
    )


def test_the_state_keeps_one_bit_a_weight():
    params = {"w": jax.numpy.ones((64, 32)), "b": jax.numpy.ones(32)}
    state = js.rewire(optax.sgd(0.1), js.plan(params, {"w": js.NM(2, 4, axis=0)})).init(params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.masks)) == 64 * 32 // 8
