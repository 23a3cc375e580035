"""Masks on two devices: the same as on one, and without communication where groups are whole on
each device.
"""

import os
import subprocess
import sys

PROGRAM = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jaxsparse as js

assert jax.device_count() == 2
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

def explore_exploit(inner, plan):
    return js.recipes.explore_exploit(inner, plan, reset_every=2)

def mdgf(inner, plan):
    return js.recipes.mdgf(inner, plan, total_steps=4, dense_until=1, fine_tune_from=3)

def sdgf(inner, plan):
    return js.recipes.sdgf(inner, plan, total_steps=4, dense_until=1, fine_tune_from=3)

def check(shape, pattern, spec, quiet, axis_type=AxisType.Auto, recipe=rewired):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,))
    params = {"b": jnp.zeros(shape[1]), "w": jax.random.normal(jax.random.key(0), shape)}
    plan = js.plan(params, {"w": pattern})
    spec = NamedSharding(mesh, spec)
    split = {"b": params["b"], "w": jax.device_put(params["w"], spec)}
    masks = jax.jit(lambda params: js.magnitude_masks(params, plan))
    text = masks.lower(split).compile().as_text()
    assert any(word in text for word in COLLECTIVES) != quiet, (shape, pattern, spec)
    found = masks(split)["w"]
    np.testing.assert_array_equal(found, masks(params)["w"])
    if quiet:
        assert found.sharding.is_equivalent_to(spec, 2), found.sharding

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

    if pattern.m == 4:
        packed, packed_split = js.compress(params, state), js.compress(split, state_split)
        np.testing.assert_array_equal(packed["w"].metadata, packed_split["w"].metadata)
        x = jax.random.normal(jax.random.key(1), (3, shape[pattern.axis]))
        y, y_split = jax.jit(js.sparse_matmul)(x, packed["w"]), jax.jit(js.sparse_matmul)(x, packed_split["w"])
        np.testing.assert_allclose(y, y_split, rtol=1e-5, atol=1e-5)

rows, columns = PartitionSpec("x", None), PartitionSpec(None, "x")
check((16, 8), js.NM(2, 4, axis=0), columns, True)
check((16, 8), js.NM(2, 4, axis=0), rows, True)
check((8, 16), js.NM(2, 4, axis=1), columns, True)
check((16, 8), js.NM(2, 4, axis=0), columns, True, AxisType.Explicit, mdgf)
check((16, 8), js.NM(2, 4, axis=0), rows, True, AxisType.Explicit, sdgf)
check((64, 4), js.NM(1, 16, axis=0), columns, True)
check((64, 4), js.NM(1, 16, axis=0), rows, True)
check((12, 8), js.NM(2, 4, axis=0), rows, False)  # the boundary of the devices cuts a group

# inside shard_map every device has groups of its own; one pattern for each algorithm
pieces = jax.random.normal(jax.random.key(0), (64, 8))
mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
patterns = [js.NM(n, m, axis=0) for n, m in ((2, 4), (1, 16), (2, 32), (3, 32))]
patterns += [js.TransposableNM(2, 4, axes=(0, 1)), js.Unstructured(0.25), js.Block((4, 4), 0.5, axes=(0, 1))]
for dtype in ("float32", "bfloat16"):
    for pattern in patterns:
        def mask(w):
            return js.magnitude_masks({"w": w}, js.plan({"w": w}, {"w": pattern}))["w"]
        w = pieces.astype(dtype)
        found = jax.jit(jax.shard_map(mask, mesh=mesh, in_specs=columns, out_specs=columns))(w)
        np.testing.assert_array_equal(found, jnp.concatenate([mask(w[:, :4]), mask(w[:, 4:])], 1), str(pattern))
with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))):
    w = jax.device_put(pieces, columns)
    np.testing.assert_array_equal(jax.jit(lambda w: js.nm_mask(jnp.abs(w), 2, 4, axis=0))(w), js.nm_mask(np.abs(pieces), 2, 4, axis=0))

w = jax.random.normal(jax.random.key(0), (16, 8))
plan = js.plan({"w": w}, {"w": js.TransposableNM(2, 4, axes=(0, 1))})
packed = js.compress({"w": w}, js.magnitude_masks({"w": w}, plan), plan)["w"]
x, bias = jax.random.normal(jax.random.key(1), (4, 16)), jnp.arange(8.0)
mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

def product(x, values, bias):
    return js.sparse_matmul(x, dataclasses.replace(packed, values=values), bias=bias, activation="gelu")

def gradients(f):
    return jax.jit(jax.grad(lambda *operands: jnp.sin(f(*operands)).sum(), (0, 1, 2)))(x, packed.values, bias)

expected = gradients(product)
for specs in ((rows, PartitionSpec(), PartitionSpec()), (PartitionSpec(),) * 3):
    found = gradients(jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=specs[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
print("done")
"""


def test_masks_of_sharded_weights():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.endswith("done\n")
