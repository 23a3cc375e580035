"""Plans from rules on bare pytrees; test_flax_plan.py tests plans learned from models."""

import collections
import dataclasses
import functools
import pickle
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

NM = js.NM(2, 4, axis=0)


class Block(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cell:
    kernel: jax.Array


def tree():
    block = Block(jnp.zeros((8, 4)), jnp.zeros(4))
    return {
        "blocks": [block, block],
        "cell": Cell(jnp.zeros((4, 2))),
        "head": (jnp.zeros((6, 4)), jnp.zeros(())),
    }


def patterns(plan):
    return {leaf.path: str(leaf.pattern) if leaf.pattern else leaf.reason for leaf in plan.leaves}


def test_paths_run_through_dicts_lists_tuples_and_named_tuples_in_tree_order():
    plan = js.plan(tree(), {"*": None})
    paths = [
        "blocks/0/kernel",
        "blocks/0/bias",
        "blocks/1/kernel",
        "blocks/1/bias",
        "cell/kernel",
        "head/0",
        "head/1",
    ]
    assert [leaf.path for leaf in plan.leaves] == paths
    assert [leaf.shape for leaf in plan.leaves] == [
        jnp.shape(leaf) for leaf in jax.tree.leaves(tree())
    ]


class Attention(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


def test_a_field_may_be_called_value():
    params = {"attention": Attention(*[jnp.ones((8, 4))] * 3)}
    plan = js.plan(params, {"attention/*": NM})
    assert list(plan.sparse) == ["attention/query", "attention/key", "attention/value"]


def test_a_plan_that_was_pickled_does_not_keep_the_hash_of_its_process():
    plan = js.plan(tree(), {"blocks/0/*": NM})
    assert hash(plan) and plan.sparse
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan and vars(again).keys() == {"leaves"}


def test_every_leaf_says_its_pattern_or_why_it_is_dense():
    plan = js.plan(
        tree(),
        {"blocks/0/*": NM, "head/*": NM, "cell/*": None, "blocks/1/kernel": js.NM(1, 4, axis=-1)},
    )
    assert patterns(plan) == {
        "blocks/0/kernel": "2:4",
        "blocks/0/bias": "2:4",
        "blocks/1/kernel": "1:4",
        "blocks/1/bias": "no rule matches",
        "cell/kernel": "rule 'cell/*' says dense",
        "head/0": "axis 0 has size 6, not a multiple of m=4",
        "head/1": "it is a scalar",
    }
    assert set(plan.sparse) == {"blocks/0/kernel", "blocks/0/bias", "blocks/1/kernel"}


@pytest.mark.parametrize(("axis", "from_end"), [(0, -3), (1, -2), (2, -1), (-3, -3), (-1, -1)])
def test_axes_count_from_the_end(axis, from_end):
    (leaf,) = js.plan({"w": jnp.zeros((4, 8, 12))}, {"w": js.NM(2, 4, axis=axis)}).leaves
    assert leaf.pattern == js.NM(2, 4, axis=from_end)


def test_the_first_rule_that_matches_decides():
    w = {"a": jnp.zeros((8, 8)), "b": jnp.zeros((8, 8))}
    one, two = js.NM(1, 4, axis=0), js.NM(2, 8, axis=1)
    assert patterns(js.plan(w, {"a": one, "*": two})) == {"a": "1:4", "b": "2:8"}
    assert patterns(js.plan(w, {"*": two, "a": one})) == {"a": "2:8", "b": "2:8"}
    assert patterns(js.plan(w, {"a": None, "*": two}))["a"] == "rule 'a' says dense"


@pytest.mark.parametrize(
    ("rule", "paths"),
    [
        ("*", {"a/b/w", "a/w", "w1", "w2"}),
        ("*/w", {"a/b/w", "a/w"}),
        ("a/*", {"a/b/w", "a/w"}),
        ("w?", {"w1", "w2"}),
        ("w[1]", {"w1"}),
        ("w[!1]", {"w2"}),
        ("a/w", {"a/w"}),
        ("params/a/w", {"a/w"}),
        ("params/*", {"a/b/w", "a/w", "w1", "w2"}),
    ],
)
@pytest.mark.parametrize("prefix", [False, True])
def test_wildcards_and_the_params_prefix(rule, paths, prefix):
    w = jnp.zeros(4)
    params = {"a": {"b": {"w": w}, "w": w}, "w1": w, "w2": w}
    plan = js.plan({"params": params} if prefix else params, {rule: NM})
    assert set(plan.sparse) == paths


def test_a_key_with_brackets_is_matched_by_its_own_name():
    assert set(js.plan({"w[0]": jnp.zeros(4), "w0": jnp.zeros(4)}, {"w[0]": NM}).sparse) == {
        "w[0]",
        "w0",
    }


def test_a_single_array_is_a_tree():
    plan = js.plan(jnp.zeros((4, 4)), {"*": NM})
    assert js.magnitude_masks(jnp.ones((4, 4)), plan).sum() == 8


def test_order_of_keys_and_kind_of_mapping_do_not_matter_to_paths():
    params = collections.OrderedDict(z=jnp.zeros(4), a=jnp.zeros(8))
    assert [leaf.path for leaf in js.plan(params, {"z": NM}).leaves] == ["z", "a"]
    assert set(js.plan({"z": jnp.zeros(4)}, collections.OrderedDict(z=NM)).sparse) == {"z"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "uint8"])
def test_real_dtypes_can_be_sparse(dtype):
    assert js.plan({"w": jnp.zeros(4, dtype)}, {"w": NM}).sparse


def test_other_dtypes_stay_dense_with_a_reason():
    params = {
        "c": jnp.zeros(4, "complex64"),
        "k": jax.random.split(jax.random.key(0), 4),
        "m": jnp.zeros(4, bool),
    }
    by_path = patterns(js.plan(params, {"*": NM}))
    assert by_path["c"] == "complex64 cannot be ranked"
    assert by_path["m"] == "bool cannot be ranked"
    assert by_path["k"].endswith("cannot be ranked")


def test_shapes_are_enough():
    huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.bfloat16)
    plan = js.plan({"w": huge}, {"w": NM})
    assert plan == js.plan({"w": huge}, {"w": js.NM(2, 4, axis=-2)})
    assert plan.leaves[0].shape == huge.shape and "1,099,511,627,776" in str(plan)
    arrays = {"w": np.zeros((8, 4), "float32")}
    assert js.plan(arrays, {"w": NM}) == js.plan(
        jax.eval_shape(lambda: jax.tree.map(jnp.asarray, arrays)), {"w": NM}
    )


