"""One product for every device: which kernel is chosen, what is refused and why, and that the fallback does the same everywhere."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from problems import problem

import jaxsparse as js
from jaxsparse import matmul
from jaxsparse.kernels import ACTIVATIONS, KERNELS, misfit, preferred, unavailable

LOWERED = pathlib.Path(__file__).parent / "lowered.py"
OLD = jax.__version_info__ < (0, 11)
FOUND = {
    "decode, many weights": "decode",
    "decode on Ampere": "dense" if OLD else "decode",
    "decode, few weights": "dense",
    "prefill": "hopper",
    "prefill with bias": "hopper",
    "prefill on Ampere": "dense",
    "between": "dense",
    "float32": "dense",
    "canonical metadata": "dense",
    "a weight that would be copied": "dense",
    "a result that would be copied": "dense",
    "sizes that fill no tile": "hopper",
    "forced on a weight that is copied": "hopper",
    "forced dense": "dense",
    "forced hopper": "hopper",
    "forced decode": "decode",
    "forced ampere": "for compute capability 8.0 needs jax 0.11" if OLD else "ampere",
    "hopper on Ampere": 'NotImplementedError: sparse_matmul: "hopper" cannot compute this: it needs compute capability 9.0',
    "ampere on Hopper": "it needs compute capability 8.0 to 8.9, and this device has 9.0",
    "decode forced on Ampere": "for compute capability 8.0 needs jax 0.11" if OLD else "decode",
}


@pytest.fixture(scope="module")
def found():
    return json.loads(aot.in_process(LOWERED).splitlines()[-1])


@pytest.mark.parametrize("case", FOUND)
def test_the_lowered_program_shows_the_kernel(found, case):
    assert FOUND[case] in found[case]
    assert found.keys() == FOUND.keys()


COMPILED = {"prefill with bias": "wgmma.mma_async.sp", "decode, many weights": "mma.sp::ordered_metadata"}
COMPILED |= {} if OLD else {"forced ampere": "mma.sp::ordered_metadata"}


@pytest.mark.parametrize("case", COMPILED)
def test_what_is_lowered_compiles_to_the_sparse_instruction(case):
    assert COMPILED[case] in aot.printed_ptx(LOWERED, case)


def test_nothing_of_the_gpu_is_imported_without_a_gpu():
    code = """
import sys, jax, jax.numpy as jnp, jaxsparse as js
w = js.Sparse24(jnp.ones((8, 2)), jnp.full((8, 1), 0x4444, jnp.uint16), (4,), (8,))
js.sparse_matmul(jnp.ones((2, 4)), w).block_until_ready()
print([name for name in sys.modules if name.startswith(("jax.experimental.pallas", "jax.experimental.mosaic", "jaxsparse.kernels."))])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("cpu", "cuda", "rocm", "tpu")], ids="-".join)
@pytest.mark.parametrize("layout", ["canonical", "mma16"])
def test_it_exports_for_every_platform_at_once(platforms, layout):
    x, w, bias, exact = problem(8, 128, 64, layout=layout)

    def product(x, values, metadata, bias):
        return js.sparse_matmul(x, dataclasses.replace(w, values=values, metadata=metadata), bias=bias, activation="relu")

    arguments = x, w.values, w.metadata, bias
    exported = export.export(jax.jit(product), platforms=platforms)(*arguments)
    again = export.deserialize(exported.serialize())
    assert again.platforms == platforms and "mosaic" not in again.mlir_module()
    if "cpu" in platforms:
        np.testing.assert_array_equal(again.call(*arguments), jnp.asarray(np.maximum(exact + bias, 0), x.dtype))


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_forced_kernel_says_why_it_cannot_run(implementation):
    x, w, _, _ = problem(8, 128, 64)
    with pytest.raises(NotImplementedError, match=f'"{implementation}" cannot compute this: it needs a CUDA device'):
        js.sparse_matmul(x, w, implementation=implementation)
    with pytest.raises(ValueError, match="takes bfloat16 and float16, and these are float32"):
        js.sparse_matmul(x.astype(jnp.float32), w, implementation=implementation)
    stack = jax.tree.map(lambda leaf: leaf[None], w)
    with pytest.raises(ValueError, match="this is a stack of shape"):
        js.sparse_matmul(x[None], stack, implementation=implementation)


def test_other_arguments_that_do_not_fit_are_refused():
    x, w, bias, _ = problem(65, 128, 64)
    with pytest.raises(ValueError, match="1 to 64 rows, and these are 65"):
        js.sparse_matmul(x, w, implementation="decode")
    with pytest.raises(ValueError, match="no implementation 'cutlass'"):
        js.sparse_matmul(x, w, implementation="cutlass")
    with pytest.raises(ValueError, match="no activation 'tanh'"):
        js.sparse_matmul(x, w, activation="tanh")
    with pytest.raises(ValueError, match=r"`bias` of shape \(64,\) does not fit `w`, which needs \(128,\)"):
        js.sparse_matmul(x, w, bias=bias[:64])


