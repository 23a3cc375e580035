"""Calls outside of jit compile once: the second compiles nothing."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

# sizes that no other test has, so that the first calls compile
W = jnp.asarray(np.random.default_rng(0).normal(size=(24, 36)), jnp.float32)
PARAMS = {"a": W, "b": {"w": jnp.asarray(W.T)}, "bias": jnp.ones(36)}
PATTERNS = {
    "2:4": js.NM(2, 4, axis=0),
    "1:3": js.NM(1, 3, axis=0),
    "transposable": js.TransposableNM(2, 4, axes=(0, 1)),
    "unstructured": js.Unstructured(0.3),
    "global": js.Unstructured(0.3, "global"),
    "blocks": js.Block((5, 7), 0.3, axes=(0, 1), pool="l2"),
}
COMPRESSIBLE = ("2:4", "transposable")


@contextlib.contextmanager
def compilations():
    """Counts, in `number`, the programs that are compiled or read from the persistent cache."""
    compiled = types.SimpleNamespace(number=0)

    def listen(event, duration, **_):
        compiled.number += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def calls(pattern):
    plan = js.plan(PARAMS, {"a": pattern, "b/*": pattern})
    masks = js.magnitude_masks(PARAMS, plan)
    tx = js.recipes.explore_exploit(optax.adam(1e-3), plan, reset_every=2)
    state = tx.init(PARAMS)
    yield "magnitude_masks", lambda: js.magnitude_masks(PARAMS, plan)
    yield "init", lambda: tx.init(PARAMS)
    yield "update", lambda: tx.update(PARAMS, state, PARAMS)
    yield "masks", lambda: js.masks(state)
    yield "effective_params", lambda: js.effective_params(PARAMS, state)
    if pattern in (PATTERNS[name] for name in COMPRESSIBLE):
        packed = js.compress(PARAMS, masks, plan)
        x = jnp.ones((5, 24))
        yield "compress", lambda: js.compress(PARAMS, masks, plan)
        yield "decompress", lambda: js.decompress(packed)
        yield "sparse_matmul", lambda: js.sparse_matmul(x, packed["a"], activation="gelu")
        yield (
            "sparsify",
            functools.partial(js.sparsify(lambda params, x: x @ params["a"]), packed, x),
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_the_second_call_compiles_nothing(name):
    for call, f in calls(PATTERNS[name]):
        jax.block_until_ready(f())
        with compilations() as compiled:
            jax.block_until_ready(f())
        assert compiled.number == 0, call


PHASES = {"total_steps": 6, "dense_until": 1, "fine_tune_from": 4}
RECIPES = {
    "mdgf": (js.recipes.mdgf, "2:4"),
    "sdgf": (js.recipes.sdgf, "2:4"),
    "gradual": (js.recipes.gradual, "unstructured"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_steps_of_a_schedule_compile_nothing(name):
    recipe, pattern = RECIPES[name]
    tx = recipe(optax.sgd(0.1), js.plan(PARAMS, {"a": PATTERNS[pattern]}), **PHASES)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with compilations() as compiled:
        for _ in range(6):
            _, state = tx.update(PARAMS, state, PARAMS)
    assert compiled.number == 0


def test_compilations_are_counted():
    with compilations() as compiled:
        jax.jit(lambda w: w * 3)(W)
        jax.jit(lambda w: w * 3)(W)
    assert compiled.number >= 2


def test_more_weights_than_an_int32_counts_are_refused():
    scores = jax.ShapeDtypeStruct((2**16, 2**15), jnp.int8)
    with pytest.raises(ValueError, match="2,147,483,648 weights are ranked together"):
        jax.eval_shape(lambda scores: js.topk_mask(scores, 0.5), scores)
