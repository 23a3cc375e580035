"""Masks and products on several devices equal those on one, with no more communication than needed.

Masks of whole groups need none; a product receives the packed weight.
"""

import dataclasses
import json
import math
import pathlib
import re

import aot
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsparse as js

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
ROWS, COLUMNS = P("x", None), P(None, "x")
PHASES = {"total_steps": 4, "dense_until": 1, "fine_tune_from": 3}
RECIPES = {
    "explore_exploit": lambda inner, plan: js.recipes.explore_exploit(inner, plan, reset_every=2),
    "mdgf": lambda inner, plan: js.recipes.mdgf(inner, plan, **PHASES),
    "sdgf": lambda inner, plan: js.recipes.sdgf(inner, plan, **PHASES),
}
PIECES = jax.random.normal(jax.random.key(0), (64, 8))


def two_devices(axis_type=AxisType.Auto):
    return jax.make_mesh((2,), ("x",), axis_types=(axis_type,))


def two_of_four(axis=0):
    return js.NM(2, 4, axis=axis)


def one_of_sixteen():
    return js.NM(1, 16, axis=0)


# shape, pattern, how the weight is split, whether groups are whole on a device, axis type, recipe
CASES = {
    "2:4, columns": ((16, 8), two_of_four(), COLUMNS, True),
    "2:4, rows": ((16, 8), two_of_four(), ROWS, True),
    "2:4 along the last axis": ((8, 16), two_of_four(1), COLUMNS, True),
    "1:16, columns": ((64, 4), one_of_sixteen(), COLUMNS, True),
    "1:16, rows": ((64, 4), one_of_sixteen(), ROWS, True),
    "a group on two devices": ((12, 8), two_of_four(), ROWS, False),
    "explicit columns": ((16, 8), two_of_four(), COLUMNS, True, AxisType.Explicit, "mdgf"),
    "explicit rows": ((16, 8), two_of_four(), ROWS, True, AxisType.Explicit, "sdgf"),
}


def split_params(shape, pattern, spec, whole, axis_type=AxisType.Auto, recipe="explore_exploit"):
    """The plan, and the parameters on one device and on two."""
    params = {"b": jnp.zeros(shape[1]), "w": jax.random.normal(jax.random.key(0), shape)}
    sharding = NamedSharding(two_devices(axis_type), spec)
    split = {"b": params["b"], "w": jax.device_put(params["w"], sharding)}
    return js.plan(params, {"w": pattern}), params, split


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_masks_need_no_communication_where_groups_are_whole(case):
    plan, params, split = split_params(*case)
    masks = jax.jit(lambda params: js.magnitude_masks(params, plan))
    text = masks.lower(split).compile().as_text()
    whole = case[3]
    assert any(word in text for word in COLLECTIVES) != whole
    mask = masks(split)["w"]
    np.testing.assert_array_equal(mask, masks(params)["w"])
    if whole:
        assert mask.sharding.is_equivalent_to(split["w"].sharding, 2), mask.sharding


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_on_two_devices_equals_that_on_one(case):
    plan, params, split = split_params(*case)
    recipe = RECIPES[case[5] if len(case) > 5 else "explore_exploit"]
    tx = recipe(optax.adamw(0.1), plan)
    step = jax.jit(lambda params, state: tx.update(jax.tree.map(jnp.sin, params), state, params))
    state, state_split = tx.init(params), jax.jit(tx.init)(split)
    for _ in range(3):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        updates, state_split = step(split, state_split)
        split = optax.apply_updates(split, updates)
    np.testing.assert_array_equal(js.masks(state)["w"], js.masks(state_split)["w"])
    np.testing.assert_allclose(params["w"], split["w"], rtol=1e-6)

    pattern = plan.sparse["w"].pattern
    if pattern.m == 4:
        packed, packed_split = js.compress(params, state), js.compress(split, state_split)
        np.testing.assert_array_equal(packed["w"].metadata, packed_split["w"].metadata)
        x = jax.random.normal(jax.random.key(1), (3, params["w"].shape[pattern.axis]))
        y, y_split = (jax.jit(js.sparse_matmul)(x, one["w"]) for one in (packed, packed_split))
        np.testing.assert_allclose(y, y_split, rtol=1e-5, atol=1e-5)


