"""Conversion to and from the arrays of PyTorch's semi-structured tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_cutlass

import jaxsparse as js

DTYPES = {"int16": jnp.float16, "int8": jnp.int8}
SAVED = dict(np.load(torch_cutlass.FILE))


@pytest.fixture(params=DTYPES)
def case(request):
    """A dense weight, and what PyTorch makes of it."""
    dense = jnp.asarray(torch_cutlass.dense(request.param), DTYPES[request.param])
    return dense, *(SAVED[f"{request.param} {part}"] for part in ("values", "metadata"))


@pytest.mark.parametrize("axes", ["OK", "KO"])
def test_equals_what_pytorch_makes(case, axes):
    dense, values, metadata = case
    w = dense if axes == "OK" else dense.T
    axis = axes.index("K")
    plan = js.plan({"w": w}, {"w": js.NM(2, 4, axis=axis)})
    packed = js.compress({"w": w}, {"w": w != 0}, plan, layout="canonical")["w"]
    converted = js.to_cutlass(packed)
    np.testing.assert_array_equal(converted.values, values)
    np.testing.assert_array_equal(converted.metadata, metadata)
    assert converted.metadata.dtype == metadata.dtype

    back = js.from_cutlass(values, metadata, axes=axes)
    np.testing.assert_array_equal(js.decompress(back), w)
    np.testing.assert_array_equal(back.metadata, packed.metadata)
    assert back.kinds == axes


def test_the_layout_of_tensor_cores_converts_alike():
    dense = jnp.asarray(torch_cutlass.dense("int16"), jnp.bfloat16)
    plan = js.plan({"w": dense}, {"w": js.NM(2, 4, axis=1)})
    packed = js.compress({"w": dense}, {"w": dense != 0}, plan, layout="mma16")["w"]
    converted = jax.jit(js.to_cutlass)(packed)
    np.testing.assert_array_equal(converted.metadata, SAVED["int16 metadata"])


def weight(m, k, dtype, stack=()):
    values = jnp.ones((*stack, m, k // 2), dtype)
    words = jnp.full((*stack, m, -(-k // 16)), 0x4444, jnp.uint16)
    return js.Sparse24(values, words, contracting=(k,), output=(m,))


VALUES, METADATA = SAVED["int16 values"], SAVED["int16 metadata"]
BAD = {
    "not compressed": (TypeError, r"to_cutlass: `w` is a float", lambda: js.to_cutlass(1.0)),
    "32 bits": (ValueError, "float32.*Cast", lambda: js.to_cutlass(weight(32, 32, "float32"))),
    "a stack": (ValueError, "one by one", lambda: js.to_cutlass(weight(32, 32, "float16", (2,)))),
    "rows": (ValueError, "M is 48.*of 32", lambda: js.to_cutlass(weight(48, 32, "float16"))),
    "columns": (ValueError, "K is 32.*and 64", lambda: js.to_cutlass(weight(32, 32, "int8"))),
    "axes": (
        ValueError,
        "`axes` is 'KK'",
        lambda: js.from_cutlass(VALUES, METADATA, axes="KK"),
    ),
    "metadata of another weight": (
        ValueError,
        r"`metadata` is int16 \(64, 4\), but .* need int16 \(64, 6\)",
        lambda: js.from_cutlass(VALUES, METADATA[:, :4]),
    ),
    "damaged places": (
        ValueError,
        "places",
        lambda: js.from_cutlass(VALUES, np.where(METADATA[3, 2] == METADATA, 0, METADATA)),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        call()
