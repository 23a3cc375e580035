"""Plans, states and compressed weights survive serialisation: bytes, pickle, export."""

import contextlib
import dataclasses
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from jax import export

import jaxsparse as js

PARAMS = {"a": {"w": jnp.arange(1.0, 33.0).reshape(8, 4)}, "b": jnp.ones(3)}
PLAN = js.plan(PARAMS, {"a/w": js.NM(2, 4, axis=0)})
PHASES = {"total_steps": 10, "dense_until": 1, "fine_tune_from": 5}


def packed(dtype=jnp.float32):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    return js.compress(params, js.magnitude_masks(params, PLAN), PLAN)


def test_bytes_of_a_state_without_a_framework():
    code = """
import flax.serialization, jax.numpy as jnp, optax
import jaxsparse as js
params = {"w": jnp.arange(8.0)}
plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
tx = js.recipes.mdgf(optax.adam(0.1), plan, total_steps=10)
state = tx.init(params)
again = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
assert js.masks(again)["w"].tolist() == js.masks(state)["w"].tolist()
assert again.plan == plan and again.forward.gradient == "masked"
packed = js.compress(params, js.magnitude_masks(params, plan), plan)
flax.serialization.from_bytes(packed, flax.serialization.to_bytes(packed))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "rules",
    [{"a/w": js.NM(1, 4, axis=0)}, {"a/w": js.Unstructured(0.5)}],
    ids=["another n", "unstructured"],
)
def test_bytes_of_another_plan_are_refused(rules):
    saved = js.rewire(optax.sgd(0.1), PLAN).init(PARAMS)
    other = js.rewire(optax.sgd(0.1), js.plan(PARAMS, rules)).init(PARAMS)
    with pytest.raises(ValueError, match="RewireState: the saved masks follow 2_4_along_-2"):
        serialization.from_bytes(other, serialization.to_bytes(saved))


def test_checkpoints_of_another_plan_are_refused(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    saved = js.rewire(optax.sgd(0.1), PLAN).init(PARAMS)
    other = js.rewire(optax.sgd(0.1), js.plan(PARAMS, {"a/w": js.NM(1, 4, axis=0)})).init(PARAMS)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "state", saved)
        np.testing.assert_array_equal(js.masks(again)["a"]["w"], js.masks(saved)["a"]["w"])
        with pytest.raises(ValueError, match="2_4_along_-2"):
            checkpointer.restore(tmp_path / "state", other)


def test_a_state_of_boxed_parameters_has_the_specs_of_its_leaves():
    params = {
        "kernel": nn.Partitioned(jnp.ones((8, 4)), ("rows", "columns")),
        "scale": nn.Partitioned(jnp.ones((8, 4)), ("rows", "columns")),
    }
    plan = js.plan(params, {"kernel": js.NM(2, 4, axis=0)})
    tx = js.rewire(optax.adam(0.1), plan)
    state = jax.eval_shape(tx.init, params)
    specs = nn.get_partition_spec(state)
    mesh = jax.make_mesh((1, 1), ("rows", "columns"))
    shardings = jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda spec: isinstance(spec, jax.sharding.PartitionSpec),
    )
    made = jax.jit(tx.init, out_shardings=shardings)(params)
    masks = js.masks(made)
    assert masks["kernel"].value.shape == (8, 4) and masks["scale"].value.shape == ()
    jax.tree.map(lambda p, m: None, params, masks)


@pytest.mark.parametrize(
    "rules",
    [
        {"a/w": js.NM(2, 4, axis=0)},
        {"a/w": js.TransposableNM(2, 4, axes=(0, 1))},
        {"a/w": js.Unstructured(0.25, scope="global")},
        {"a/w": js.Block((2, 2), 0.5, axes=(1, 0), pool="l2")},
    ],
    ids=["NM", "TransposableNM", "Unstructured", "Block"],
)
def test_training_steps_are_exported(rules):
    plan = js.plan(PARAMS, rules)
    tx = js.rewire(optax.scale(-0.1), plan)
    for state_type in (optax.EmptyState, optax.ScaleState):
        with contextlib.suppress(ValueError):  # an earlier case may have registered it
            name = f"optax.{state_type.__name__}"
            export.register_namedtuple_serialization(state_type, serialized_name=name)
    state = tx.init(PARAMS)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    exported = export.export(jax.jit(step))(PARAMS, state)
    again = export.deserialize(exported.serialize())
    result, expected = again.call(PARAMS, state), step(PARAMS, state)
    assert result[1].plan == plan
    jax.tree.map(np.testing.assert_allclose, result, expected)


def test_compressed_models_are_exported():
    weights, x = packed(), jnp.ones((3, 8))
    run = jax.jit(lambda packed, x: js.sparse_matmul(x, packed["a"]["w"]))
    exported = export.export(run)(weights, x)
    again = export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(weights, x), run(weights, x))


def test_a_plan_under_a_schedule_is_not_exported():
    density = js.gradual_density(0.5, begin=0, end=4)
    plan = js.plan(PARAMS, {"a/w": js.Unstructured(density)})
    state = js.rewire(optax.scale(-0.1), plan).init(PARAMS)
    exported = export.export(jax.jit(lambda state: state.count))(state)
    with pytest.raises(ValueError, match=r"jax.export: the density of a/w follows a schedule"):
        exported.serialize()


def test_patterns_and_schedules_are_pickled_and_compared():
    for make in (
        lambda: js.gradual_density(0.5, begin=0, end=4),
        lambda: js.linear_decay(0.1, begin=2),
        lambda: js.exponential_decay(0.1, begin=2, end=9),
        lambda: js.Unstructured(js.gradual_density(0.5, begin=0, end=4), scope="global"),
    ):
        assert pickle.loads(pickle.dumps(make())) == make()
        assert hash(make()) == hash(make())


# --- damaged compressed weights


def damaged(**changes):
    w = packed()["a"]["w"]
    return lambda: dataclasses.replace(w, **{name: f(w) for name, f in changes.items()})


BFLOAT16 = packed(jnp.bfloat16)["a"]["w"].with_layout("mma16")


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (damaged(metadata=lambda w: w.metadata.astype(jnp.int32)), "`metadata` are int32"),
        (damaged(metadata=lambda w: w.metadata.astype(jnp.uint8)), "`metadata` are uint8"),
        (damaged(metadata=lambda w: w.metadata[:1]), r"`metadata` have shape \(1, 1\)"),
        (damaged(values=lambda w: w.values[:, :2]), r"`values` of shape \(4, 2\) do not fit"),
        (damaged(values=lambda w: w.values > 0), "`values` are bool"),
        (damaged(values=lambda w: 3.0), "`values` is a float, not an array"),
        (damaged(contracting=lambda w: (16,)), r"contracting=\(16,\)"),
        (damaged(output=lambda w: (8,)), r"do not fit output=\(8,\)"),
        (damaged(layout=lambda w: "mma8"), "no metadata layout 'mma8'"),
        (damaged(layout=lambda w: "mma16"), "weights of 16 bits"),
        (damaged(metadata=lambda w: w.metadata ^ 0b1111), "the places in group 0 of row"),
        (damaged(metadata=lambda w: w.metadata * 0), "group 0 of row .* are 0 and 0"),
        (
            lambda: dataclasses.replace(BFLOAT16, metadata=BFLOAT16.metadata[..., :64]),
            "`metadata` have shape",
        ),
        (
            lambda: dataclasses.replace(BFLOAT16, metadata=BFLOAT16.metadata ^ 0xF),
            "the places in group 0 of row",
        ),
    ],
)
def test_damaged_weights_are_refused_where_they_enter(make, says):
    with pytest.raises((TypeError, ValueError), match=f"Sparse24: .*{says}"):
        make()


def test_every_bit_of_the_metadata_is_minded():
    """A flipped bit gives another valid pair of places, or is refused: no silent loss."""
    w = packed()["a"]["w"]
    refused = 0
    for bit in range(8):  # two groups of four
        words = w.metadata.at[0, 0].set(w.metadata[0, 0] ^ jnp.uint16(1 << bit))
        try:
            dense = js.decompress(dataclasses.replace(w, metadata=words))
        except ValueError:
            refused += 1
        else:
            assert (np.asarray(dense[:, 0]) != 0).sum() == 4
    assert refused >= 2


@pytest.mark.parametrize("use", ["sparse_matmul", "decompress", "with_layout"])
def test_what_entered_unchecked_is_checked_for_its_form_at_each_use(use):
    """A tree that is restored leaf by leaf does not go through a constructor."""
    w = jax.tree.map(lambda leaf: leaf, packed()["a"]["w"])
    values, metadata = jax.tree.leaves(w)
    wrong = jax.tree.unflatten(jax.tree.structure(w), [values, metadata.astype(jnp.int32)])
    calls = {
        "sparse_matmul": jax.jit(lambda w: js.sparse_matmul(jnp.ones((1, 8)), w)),
        "decompress": jax.jit(js.decompress),
        "with_layout": lambda w: w.with_layout("canonical"),
    }
    with pytest.raises(TypeError, match=f"{use}: `metadata` are int32"):
        calls[use](wrong)
    damaged = jax.tree.unflatten(jax.tree.structure(w), [values, metadata * 0])
    with pytest.raises(ValueError, match=r"Sparse24.check: the places in group 0"):
        damaged.check()
    assert w.check() is w


def test_places_are_checked_once(monkeypatch):
    from jaxsparse._packed import sparse24

    w, looked = packed()["a"]["w"], []
    places = sparse24.places
    monkeypatch.setattr(sparse24, "places", lambda *args: looked.append(1) or places(*args))
    for scale in range(3):
        dataclasses.replace(w, values=w.values * scale)
    assert len(looked) == 1