# one for each algorithm
PATTERNS = [js.NM(n, m, axis=0) for n, m in ((2, 4), (1, 16), (2, 32), (3, 32))]
PATTERNS += [js.TransposableNM(2, 4, axes=(0, 1)), js.Unstructured(0.25)]
PATTERNS += [js.Block((4, 4), 0.5, axes=(0, 1))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_inside_shard_map_each_device_has_groups_of_its_own(pattern, dtype):
    def mask(w):
        return js.magnitude_masks({"w": w}, js.plan({"w": w}, {"w": pattern}))["w"]

    w = PIECES.astype(dtype)
    mapped = jax.shard_map(mask, mesh=two_devices(), in_specs=COLUMNS, out_specs=COLUMNS)
    expected = jnp.concatenate([mask(w[:, :4]), mask(w[:, 4:])], 1)
    np.testing.assert_array_equal(jax.jit(mapped)(w), expected)


def test_a_mask_under_set_mesh():
    with jax.set_mesh(two_devices(AxisType.Explicit)):
        w = jax.device_put(PIECES, COLUMNS)
        mask = jax.jit(lambda w: js.nm_mask(jnp.abs(w), 2, 4, axis=0))(w)
        np.testing.assert_array_equal(mask, js.nm_mask(np.abs(PIECES), 2, 4, axis=0))


@pytest.mark.parametrize("x_spec", [ROWS, P()], ids=["rows of x", "nothing"])
def test_gradients_inside_shard_map_equal_those_outside(x_spec):
    w = jax.random.normal(jax.random.key(0), (16, 8))
    plan = js.plan({"w": w}, {"w": js.TransposableNM(2, 4, axes=(0, 1))})
    packed = js.compress({"w": w}, js.magnitude_masks({"w": w}, plan), plan)["w"]
    x, bias = jax.random.normal(jax.random.key(1), (4, 16)), jnp.arange(8.0)

    def product(x, values, bias):
        with_values = dataclasses.replace(packed, values=values)
        return js.sparse_matmul(x, with_values, bias=bias, activation="gelu")

    def gradients(f):
        gradient = jax.grad(lambda *operands: jnp.sin(f(*operands)).sum(), (0, 1, 2))
        return jax.jit(gradient)(x, packed.values, bias)

    mapped = jax.shard_map(
        product, mesh=two_devices(), in_specs=(x_spec, P(), P()), out_specs=x_spec
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradients(mapped),
        gradients(product),
    )


K, M, N = 256, 512, 1024
DTYPES = {"canonical": jnp.float32, "mma16": jnp.bfloat16}
ROUNDING = {"canonical": 1e-5, "mma16": 2e-2}  # sums of a part of the terms are rounded


def mesh_of_eight():
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def packed_weight(layout="canonical", stack=()):
    w = jax.random.normal(jax.random.key(0), (*stack, K, M), DTYPES[layout])
    plan = js.plan({"w": w}, {"w": js.TransposableNM(2, 4, axes=(-2, -1))})
    return js.compress({"w": w}, js.magnitude_masks({"w": w}, plan), plan, layout=layout)["w"]


def placed(tree, spec, mesh):
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec)), tree)


# how x and the weight are divided
DIVISIONS = {
    "rows": (P("a"), P()),
    "rows, and the weight along the output": (P("a"), P("a")),
    "output features": (P(), P("b")),
    "rows and output features": (P("a"), P("b")),
    "the contraction": (P(None, "a"), P(None, "a")),
    "the contraction of the weight": (P(), P(None, "b")),
    "everything": (P(("a",), "b"), P(None, "b")),
    "nothing": (P(), P()),
}


