"""Convolutions with compressed weights as matrix products over the windows of their input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxsparse as js
from jaxsparse._execution import run

NHWC = ("NHWC", "HWIO", "NHWC")
# the shapes of the input and of the kernel, the form of both, and other parameters
CASES = {
    "3x3": ((2, 5, 6, 8), (3, 3, 8, 6), NHWC, {"padding": "SAME"}),
    "3x3 with strides": (
        (2, 5, 6, 8),
        (3, 3, 8, 6),
        NHWC,
        {"window_strides": (2, 1), "padding": "SAME"},
    ),
    "3x2 with holes": (
        (1, 7, 6, 8),
        (3, 2, 8, 6),
        NHWC,
        {"rhs_dilation": (2, 3), "padding": "VALID"},
    ),
    "transposed": (
        (1, 4, 3, 8),
        (2, 3, 8, 6),
        NHWC,
        {"lhs_dilation": (2, 3), "padding": ((1, 1), (2, 2))},
    ),
    "cut by its padding": (
        (1, 5, 6, 8),
        (3, 3, 8, 6),
        NHWC,
        {"padding": ((-1, 2), (3, -2))},
    ),
    "channels first": ((2, 8, 5, 6), (3, 3, 8, 6), ("NCHW", "HWIO", "NCHW"), {"padding": "SAME"}),
    "another order of the result": ((2, 5, 6, 8), (3, 3, 8, 6), ("NHWC", "HWIO", "CWNH"), {}),
    "one axis": ((2, 9, 8), (3, 8, 6), ("NWC", "WIO", "NWC"), {"padding": ((2, 0),)}),
    "three axes": ((1, 3, 4, 3, 8), (2, 2, 2, 8, 6), ("NDHWC", "DHWIO", "NDHWC"), {}),
    "an empty result": ((1, 2, 2, 8), (3, 3, 8, 6), NHWC, {}),
}


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def convolution(numbers, options):
    options = {"window_strides": (1,) * (len(numbers[0]) - 2), "padding": "VALID"} | options
    return lambda params, x: jnp.tanh(
        lax.conv_general_dilated(x, params["w"], dimension_numbers=numbers, **options)
    )


@pytest.mark.parametrize("name", CASES)
def test_windows_that_overlap_are_multiplied_where_a_kernel_runs(name, monkeypatch):
    of_x, of_w, numbers, options = CASES[name]
    x, params, fn = normal(0, of_x), {"w": normal(1, of_w)}, convolution(numbers, options)
    plan = js.plan(params, {"w": "2:4"}, fn, x)
    masks = js.magnitude_masks(params, plan)
    packed, masked = js.compress(params, masks, plan), js.effective_params(params, masks)
    assert packed["w"].contracting == of_w[:-1]

    def loss(fn, params, x):
        return (fn(params, x) ** 2).sum()

    (usage,) = js.sparsify(fn).report(packed, x).products
    assert "whose windows overlap; a named kernel takes them" in usage.reason
    monkeypatch.setattr(run, "chosen", lambda *args: "hopper")  # its numbers are the dense ones
    sparse = js.sparsify(fn)
    assert "sparse_matmul[" in str(jax.make_jaxpr(sparse)(packed, x))
    np.testing.assert_allclose(jax.jit(sparse)(packed, x), fn(masked, x), atol=1e-5)
    gradients = [
        jax.jit(jax.grad(functools.partial(loss, one), (0, 1), allow_int=True))(weights, x)
        for one, weights in ((sparse, packed), (fn, masked))
    ]
    (of_packed, of_input), (of_masked, expected) = gradients
    np.testing.assert_allclose(of_input, expected, atol=1e-4)
    values = js.compress(of_masked, masks, plan)["w"].values
    np.testing.assert_allclose(of_packed["w"].values, values, atol=1e-4)


def test_a_named_kernel_takes_overlapping_windows():
    of_x, of_w, numbers, options = CASES["3x3"]
    x, params, fn = normal(0, of_x), {"w": normal(1, of_w)}, convolution(numbers, options)
    params, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    plan = js.plan(params, {"w": "2:4"}, fn, x)
    packed = js.compress(params, js.magnitude_masks(params, plan), plan, layout="mma16")
    program = jax.make_jaxpr(js.sparsify(fn, implementation="hopper"))(packed, x)
    (product,) = (eqn for eqn in program.eqns if eqn.primitive.name == "sparse_matmul")
    assert product.params["implementation"] == "hopper"
    assert product.invars[0].aval.shape == (2 * 5 * 6, 9 * 8)


@pytest.mark.parametrize("groups", ["feature_group_count", "batch_group_count"])
def test_grouped_convolutions_are_decompressed(groups):
    params, x = {"w": normal(0, (3, 3, 8, 6))}, normal(1, (2, 5, 6, 16))
    if groups == "batch_group_count":
        x = x[..., :8]
    fn = convolution(NHWC, {groups: 2})
    plan = js.plan(params, {"w": js.NM(2, 4, axis=2)})
    packed = js.compress(params, js.magnitude_masks(params, plan), plan)
    (usage,) = js.sparsify(fn).report(packed, x).products
    assert "grouped convolution" in usage.reason
