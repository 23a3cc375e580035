"""The decode kernel without a GPU: in interpret mode, and its compiled code in emulation."""

import dataclasses

import aot
import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from problems import problem

from jaxsparse._kernels import ACTIVATIONS, KERNELS, decode

# jax 0.10 aborts the process when it compiles for Ampere
GPUS = [
    gpu
    for gpu in KERNELS["decode"].targets
    if not KERNELS["decode"].unavailable(aot.CAPABILITY[gpu])
]
interpret = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 interprets too little"
)
CONFIGS = {
    "one tile": (8, 64, 256, {}),
    "rows and steps that do not fill": (5, 128, 320, {"tile_m": 32, "unroll": 2}),
    "many rows": (64, 128, 256, {"tile_m": 64, "unroll": 1, "warpgroups": 4}),
    "one row": (1, 64, 64, {"tile_m": 16, "unroll": 4}),
    "an odd number of output features, part of a step": (
        3,
        77,
        80,
        {"tile_m": 32, "unroll": 1, "warpgroups": 2},
    ),
    "a contraction that is padded": (9, 100, 636, {"tile_m": 64, "unroll": 1, "warpgroups": 2}),
}


@pytest.mark.slow
@interpret
@pytest.mark.parametrize(("n", "m", "k", "config"), CONFIGS.values(), ids=CONFIGS.keys())
def test_the_whole_kernel_is_exact(n, m, k, config):
    x, w, bias, exact = problem(n, m, k)
    config = decode.Config(**config)
    y = decode.matmul(
        x, w.values, w.metadata, config=config, ops=interpreted.decode_ops, **interpreted.params()
    )
    np.testing.assert_array_equal(y, jnp.asarray(exact, x.dtype))
    y = decode.matmul(
        x,
        w.values,
        w.metadata,
        bias,
        activation="relu",
        config=config,
        ops=interpreted.decode_ops,
        **interpreted.params(),
    )
    np.testing.assert_array_equal(y, jnp.asarray(ACTIVATIONS["relu"](exact + bias), x.dtype))


EXECUTED = {
    "one tile for each warp": (16, 64, 256, {"config": {"tile_m": 16, "unroll": 1}}),
    "rows and steps that do not fill": (
        5,
        128,
        320,
        {"config": {"tile_m": 64, "unroll": 2}, "bias": True},
    ),
    "two warpgroups, nothing fills": (
        3,
        77,
        80,
        {"config": {"tile_m": 32, "unroll": 2, "warpgroups": 2}, "bias": True},
    ),
    "two warpgroups, everything fills": (
        8,
        64,
        1024,
        {"config": {"tile_m": 64, "unroll": 2, "warpgroups": 2}},
    ),
    "a contraction that is padded": (9, 40, 164, {}),
    "as it would choose": (1, 64, 1024, {}),
}


@pytest.mark.aot
@pytest.mark.parametrize("case", EXECUTED)
def test_the_compiled_kernel_is_exact(tmp_path, case):
    n, m, k, options = EXECUTED[case]
    gpu = GPUS[list(EXECUTED).index(case) % len(GPUS)]
    code = aot.compile_ptx(tmp_path / "kernel.ptx", gpu, "decode", n, m, k, **options)
    x, w, bias, exact = problem(n, m, k)
    with_bias, tile_m = "bias" in options, options.get("config", {"tile_m": 16})["tile_m"]
    spare = -k % 16  # the kernel's operands are padded before the call
    x, w = (
        jnp.pad(x, ((0, 0), (0, spare))),
        dataclasses.replace(
            w,
            values=jnp.pad(w.values, ((0, 0), (0, spare // 2))),
            contracting=(k + spare,),
            metadata=w.metadata,
        ),
    )
    y = ptx.product(
        code,
        x,
        w,
        bias if with_bias else None,
        (n, m),
        (-(-m // tile_m), 1, 1),
        "bias y metadata values x",
    )
    np.testing.assert_array_equal(y, jnp.asarray(exact + bias * with_bias, x.dtype))


@pytest.mark.aot
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("n", "m", "k"), [(16, 14336, 4096), (1, 50257, 1600), (64, 4096, 14336)])
def test_compiled_ahead_of_time_it_holds_the_sparse_instruction(tmp_path, gpu, n, m, k):
    code = aot.compile_ptx(
        tmp_path / "kernel.ptx", gpu, "decode", n, m, k, bias=True, activation="silu"
    )
    assert "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32" in code
    resources = aot.resources(tmp_path / "kernel.ptx", gpu)
    print("decode", gpu, n, m, k, resources)
    assert resources["spills"] == 0 and not resources["warnings"]
