"""The Hopper kernel without its GPU: in interpret mode, and its compiled instructions."""

import re

import aot
import interpreted
import jax
import jax.numpy as jnp
import lanes
import numpy as np
import pytest
from problems import problem

from jaxsparse._kernels import ACTIVATIONS, hopper

interpret = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 cannot interpret transposed references"
)
CONFIGS = {
    "one tile": (64, 128, 128, {"tile_n": 64, "stages": 2}),
    "tiles that stick out on every side": (100, 320, 192, {"tile_n": 64, "stages": 3}),
    "two blocks share x": (100, 512, 256, {"tile_n": 64, "stages": 3, "cluster": 2}),
    "no group in flight, more tiles than blocks": (
        40,
        192,
        320,
        {"tile_n": 32, "stages": 2, "in_flight": 0, "stripe": 2},
    ),
    "fewer rows than a store, fewer tiles than blocks": (5, 64, 64, {"tile_n": 32, "stages": 2}),
    "an odd number of output features, part of a step": (13, 77, 80, {"tile_n": 32, "stages": 2}),
    "a contraction that is padded": (33, 136, 164, {"tile_n": 32, "stages": 3, "cluster": 2}),
}


@pytest.mark.slow
@interpret
@pytest.mark.parametrize(("n", "m", "k", "config"), CONFIGS.values(), ids=CONFIGS.keys())
def test_the_whole_kernel_is_exact(n, m, k, config):
    x, w, _, exact = problem(n, m, k)
    config = hopper.Config(**config)
    y = hopper.matmul(
        x,
        w.values,
        w.metadata,
        config=config,
        cores=4,
        ops=interpreted.hopper_ops,
        **interpreted.params(),
    )
    np.testing.assert_array_equal(y, jnp.asarray(exact, x.dtype))


@pytest.mark.slow
@interpret
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_and_activation_are_applied_before_rounding(activation):
    x, w, bias, exact = problem(24, 192, 64, jnp.float16)
    exact = ACTIVATIONS[activation](jnp.asarray(exact / 64 + bias))
    y = hopper.matmul(
        x / 64,
        w.values,
        w.metadata,
        bias,
        activation=activation,
        cores=3,
        ops=interpreted.hopper_ops,
        **interpreted.params(),
    )
    np.testing.assert_allclose(y, exact, rtol=1e-3, atol=1e-4)
    assert jnp.mean(y == exact.astype(x.dtype)) > 0.98


def step_of(ptx):
    """The first two sparse instructions of the PTX.

    Each is `(a descriptor, b descriptor, metadata register, selector)`, for tiles at address 0.
    """
    calls = re.findall(r"wgmma\.mma_async\.sp[^}]*\}, (%rd\d+), (%rd\d+), (%r\d+), (\d)", ptx)[:2]
    constants = {
        d: int(c) % 2**64
        for d, c in re.findall(r"(?:or|add)\.[bs]64 \t(%rd\d+), %rd\d+, (-?\d+);", ptx)
    }
    origin = [constants[operand] & 0x3FFF for operand in calls[0][:2]]
    return [
        (constants[a] - origin[0], constants[b] - origin[1], word, int(selector))
        for a, b, word, selector in calls
    ]


def product_of(step, values, x, words):
    """The product that the instructions compute, in emulation, from tiles in shared memory."""
    values, x = lanes.tma_tile(values, 64), lanes.tma_tile(x, 128)
    total = 0
    for a, b, _, selector in step:
        operands = lanes.descriptor_tile(values, a, 64, 16), lanes.descriptor_tile(x, b, 64, 32).T
        total = total + lanes.wgmma_sp_m64k32(*operands, words, selector)
    return total


AHEAD = {
    "prefill": (8192, 8192, 8192, {}),
    "a narrow tile in float16": (40, 4096, 4096, {"dtype": "float16"}),
    "a vision transformer's mlp": (4096, 1152, 4304, {}),
    "a vocabulary": (64, 50257, 1600, {}),
    "no group in flight": (
        128,
        4096,
        4096,
        {"config": {"tile_n": 64, "stages": 8, "in_flight": 0}},
    ),
    "bias and activation": (1024, 1024, 1024, {"bias": True, "activation": "gelu"}),
}


@pytest.mark.aot
@pytest.mark.parametrize(("n", "m", "k", "options"), AHEAD.values(), ids=AHEAD.keys())
def test_compiled_ahead_of_time_it_holds_the_sparse_instruction(
    tmp_path, n, m, k, options, record_property
):
    ptx = aot.compile_ptx(tmp_path / "kernel.ptx", "h200", "hopper", n, m, k, **options)
    config = hopper.Config(**options["config"]) if "config" in options else None
    tile = (config or hopper.default_config(n, m, 132)).tile_n
    name = "f16" if "dtype" in options else "bf16"
    assert f"wgmma.mma_async.sp.sync.aligned.m64n{tile}k32.f32.{name}.{name}" in ptx
    assert "wgmma.mma_async.sync" not in ptx
    step = step_of(ptx)
    assert step[0][2] == step[1][2]
    x, w, _, exact = problem(64, 64, 64, jnp.float16)
    values, words = np.asarray(w.values).astype(np.int16), np.asarray(w.metadata)[0, 0]
    np.testing.assert_array_equal(
        product_of(step, values, np.asarray(x).astype(np.int16), words), exact.T
    )
    exchanged = [(*first[:3], second[3]) for first, second in zip(step, step[::-1], strict=True)]
    assert (product_of(exchanged, values, np.asarray(x).astype(np.int16), words) != exact.T).any()
    resources = aot.resources(tmp_path / "kernel.ptx", "h200")
    record_property("resources", resources)
    print("hopper", n, m, k, options, resources)
    assert resources["spills"] == 0 and not resources["warnings"]