def test_a_plan_is_a_static_value():
    plan, same, other = (
        js.plan(tree(), {"blocks/*": NM}),
        js.plan(tree(), {"blocks/*": NM}),
        js.plan(tree(), {"cell/*": NM}),
    )
    assert plan == same and hash(plan) == hash(same) and plan != other
    assert jax.tree.leaves(plan) == []
    assert jax.tree.structure(plan) == jax.tree.structure(same) != jax.tree.structure(other)
    assert jax.jit(lambda plan: plan)(plan) == plan


def test_equal_plans_do_not_retrace():
    w = jnp.arange(32.0).reshape(8, 4)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def masks(plan, w):
        return js.magnitude_masks({"w": w}, plan)

    for _ in range(3):
        masks(js.plan({"w": w}, {"w": NM}), w)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        masks(js.plan({"w": w}, {"w": js.NM(1, 4, axis=0)}), w)


def test_a_plan_travels_in_an_optimizer_state_through_jit():
    params = {"w": jnp.arange(8.0), "b": jnp.ones(3)}
    tx = js.rewire(optax.sgd(0.1), js.plan(params, {"w": NM}))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert state.plan == js.plan(params, {"w": NM})


def test_the_report_names_every_leaf_and_the_totals():
    report = str(js.plan(tree(), {"blocks/0/*": NM, "head/*": NM}))
    for leaf in ("blocks/0/kernel", "cell/kernel", "head/1"):
        assert leaf in report
    assert (
        "8x4" in report
        and "scalar" in report
        and "axis 0 has size 6, not a multiple of m=4" in report
    )
    total, planned = 36 + 36 + 8 + 24 + 1, 36
    kept = total - planned // 2
    assert report.splitlines()[-2:] == [
        f"2 of 7 leaves are sparse, with {planned} of {total} weights; {kept} weights participate "
        f"(density {kept / total:.3f}).",
        "Compressed, they take 62 bytes less.",
    ]
    assert "0 of 0 leaves" in str(js.plan({}, {}))