@pytest.mark.parametrize("layout", ["canonical", "mma16"])
@pytest.mark.parametrize(("x_spec", "w_spec"), DIVISIONS.values(), ids=DIVISIONS)
def test_a_product_and_its_gradients_do_not_depend_on_the_division(x_spec, w_spec, layout):
    mesh, w = mesh_of_eight(), packed_weight(layout)
    x = jax.random.normal(jax.random.key(1), (64, K), w.dtype)
    bias = jnp.linspace(-1, 1, M)

    @jax.jit
    def product_and_gradients(x, values, bias, metadata):
        packed = dataclasses.replace(w, values=values, metadata=metadata)

        def loss(x, values, bias):
            weight = dataclasses.replace(packed, values=values)
            y = js.sparse_matmul(x, weight, bias=bias, activation="gelu")
            return jnp.sin(y.astype(jnp.float32)).sum(), y

        return jax.grad(loss, (0, 1, 2), has_aux=True)(x, values, bias)

    expected = product_and_gradients(x, w.values, bias, w.metadata)
    divided = product_and_gradients(
        placed(x, x_spec, mesh),
        placed(w.values, w_spec, mesh),
        placed(bias, P(), mesh),
        placed(w.metadata, w_spec, mesh),
    )
    for a, b in zip(jax.tree.leaves(divided), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING[layout] * abs(b).max())


def test_stacked_weights_and_weights_under_vmap_are_divided():
    mesh, stacked = mesh_of_eight(), packed_weight(stack=(4,))
    x = jax.random.normal(jax.random.key(1), (4, 6, K))
    expected = js.sparse_matmul(x, stacked)
    for spec in (P("a"), P(None, "a"), P(None, None, "b")):
        placed_weights = placed(stacked, spec, mesh)
        for product in (js.sparse_matmul, jax.vmap(js.sparse_matmul)):
            output = jax.jit(product)(placed(x, P("a"), mesh), placed_weights)
            np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


def received(program):
    """The elements that each all-gather of a compiled program returns."""
    gathers = re.findall(r"= (.+) all-gather(?:-done)?\(", program.compile().as_text())
    shapes = re.findall(r"\w+\[([\d,]+)\]", " ".join(gathers))
    return sum(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("layout", ["canonical", "mma16"])
def test_devices_receive_the_packed_weight(layout):
    mesh, w = mesh_of_eight(), packed_weight(layout)
    x, packed = placed(jnp.ones((N, K), w.dtype), P("a"), mesh), placed(w, P("a"), mesh)
    elements = received(jax.jit(js.sparse_matmul).lower(x, packed))
    assert elements == w.values.size + w.metadata.size
    dense = jax.jit(lambda x, w: js.sparse_matmul(x, w, implementation="dense")).lower(x, packed)
    assert received(dense) == K * M


def test_a_divided_product_is_exported():
    mesh, w = mesh_of_eight(), packed_weight()
    x, packed = placed(jnp.ones((N, K)), P("a"), mesh), placed(w, P("b"), mesh)
    product = jax.jit(
        lambda x, values, metadata: js.sparse_matmul(
            x, dataclasses.replace(w, values=values, metadata=metadata)
        )
    )
    exported = jax.export.export(product)(x, packed.values, packed.metadata)
    output = jax.jit(exported.call)(x, packed.values, packed.metadata)
    np.testing.assert_allclose(output, js.sparse_matmul(jnp.ones((N, K)), w), rtol=1e-4, atol=1e-4)


def test_dense_needs_no_devices_when_it_is_lowered():
    mesh = jax.sharding.AbstractMesh((4,), ("a",), axis_types=(AxisType.Auto,))
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P("a"))),
        (jnp.ones((N, K)), packed_weight()),
    )
    product = jax.jit(lambda x, w: js.sparse_matmul(x, w, implementation="dense"))
    product.trace(*arguments).lower(lowering_platforms=("cpu",))
    with pytest.raises(ValueError, match="AbstractMesh cannot be used"):
        jax.jit(js.sparse_matmul).trace(*arguments).lower(lowering_platforms=("cpu",))


@pytest.mark.aot
def test_gpus_run_the_kernel_each_on_its_share_and_receive_packed_weights():
    output = aot.in_process(pathlib.Path(__file__).parent / "several_gpus.py")
    by_case = json.loads(output.splitlines()[-1])
    packed = ["bf16[1024,256]", "u32[16,8,128]", "f32[1024]"]
    assert by_case["weights divided along the output"] == {
        "kernels": 1,
        "received": packed,
        "summed": 0,
    }
    assert by_case["output features on each device"] == {"kernels": 1, "received": [], "summed": 0}
    assert by_case["a divided contraction"]["kernels"] == 1
    assert by_case["dense"] == {
        "kernels": 0,
        "received": ["bf16[1024,512]", "f32[1024]"],
        "summed": 0,
    }