def test_guards_on_every_device():
    fits = {c: [k for k in KERNELS if unavailable(k, c) is None] for c in [None, (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]}
    before_hopper = [] if OLD else ["ampere", "decode"]
    assert fits == {
        None: [],
        (7, 5): [],
        (8, 0): before_hopper,
        (8, 9): before_hopper,
        (9, 0): ["hopper", "decode"],
        (10, 0): ["decode"],
        (12, 0): ["decode"],
    }
    bf16 = jnp.dtype("bfloat16")
    assert misfit("hopper", 0, bf16, ()) == "there are no rows" and misfit("hopper", 65, bf16, ()) is None
    assert preferred(8, 14337, 4096, bf16, (), (9, 0)) == "decode" and preferred(8, 14336, 4100, bf16, (), (9, 0)) == "dense"
    assert preferred(1, 14336, 4096, bf16, (), (10, 0)) == preferred(1, 14336, 4096, bf16, (), None) == "dense"
    assert preferred(8192, 8192, 8192, bf16, (), (9, 0)) == "hopper" and preferred(8192, 8192, 8192, bf16, (4,), (9, 0)) == "dense"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["canonical", "mma16"])
def test_the_fallback_with_bias_and_activation(activation, layout):
    x, w, bias, exact = problem(8, 128, 64, layout=layout)
    y = js.sparse_matmul(x, w, bias=bias, activation=activation)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, ACTIVATIONS[activation](jnp.asarray(exact) + bias).astype(x.dtype))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_do_not_depend_on_the_layout(activation):
    x, w, bias, _ = problem(8, 128, 64)
    x, bias = x / 16, bias / 16
    ct = jnp.asarray(np.random.default_rng(1).integers(-3, 4, (8, 128)), x.dtype)

    def loss(x, values, bias, layout):
        packed = js.Sparse24(values, w.with_layout(layout).metadata, w.contracting, w.output, layout=layout)
        return (js.sparse_matmul(x, packed, bias=bias, activation=activation) * ct).sum(dtype=jnp.float32)

    def dense(x, values, bias):
        packed = js.Sparse24(values, w.with_layout("canonical").metadata, w.contracting, w.output)
        y = jnp.dot(x, js.decompress(packed), preferred_element_type=jnp.float32).astype(x.dtype)
        return (ACTIVATIONS[activation](y.astype(jnp.float32) + bias).astype(x.dtype) * ct).sum(dtype=jnp.float32)

    expected = jax.grad(dense, (0, 1, 2))(x, w.values, bias)
    for layout in ("canonical", "mma16"):
        for got, want in zip(jax.grad(loss, (0, 1, 2))(x, w.values, bias, layout), expected, strict=True):
            np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=2e-2, atol=2e-1)


def test_batches_of_everything():
    problems = [problem(8, 128, 64, seed=seed) for seed in range(2)]
    x, w, bias = (jax.tree.map(lambda *a: jnp.stack(a), *parts) for parts in list(zip(*problems, strict=True))[:3])

    def product(x, w, bias):
        return js.sparse_matmul(x, w, bias=bias, activation="relu")

    expected = jnp.stack([product(*one[:3]) for one in problems])
    np.testing.assert_array_equal(jax.vmap(product)(x, w, bias), expected)
    np.testing.assert_array_equal(product(x, w, bias), expected)  # a stack of weights
    one = jax.vmap(product, (0, None, None))(x, problems[0][1], problems[0][2])
    np.testing.assert_array_equal(one[0], expected[0])


def module(capabilities=("9.0",), platforms=("cuda",), for_export=False, **context):
    """What a lowering rule is told of its module, for GPUs that a test does not have."""
    devices = [SimpleNamespace(compute_capability=c) for c in capabilities]
    return SimpleNamespace(
        backend=SimpleNamespace(devices=lambda: devices),
        platforms=platforms,
        lowering_parameters=SimpleNamespace(for_export=for_export),
        axis_context=SimpleNamespace(**context),
    )


def test_the_device_is_known_only_where_there_is_no_doubt():
    mesh = SimpleNamespace(axis_names=("a", "b"))

    def known(**options):
        device, reason = matmul._device(module(**options))
        return matmul._capability(device), reason and reason[:12]

    assert known(num_devices=1) == known(manual_axes={"a", "b"}, mesh=mesh) == ((9, 0), None)
    assert known(num_devices=1, for_export=True) == known(num_devices=1, platforms=("cpu", "cuda")) == (None, None)
    assert known(num_devices=1, capabilities=("9.0", "8.0")) == known(num_devices=1, capabilities=("gfx90a",)) == (None, None)
    assert known(num_devices=2) == known(manual_axes={"a"}, mesh=mesh) == ((9, 0), "the compiler")