def test_trees_with_arrays_in_their_metadata_have_paths():
    @functools.partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["places"])
    @dataclasses.dataclass
    class Layer:
        w: jax.Array
        places: np.ndarray

    for _ in range(3):  # the structures hash alike and cannot be compared
        params = {"layer": Layer(jnp.ones((8, 2)), np.arange(2))}
        plan = js.plan(params, {"layer/w": js.NM(2, 4, axis=0)})
        assert list(plan.sparse) == ["layer/w"]


X16 = jnp.zeros((2, 16), "float16")
# what the plan notes about a weight of shape `[*inner, 4]` under a wildcard; None if it is sparse
SWEPT = {
    ("up/kernel", (32,), "float32", "2:4"): None,
    ("up/kernel", (16,), "bfloat16", "2:4"): None,
    ("up/kernel", (24,), "bfloat16", "2:4"): "sums over 24, not a multiple of 16",
    ("up/kernel", (24,), "bfloat16", js.TransposableNM(2, 4)): "sums over 24, not a multiple of 16",
    ("up/kernel", (48,), "int8", "2:4"): "sums over 48, not a multiple of 32",
    ("up/kernel", (64,), "int8", "2:4"): None,
    ("up/kernel", (3, 3, 4), "float32", "2:4"): "sums over 36, not a multiple of 16",
    ("up/kernel", (2, 2, 4), "float32", "2:4"): None,
    ("up/kernel", (24,), "float32", "1:4"): None,
    ("up/kernel", (24,), "float32", js.Unstructured(0.5)): None,
    ("lm_head/kernel", (32,), "float32", "1:4"): "lm_head is the name of a head",
    ("decoder/logits_dense/kernel", (32,), "float32", "2:4"): "logits_dense is the name of a head",
    ("classifier", (32,), "float32", "2:4"): "classifier is the name of a head",
    ("head/w", (32,), "float32", js.Block((2, 2), 0.5)): "head is the name of a head",
    ("multihead/kernel", (32,), "float32", "2:4"): None,
    ("pre_logits/kernel", (32,), "float32", "2:4"): None,
    ("heads/0/kernel", (32,), "float32", "2:4"): None,
}


@pytest.mark.parametrize("case", SWEPT, ids=str)
def test_a_wildcard_leaves_dense_what_the_papers_leave_dense(case):
    path, inner, dtype, pattern = case
    params = jnp.zeros((*inner, 4), dtype)
    for name in reversed(path.split("/")):
        params = {name: params}

    def fn(params, x):
        (w,) = jax.tree.leaves(params)
        return jnp.tensordot(x, w, len(inner))

    def reason(rules):
        (leaf,) = js.plan(params, rules, fn, jnp.zeros((2, *inner), dtype)).leaves
        return None if leaf.pattern else leaf.reason

    for rule in ("*", path[:-1] + "?", path[:-1] + f"[{path[-1]}]"):
        assert reason({rule: pattern}) == SWEPT[case]
        assert reason({rule: js.anywhere(pattern)}) is None
    assert reason({path: pattern}) is None
    if isinstance(pattern, str):
        n, m = map(int, pattern.split(":"))
        assert reason({"*": js.NM(n, m, axis=len(inner) - 1)}) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_saved_are_those_that_compress_saves(dtype):
    params = {
        "odd": jnp.zeros((8, 24, 5), dtype),
        "stack": jnp.zeros((3, 32, 4), dtype),
        "both": jnp.zeros((16, 8), dtype),
    }

    def fn(params, x):
        y = [x[:, :8] @ params["odd"].reshape(8, -1), x @ params["both"]]
        return y, jnp.einsum("rk,skm->srm", jnp.concatenate([x, x], -1), params["stack"])

    patterns = {"odd": "2:4", "stack": "2:4", "both": js.TransposableNM(2, 4)}
    plan = js.plan(params, patterns, fn, jnp.zeros((2, 16), dtype))
    packed = js.compress(params, js.magnitude_masks(params, plan), plan, layout="canonical")
    for name, w in packed.items():
        saved = params[name].nbytes - w.values.nbytes - w.metadata.nbytes
        assert plan.sparse[name].bytes_saved == saved
    assert plan == js.plan(jax.tree.map(lambda w: w.astype("float16"), params), patterns, fn, X16)
    other = js.plan({"w": params["both"]}, {"w": js.NM(1, 4, axis=0)})
    assert other.sparse["w"].bytes_saved == 0 and "Compressed" not in str(other)
