"""The Ampere kernel without its GPU: in interpret mode, and its compiled code in emulation."""

import functools
import re

import aot
import interpreted
import jax
import jax.numpy as jnp
import lanes
import numpy as np
import ptx
import pytest
from problems import problem

from jaxsparse._kernels import ACTIVATIONS, ampere

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 aborts the process when it compiles for Ampere"
)
CONFIGS = {
    "one tile": (64, 128, 64, {}),
    "several tiles, rows that do not fill them": (100, 256, 192, {}),
    "large tiles, a deep ring": (65, 512, 320, {"tile_m": 256, "stages": 4}),
    "fewer steps than stages": (3, 128, 128, {"stages": 5}),
    "nothing fills its tile": (13, 77, 84, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m", "k", "config"), CONFIGS.values(), ids=CONFIGS.keys())
def test_the_whole_kernel_is_exact(n, m, k, config):
    x, w, bias, exact = problem(n, m, k)
    run = functools.partial(
        ampere.matmul,
        config=ampere.Config(**config),
        ops=interpreted.ampere_ops,
        **interpreted.params(),
    )
    np.testing.assert_array_equal(
        run(x, w.values, w.metadata, bias), jnp.asarray(exact + bias, x.dtype)
    )


def test_bias_and_activation_are_applied_before_rounding():
    x, w, bias, exact = problem(24, 256, 64, jnp.float16)
    exact = ACTIVATIONS["silu"](jnp.asarray(exact / 64 + bias))
    y = ampere.matmul(
        x / 64,
        w.values,
        w.metadata,
        bias,
        activation="silu",
        ops=interpreted.ampere_ops,
        **interpreted.params(),
    )
    np.testing.assert_allclose(y, exact, rtol=1e-3, atol=1e-4)
    assert jnp.mean(y == exact.astype(x.dtype)) > 0.98


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The PTX for 128 rows, 256 output features and a contraction of 320, and that with a bias."""
    folder = tmp_path_factory.mktemp("ptx")
    return {
        bias: aot.compile_ptx(folder / f"{bias}.ptx", "a100", "ampere", 128, 256, 320, bias=bias)
        for bias in (False, True)
    }


@pytest.mark.aot
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_compiled_kernel_is_exact(compiled, with_bias):
    x, w, bias, exact = problem(128, 256, 320)
    y = ptx.product(compiled[with_bias], x, w, bias if with_bias else None, (128, 256), (2, 2, 1))
    np.testing.assert_array_equal(y, jnp.asarray(exact + bias * with_bias, x.dtype))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("right", "wrong"),
    [("wait_group\\s+4;", "wait_group 9;"), (r"(mma\.sp.*), 1;", r"\1, 0;")],
    ids=["an early read", "one selector"],
)
def test_the_execution_notices_what_is_wrong(compiled, right, wrong):
    x, w, _, exact = problem(128, 256, 320)
    changed = re.sub(right, wrong, compiled[False])
    assert changed != compiled[False]
    try:
        y = ptx.product(changed, x, w, None, (128, 256), (1, 1, 1))
    except lanes.UnorderedMetadataError:
        return
    assert (y[:64, :128] != jnp.asarray(exact, x.dtype)[:64, :128]).any()


AHEAD = {
    "prefill": (4096, 4096, 4096, {}),
    "small tiles": (64, 128, 4096, {"dtype": "float16"}),
    "a vision transformer's mlp": (1024, 1152, 4304, {"bias": True}),
    "bias and activation": (1024, 1024, 1024, {"bias": True, "activation": "gelu"}),
}


@pytest.mark.aot
@pytest.mark.parametrize(("n", "m", "k", "options"), AHEAD.values(), ids=AHEAD.keys())
def test_compiled_ahead_of_time_it_holds_the_sparse_instruction(tmp_path, n, m, k, options):
    code = aot.compile_ptx(tmp_path / "kernel.ptx", "a100", "ampere", n, m, k, **options)
    name = "f16" if "dtype" in options else "bf16"
    assert f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{name}.{name}.f32" in code
    assert "mma.sync" not in code and "cp.async.cg.shared.global" in code
    resources = aot.resources(tmp_path / "kernel.ptx", "a100")
    print("ampere", n, m, k, options, resources)
    assert resources["spills"] == 0 and not resources["warnings"]
