"""Every algorithm for N:M groups gives the mask of the plain reference, for any n and m."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxsparse as js
from jaxsparse._masks import groups, ranking

# the longest group that each algorithm supports
ALGORITHMS = {"compare_all": 16, "merge": 512, "best": 512, "insert": 64, "bisect": 512}
SIZES = [
    (1, 3),
    (2, 8),
    (4, 8),
    (7, 8),
    (1, 16),
    (2, 3),
    (2, 16),
    (9, 16),
    (3, 7),
    (15, 16),
    (1, 48),
    (2, 32),
    (20, 32),
    (1, 128),
    (127, 128),
    (2, 64),
    (1, 300),
    (1, 512),
    (2, 512),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_agree(name, dtype):
    if name == "merge" and dtype == "float32":
        dtype = "float16"  # its keys share 32 bits with their places
    rng = np.random.default_rng(0)
    for n, m in SIZES if dtype in ("float32", "float16") else SIZES[::3]:
        if (
            m > ALGORITHMS[name]
            or (name == "best" and n > 1)
            or (name in ("insert", "merge") and n > 2)
        ):
            continue
        scores = jnp.asarray(rng.integers(-3, 4, (2, m, 3)), dtype)
        f = functools.partial(
            getattr(groups, f"_{name}"), keys_of=ranking.order_keys, n=n, m=m, axis=1
        )
        mask = np.asarray(jax.jit(f)(scores))
        np.testing.assert_array_equal(mask, reference.nm_mask(scores, n, m, axis=1), f"{n}:{m}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "m"), [(1, 257), (2, 257), (1, 512), (2, 512), (3, 512)])
def test_groups_may_be_longer_than_a_byte_counts(n, m, dtype):
    scores = jnp.asarray(
        np.random.default_rng(m).permutation(4 * m).reshape(2, m, 2) / (4 * m), dtype
    )
    np.testing.assert_array_equal(
        js.nm_mask(scores, n, m, axis=1), reference.nm_mask(scores, n, m, axis=1)
    )


def test_magnitude_keys_order_as_magnitudes_do():
    for dtype in ("float32", "float16", "int8", "int32", "uint8"):
        info = jnp.iinfo(dtype) if "int" in dtype else jnp.finfo(dtype)
        values = np.array(
            [info.min, info.max, 0, 1, 1, 5]
            + ([] if "int" in dtype else [-0.0, -1, np.inf, -np.inf]),
            dtype,
        )
        keys = np.asarray(ranking.magnitude_keys(jnp.asarray(values))).astype(np.int64)
        sizes = np.abs(values.astype(np.float64))
        np.testing.assert_array_equal(keys[:, None] < keys, sizes[:, None] < sizes)
