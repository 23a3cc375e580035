"""Bad input raises a ValueError or TypeError with the call, leaf, both numbers and remedy."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import jaxsparse as js

NM = js.NM
V = jnp.ones(4)
S = jnp.ones((6, 3))
YES = jnp.ones(4, bool)
PARAMS = {"a": {"w": jnp.arange(32.0).reshape(8, 4)}, "b": jnp.zeros(4)}
OTHER = {"c": jnp.zeros((8, 4))}
RESHAPED = {"a": {"w": jnp.zeros((4, 4))}, "b": jnp.zeros(4)}
PLAN = js.plan(PARAMS, {"a/w": NM(2, 4, axis=0)})
FREE = js.plan(PARAMS, {"a/w": js.Unstructured(0.5)})
BOTH_AXES = js.plan(PARAMS, {"a/w": js.TransposableNM(2, 4, (0, 1))})
DENSE = js.plan(PARAMS, {"*": None})
GRADUAL = js.plan(PARAMS, {"a/w": js.Unstructured(js.gradual_density(0.5, begin=0, end=9))})
TX = js.rewire(optax.sgd(0.1), PLAN)
STATE = TX.init(PARAMS)
MASKS = js.masks(STATE)
UNMASKED = optax.adam(0.1).init(PARAMS)
ONE_OF_FOUR = js.rewire(optax.sgd(0.1), js.plan(PARAMS, {"a/w": NM(1, 4, axis=0)})).init(PARAMS)
FULL = {"a": {"w": jnp.ones((8, 4), bool)}, "b": jnp.asarray(True)}
CHECKERS = {"w": jnp.indices((4, 4)).sum(0) % 2 == 0}
W = js.compress(PARAMS, STATE)["a"]["w"]
STACK = jax.tree.map(lambda a: jnp.stack([a] * 3), W)
X = jnp.ones((1, 8))


def nm(scores=V, n=2, m=4, axis=0):
    return lambda: js.nm_mask(scores, n, m, axis=axis)


def traced_n(n):
    return lambda: jax.jit(lambda n: js.nm_mask(V, n, 4, axis=0))(n)


def plan(rules, params=PARAMS):
    return lambda: js.plan(params, rules)


def update(tx, updates=PARAMS, params=PARAMS, state=None, **masks):
    return lambda: tx.update(updates, tx.init(PARAMS) if state is None else state, params, **masks)


def flax(rules, model=None):
    return lambda: js.flax.plan(nn.Dense(4) if model is None else model, rules, X)


def intercepted(params):
    def run():
        with js.flax.intercept(
            js.magnitude_masks(
                {"kernel": jnp.ones((8, 4))}, js.flax.plan(nn.Dense(4), {"kernel": "2:4"}, X)
            )
        ):
            nn.Dense(4).apply({"params": params}, jnp.ones((1, params["kernel"].shape[0])))

    return run


def density(final=0.5, begin=0, end=10, **kwargs):
    return lambda: js.gradual_density(final, begin=begin, end=end, **kwargs)


def recipe(name, plan=PLAN, **kwargs):
    steps = {} if name in ("explore_exploit", "sr_ste", "static") else {"total_steps": 20}
    return lambda: getattr(js.recipes, name)(optax.sgd(0.1), plan, **{**steps, **kwargs})


# the call, the name at the start of the message, the rest of the message, and a distinguishing word
# if another row has the same message
VALUES = [
    (
        nm(S),
        "nm_mask",
        "axis 0 .* size 6, not a multiple of m=4 .*2:4, shape (6, 3).* Choose another axis, pad "
        "it, or leave",
    ),
    (nm(S, 1, 2, -1), "nm_mask", "axis -1 .* size 3, not a multiple of m=2"),
    (nm(n=5), "nm_mask", "n=5 is not in 1..m=4"),
    (nm(n=0), "nm_mask", "n=0 is not in 1..m=4"),
    (nm(n=-1), "nm_mask", "n=-1 is not in 1..m=4"),
    (nm(n=1, m=0), "nm_mask", "n=1 is not in 1..m=0"),
    (nm(axis=1), "nm_mask", "axis 1 is out of range .* shape (4,)"),
    (nm(axis=-2), "nm_mask", "axis -2 is out of range .* shape (4,)"),
    (nm(jnp.ones(())), "nm_mask", "axis 0 is out of range .* shape ()"),
    (lambda: NM(5, 4), "NM", "n=5 is not in 1..m=4.* as in NM(2, 4)"),
    (lambda: NM(0, 4), "NM", "n=0 is not in 1..m=4"),
    (
        lambda: js.TransposableNM(2, 8),
        "TransposableNM",
        "2:8 is not supported along two axes. Pass 1:4, 2:4 or 3:4",
    ),
    (lambda: js.TransposableNM(4, 4), "TransposableNM", "4:4 is not supported"),
    (lambda: js.TransposableNM(0, 4), "TransposableNM", "0:4 is not supported"),
    (
        lambda: js.TransposableNM(2, 4, (0, 0)),
        "TransposableNM",
        "`axes` are (0, 0), not two different axes. Pass",
    ),
    (lambda: js.TransposableNM(2, 4, (0, 1, 2)), "TransposableNM", "`axes` are (0, 1, 2), not two"),
    (
        lambda: js.Unstructured(0),
        "Unstructured",
        "density=0 is not in (0, 1]. A density is the fraction kept",
    ),
    (lambda: js.Unstructured(50), "Unstructured", "density=50 is not in (0, 1]"),
    (lambda: js.Unstructured(float("nan")), "Unstructured", "density=nan is not in (0, 1]"),
    (
        lambda: js.Unstructured(lambda step: step * 0.0),
        "Unstructured",
        "density=0 is not in (0, 1]",
    ),
    (
        lambda: js.Unstructured(0.5, "tree"),
        "Unstructured",
        "scope='tree' is not one of 'leaf', 'global'. Pass",
    ),
    (lambda: js.Block((4, 4), 1.5), "Block", "density=1.5 is not in (0, 1]"),
    (lambda: js.Block((4, 0), 0.5), "Block", "shape=(4, 0) is not two sizes of 1 or more"),
    (lambda: js.Block((4,), 0.5), "Block", "shape=(4,) is not two sizes"),
    (lambda: js.Block((4, 4), 0.5, (1, 1)), "Block", "`axes` are (1, 1), not two different axes"),
    (
        lambda: js.Block((4, 4), 0.5, pool="l1"),
        "Block",
        "pool='l1' is not one of 'max', 'mean', 'l2'",
    ),
    (
        plan({"a/w": js.TransposableNM(2, 4)}),
        "plan",
        "a/w of shape (8, 4).* TransposableNM(2, 4, axes=(0, 1))",
    ),
    (
        plan({"a/w": js.Block((2, 2), 0.5)}),
        "plan",
        "a/w of shape (8, 4).* Block((2, 2), 0.5, axes=(0, 1))",
    ),
    (
        plan({"a/w": js.TransposableNM(2, 4, (0, 2))}),
        "plan",
        "a/w of shape (8, 4) .*transposable 2:4: axis 2 is out of range for 2 axes",
    ),
    (
        plan({"a/w": js.TransposableNM(2, 4, (0, -2))}),
        "plan",
        "axes (0, -2) name the same axis twice",
    ),
    (
        plan({"w": js.TransposableNM(2, 4, (0, 1))}, {"w": S}),
        "plan",
        "axis 0 has size 6, not a multiple of m=4",
    ),
    (
        flax({"kernel": js.TransposableNM(2, 4, (1, 0))}),
        "flax.plan",
        "names axis 1, 0 .* but the program .* axis -2, -1. Leave",
    ),
    (
        lambda: js.transposable_nm_mask(S, 2, 4, axes=(0, 1)),
        "transposable_nm_mask",
        "axis 0 has size 6, not a multiple of m=4 .*(6, 3)",
    ),
    (
        lambda: js.block_mask(S, (2, 2), 0.5, axes=(0, 2)),
        "block_mask",
        "axis 2 is out of range .*(6, 3)",
    ),
    (
        lambda: js.transposable_nm_mask(S, 4, 4, axes=(0, 1)),
        "transposable_nm_mask",
        "4:4 is not supported",
    ),
    (
        lambda: js.block_mask(S, (2, 2), 0.5, axes=(0, 1), pool="sum"),
        "block_mask",
        "pool='sum' is not one of",
    ),
    (
        lambda: js.block_mask(S, (2, 2), 0.0, axes=(0, 1)),
        "block_mask",
        "density=0 is not in (0, 1]",
    ),
    (lambda: js.topk_mask(S, 1.5), "topk_mask", "density=1.5 is not in (0, 1]"),
    (
        lambda: js.layer_budget(PLAN, 0.5, "er"),
        "layer_budget",
        "no leaf of the plan is Unstructured or Block",
    ),
    (
        lambda: js.layer_budget(FREE, 0.5, "ers"),
        "layer_budget",
        "method='ers' is not one of 'uniform', 'er', 'erk', 'global'",
    ),
    (lambda: js.layer_budget(FREE, 2, "er"), "layer_budget", "density=2 is not in (0, 1]"),
    (
        lambda: js.layer_budget(GRADUAL, 0.5, "er"),
        "layer_budget",
        "the density of a/w follows a schedule",
    ),
    (plan({"z": NM(2, 4, axis=0)}), "plan", "rule 'z' matches no leaf.* a/w, b"),
    (plan({"*": None, "a/z*": NM(2, 4, axis=0)}), "plan", "rule 'a/z*' matches no leaf"),
    (plan({"a/w": "2:4"}), "plan", "rule 'a/w' .* a/w of shape (8, 4).* NM(2, 4, axis=0)"),
    (plan({"*": "2:4"}), "plan", "rule '*' .* a/w of shape (8, 4).* NM(2, 4, axis=0)"),
    (
        plan({"a/w": NM(2, 3, axis=0)}),
        "plan",
        "a/w of shape (8, 4) cannot be 2:3: axis 0 has size 8, not a multiple of m=3. Choose",
    ),
    (
        plan({"params/a/w": NM(2, 3, axis=0)}),
        "plan",
        "a/w of shape (8, 4) cannot be 2:3: .* Choose",
    ),
    (
        plan({"a/w": NM(2, 4, axis=2)}),
        "plan",
        "a/w of shape (8, 4) .*axis 2 is out of range for 2 axes",
    ),
    (plan({"m": NM(2, 4, axis=0)}, {"m": YES}), "plan", "m of shape (4,) cannot be 2:4: bool"),
    (
        plan({"k": NM(2, 4, axis=0)}, {"k": V.astype(complex)}),
        "plan",
        "k of shape (4,) cannot be 2:4: complex64",
    ),
    (plan({"a/w": "2-4"}), "plan", "rule 'a/w': '2-4' .* Write"),
    (plan({"a/w": "2:4:8"}), "plan", "rule 'a/w': '2:4:8' .* Write"),
    (plan({"a/w": "-2:4"}), "plan", "rule 'a/w': '-2:4' .* Write"),
    (plan({"a/w": "5:4"}), "plan", "rule 'a/w': NM: n=5 is not in 1..m=4"),
    (lambda: js.magnitude_masks(OTHER, PLAN), "magnitude_masks", "a/w .*no such leaf.* c. Pass"),
    (
        lambda: js.magnitude_masks(RESHAPED, PLAN),
        "magnitude_masks",
        "a/w has shape (4, 4) .*(8, 4)",
    ),
    (lambda: js.masks(UNMASKED), "masks", "tuple holds no masks.* jaxsparse.rewire"),
    (lambda: js.masks(None), "masks", "NoneType holds no masks"),
    (lambda: js.effective_params(PARAMS, UNMASKED), "effective_params", "tuple .*jaxsparse.rewire"),
    (lambda: js.effective_params(PARAMS, PLAN), "effective_params", "Plan .*jaxsparse.rewire"),
    (lambda: js.effective_params(PARAMS, PARAMS), "effective_params", "dict .*boolean masks"),
    (lambda: js.effective_params(OTHER, STATE), "effective_params", "a leaf a/w .* c. Pass"),
    (
        lambda: js.effective_params(RESHAPED, STATE),
        "effective_params",
        "a/w has shape (4, 4).*(8, 4). Pass",
    ),
    (lambda: js.effective_weight(V, jnp.ones(3, bool)), "effective_weight", "(3,), .*(4,). Pass"),
    (lambda: js.effective_weight(V, jnp.ones((1, 4), bool)), "effective_weight", "(1, 4), .*(4,)"),
    (
        lambda: js.effective_weight(V, YES, jnp.ones((2, 1))),
        "effective_weight",
        "`decay_factor` has shape (2, 1), .* Pass a scalar",
    ),
    (lambda: js.effective_weight(V, YES, gradient="x"), "effective_weight", "gradient='x'"),
    (
        lambda: js.rewire(optax.sgd(0.1), js.plan(PARAMS, {"*": None})),
        "rewire",
        "the plan keeps every leaf dense",
        "because of its rules",
    ),
    (
        lambda: js.rewire(optax.sgd(0.1), js.plan({}, {})),
        "rewire",
        "the plan keeps every leaf dense",
        "because it has no leaves",
    ),
    (lambda: js.rewire(optax.sgd(0.1), PLAN, every=0), "rewire", "every=0 is below 1"),
    (lambda: js.rewire(optax.sgd(0.1), PLAN, until=-1), "rewire", "until=-1 is below 0"),
    (lambda: TX.init(OTHER), "rewire", "a/w .*no such leaf", "in init"),
    (lambda: TX.init(RESHAPED), "rewire", "a/w has shape (4, 4) .*(8, 4)", "in init"),
    (update(TX, params=None), "rewire", "`params` is missing.* update(grads, opt_state, params)"),
    (
        update(TX, RESHAPED, RESHAPED),
        "rewire",
        "a/w has shape (4, 4) .*(8, 4)",
        "updates and parameters",
    ),
    (update(TX, RESHAPED), "rewire", "a/w has shape (4, 4) .*(8, 4)", "updates"),
    (update(TX, OTHER), "rewire", "a/w .*no such leaf", "updates"),
    (
        update(js.scale_nonparticipating(0.5)),
        "scale_nonparticipating",
        "no masks.* jaxsparse.rewire",
    ),
    (
        update(js.scale_nonparticipating(0.5), RESHAPED, masks=MASKS),
        "scale_nonparticipating",
        "a/w .*(4, 4), .*(8, 4). Pass",
    ),
    (
        update(js.add_decayed_nonparticipating(0.1), params=None, masks=MASKS),
        "add_decayed_nonparticipating",
        "`params` is missing",
    ),
    (
        update(js.add_decayed_nonparticipating(0.1), params=RESHAPED, masks=MASKS),
        "add_decayed_nonparticipating",
        "a/w has shape (8, 4) .*(4, 4).* Pass",
    ),
    (
        update(js.add_decayed_nonparticipating(0.1), params=OTHER, masks=MASKS),
        "add_decayed_nonparticipating",
        "(8, 4).* Pass",
    ),
    (
        update(js.decay_nonparticipating(0.1), params=None, masks=MASKS),
        "decay_nonparticipating",
        "`params` is missing",
    ),
    (update(js.reset_nonparticipating(1)), "reset_nonparticipating", "no masks.* jaxsparse.rewire"),
    (
        update(js.fix_nonparticipating(1), params=None, masks=MASKS),
        "fix_nonparticipating",
        "`params` is missing",
    ),
    (lambda: js.reset_nonparticipating(0), "reset_nonparticipating", "every=0 is below 1. Pass"),
    (lambda: js.fix_nonparticipating(-1), "fix_nonparticipating", "after=-1 is below 0. Pass"),
    (
        lambda: js.recipes.explore_exploit(optax.sgd(0.1), PLAN, reset_every=0),
        "reset_nonparticipating",
        "every=0 is below 1",
    ),
    (
        recipe("explore_exploit", grad_scale=-1),
        "scale_nonparticipating",
        "s=-1 is not in [0, inf). Pass",
    ),
    (
        recipe("explore_exploit", grad_scale=float("nan")),
        "scale_nonparticipating",
        "s=nan is not in [0, inf). Pass",
    ),
    (
        recipe("explore_exploit", weight_decay=1.5),
        "decay_nonparticipating",
        "weight_decay=1.5 is not in [0, 1]. Pass",
    ),
    (
        recipe("sr_ste", weight_decay=-2e-4),
        "add_decayed_nonparticipating",
        "weight_decay=-0.0002 is not in [0, inf). Pass",
    ),
    (
        recipe("gradual", FREE, initial=0.25),
        "recipes.gradual",
        "initial=0.25 is below 0.5, the density planned for a/w. Pass",
    ),
    (
        recipe("explore_exploit", fix_after=-1),
        "recipes.explore_exploit",
        "fix_after=-1 is below 0. Pass",
    ),
    (
        recipe("explore_exploit", fix_after=0.5),
        "recipes.explore_exploit",
        "fix_after=0.5 is a fraction of total_steps, which is missing. Pass",
    ),
    (
        recipe("explore_exploit", fix_after=1.0, total_steps=8),
        "recipes.explore_exploit",
        "no steps are left for the fixed phase: fix_after is step 8 of 8. Pass",
    ),
    (lambda: js.rewire(optax.sgd(0.1), PLAN, begin=-1), "rewire", "begin=-1 is below 0"),
    (
        lambda: js.rewire(optax.sgd(0.1), PLAN, begin=5, until=5),
        "rewire",
        "[5, 5], not in ascending order",
    ),
    (
        lambda: js.rewire(
            optax.sgd(0.1), PLAN, begin=5, renew=js.staged(js.by_score(), [(PLAN, 3)])
        ),
        "rewire",
        "[5, 3], not in ascending order. Sort",
    ),
    (
        lambda: js.rewire(
            optax.sgd(0.1), PLAN, renew=js.staged(js.by_score(), [(PLAN, 3)]), until=3
        ),
        "rewire",
        "[0, 3, 3], not in ascending order",
    ),
    (
        lambda: js.rewire(optax.sgd(0.1), PLAN, renew=js.staged(js.by_score(), [(PLAN, 0)])),
        "rewire",
        "end=0 is below 1",
    ),
    (
        lambda: js.rewire(optax.sgd(0.1), PLAN, renew=js.staged(js.by_score(), [(DENSE, 3)])),
        "rewire",
        "a/w is dense in an earlier plan, but (8, 4) in the last",
    ),
    (lambda: js.rewire(optax.sgd(0.1), PLAN, gradient="x"), "rewire", "gradient='x' is not one of"),
    (
        recipe("mdgf", total_steps=0),
        "recipes.mdgf",
        "dense_until=0.05 of total_steps=0 rounds to step 0",
    ),
    (
        recipe("mdgf", total_steps=9),
        "recipes.mdgf",
        "dense_until=0.05 of total_steps=9 rounds to step 0. Pass 0, or train longer",
    ),
    (recipe("mdgf", dense_until=5.0), "recipes.mdgf", "dense_until=5.0 is not in [0, 1].* an int"),
    (recipe("mdgf", dense_until=float("nan")), "recipes.mdgf", "dense_until=nan is not in [0, 1]"),
    (recipe("mdgf", dense_until=-1), "recipes.mdgf", "dense_until=-1 is below 0. Pass"),
    (
        recipe("mdgf", fine_tune_from=21),
        "recipes.mdgf",
        "fine_tune_from=21 is above total_steps=20. Pass",
    ),
    (
        recipe("mdgf", dense_until=14),
        "recipes.mdgf",
        "no steps are left for sparsification, .*: dense_until is step 14, fine_tune_from step 14",
    ),
    (
        recipe("mdgf", dense_until=0.8),
        "recipes.mdgf",
        "no steps are left for sparsification, .*: dense_until is step 16, fine_tune_from step 14",
    ),
    (
        recipe("mdgf", fine_tune_from=1.0),
        "recipes.mdgf",
        "no steps are left for the fine-tune phase: .* step 20, total_steps 20. Pass",
    ),
    (
        recipe("mdgf", curve="cosine"),
        "recipes.mdgf",
        "curve='cosine' is not one of 'exponential', 'linear'",
    ),
    (recipe("mdgf", gradient="straight"), "rewire", "gradient='straight' is not one of"),
    (recipe("mdgf", every=0), "rewire", "every=0 is below 1", "in mdgf"),
    (recipe("mdgf", DENSE), "rewire", "the plan keeps every leaf dense", "in mdgf"),
    (recipe("sdgf", DENSE), "rewire", "the plan keeps every leaf dense", "in sdgf"),
    (
        recipe("sdgf", fine_tune_from=1.0),
        "recipes.sdgf",
        "no steps are left for the fine-tune phase",
    ),
    (
        recipe("sdgf", stages="steps"),
        "recipes.sdgf",
        "stages='steps' is not one of 'stepwise', 'geometric'",
    ),
    (
        recipe("sdgf", dense_until=5, fine_tune_from=6),
        "recipes.sdgf",
        "a/w goes through 2 stages, 3:4, 2:4, .* 1 steps from step 5 to 6",
    ),
    (
        recipe("sdgf", FREE),
        "recipes.sdgf",
        "a/w is planned as unstructured 0.5, .* Use recipes.gradual",
    ),
    (
        recipe("sdgf", stages="geometric"),
        "recipes.sdgf",
        "axis -2 of a/w has size 8, not a multiple of 64, .* 32:64. Pass k=2, or",
    ),
    (
        recipe("sdgf", BOTH_AXES, stages="geometric"),
        "recipes.sdgf",
        "a/w is planned as transposable 2:4, which has no geometric stages. Pass other",
    ),
    (
        recipe("sdgf", stages="geometric", k=3),
        "geometric_stages",
        "k=3 is not a power of two",
        "in sdgf",
    ),
    (
        recipe("gradual"),
        "recipes.gradual",
        "a/w is planned as 2:4, whose density is fixed. Use recipes.sdgf",
    ),
    (recipe("gradual", GRADUAL), "recipes.gradual", "the density of a/w follows a schedule. Plan"),
    (recipe("gradual", FREE, initial=2), "gradual_density", "initial=2 is not in (0, 1]"),
    (
        recipe("gradual", FREE, dense_until=14),
        "recipes.gradual",
        "no steps are left for sparsification",
    ),
    (
        recipe("sr_ste", dense_until=0.1),
        "recipes.sr_ste",
        "dense_until=0.1 is a fraction of total_steps, which is missing. Pass",
    ),
    (
        recipe("sr_ste", dense_until=20, total_steps=20),
        "recipes.sr_ste",
        "no steps are left for the sparse phase: dense_until is step 20 of 20",
    ),
    (
        recipe("static", renew=js.by_score("fisher")),
        "recipes.static",
        "`renew` needs .*fisher.*score_masks",
    ),
    (recipe("static", masks=PARAMS), "recipes.static", "dict is neither masks nor"),
    (
        recipe("static", masks={"c": FULL["a"]["w"]}),
        "recipes.static",
        "the plan makes a/w sparse, but `masks` has no mask for it",
    ),
    (
        recipe("static", masks={**FULL, "b": YES}),
        "recipes.static",
        "`masks` has a mask for b, which the plan keeps dense. Make",
    ),
    (
        recipe("static", masks={"a": {"w": YES}}),
        "recipes.static",
        "the mask of a/w has shape (4,), .*(8, 4). Pass",
    ),
    (
        lambda: recipe("static", masks=MASKS)().init(OTHER),
        "recipes.static",
        "a leaf a/w .* c. Pass",
    ),
    (
        lambda: js.compress(PARAMS, recipe("mdgf")().init(PARAMS)),
        "compress",
        "the decay factor of a/w is 1, not 0.* fine_tune_from",
    ),
    (
        lambda: js.compress(PARAMS, recipe("sdgf")().init(PARAMS)),
        "compress",
        "mask of a/w does not keep exactly 2 of every 4 .*reached 2:4",
    ),
    (lambda: js.compress(PARAMS, UNMASKED), "compress", "tuple .*jaxsparse.rewire"),
    (lambda: js.compress(OTHER, STATE), "compress", "a leaf a/w .* c. Pass"),
    (lambda: js.compress(RESHAPED, STATE), "compress", "a/w has shape (4, 4).*(8, 4). Pass"),
    (lambda: js.compress(PARAMS, ONE_OF_FOUR), "compress", "a/w is planned as 1:4, .*2:4. Train"),
    (
        lambda: js.compress(PARAMS, FULL),
        "compress",
        "a/w, of shape (8, 4), does not keep exactly 2 of every 4 .* Pass",
    ),
    (
        lambda: js.compress(PARAMS, FULL, PLAN),
        "compress",
        "a/w does not keep exactly 2 of every 4 along axis -2 of shape (8, 4). Pass",
    ),
    (
        lambda: js.compress(PARAMS, jax.tree.map(lambda w: jnp.asarray(True), PARAMS), PLAN),
        "compress",
        "the plan makes a/w sparse, but there is no mask for it. Pass",
    ),
    (lambda: js.compress(RESHAPED, MASKS, PLAN), "compress", "a/w has shape (4, 4) .*(8, 4)"),
    (
        lambda: js.compress(
            {"a": {"w": jnp.ones((6, 4))}}, {"a": {"w": jnp.ones((6, 4), bool)}}, PLAN
        ),
        "compress",
        "a/w .*(6, 4) .*(8, 4)",
    ),
    (
        lambda: js.compress({"w": jnp.ones((4, 4))}, CHECKERS),
        "compress",
        "w, of shape (4, 4), is 2:4 along each of the axes [-2, -1]. Pass",
    ),
    (lambda: jax.jit(js.compress)(PARAMS, MASKS), "compress", "a/w .*traced mask. Pass"),
    (lambda: js.compress(js.compress(PARAMS, STATE), STATE), "compress", "a/w .*a/w/values"),
    (
        lambda: js.sparse_matmul(jnp.ones((2, 4)), W),
        "sparse_matmul",
        "(2, 4) .*(8,) .*(8, 4). Move",
    ),
    (
        lambda: js.sparse_matmul(jnp.ones((2, 5, 8)), STACK),
        "sparse_matmul",
        "(2, 5, 8) .*(3,) .*(3, 8, 4). Move",
    ),
    (
        lambda: js.sparse_matmul(X, W, implementation="x"),
        "sparse_matmul",
        "implementation 'x'. Pass",
    ),
    (lambda: js.linear_decay(0), "linear_decay", "beta=0 is not above 0"),
    (lambda: js.linear_decay(float("nan")), "linear_decay", "beta=nan"),
    (lambda: js.linear_decay(0.1, -1), "linear_decay", "begin=-1 is below 0. Pass"),
    (lambda: js.exponential_decay(-1), "exponential_decay", "beta=-1 is not above 0"),
    (
        lambda: js.exponential_decay(0.1, 10, 10),
        "exponential_decay",
        "end=10 is not above begin=10",
    ),
    (lambda: js.stepwise_stages(0, 4), "stepwise_stages", "n=0 is not in 1..m=4"),
    (lambda: js.stepwise_stages(5, 4), "stepwise_stages", "n=5 is not in 1..m=4"),
    (lambda: js.geometric_stages(9, 8), "geometric_stages", "n=9 is not in 1..m=8"),
    (lambda: js.geometric_stages(1, 8, 3), "geometric_stages", "k=3 is not a power of two"),
    (lambda: js.geometric_stages(1, 8, 0), "geometric_stages", "k=0 is not a power of two"),
    (density(0), "gradual_density", "final=0 is not in (0, 1]"),
    (density(initial=1.1), "gradual_density", "initial=1.1 is not in (0, 1]"),
    (density(begin=1, end=1), "gradual_density", "begin=1 and end=1 .* Pass"),
    (density(begin=-1), "gradual_density", "begin=-1 and end=10 .* Pass"),
    (density(every=3), "gradual_density", "every=3 does not divide the 10 steps"),
    (density(every=0), "gradual_density", "every=0 does not divide the 10 steps"),
    (flax({"z": "2:4"}), "flax.plan", "rule 'z' matches no leaf.* bias, kernel"),
    (
        flax({"kernel": NM(2, 4, axis=1)}),
        "flax.plan",
        "rule 'kernel' names axis 1 for kernel of shape (8, 4), .* axis -2. Leave .*2:4",
    ),
    (flax({"kernel": "5:4"}), "flax.plan", "rule 'kernel': NM: n=5 is not in 1..m=4"),
    (lambda: js.flax.intercept(UNMASKED).__enter__(), "flax.intercept", "tuple .*jaxsparse.rewire"),
    (
        lambda: js.flax.intercept(implementation="fast").__enter__(),
        "flax.intercept",
        "no implementation 'fast'. Pass None or one of",
    ),
    (
        intercepted({"kernel": jnp.ones((4, 4)), "bias": V}),
        "flax.intercept",
        "kernel has shape (4, 4), .*(8, 4). Pass",
    ),
]
TYPES = [
    (nm(V.astype(complex)), "nm_mask", "`scores` are complex64.* jnp.abs"),
    (nm(YES), "nm_mask", "`scores` are bool.* Pass"),
    (lambda: js.TransposableNM(2.0, 4), "TransposableNM", "`n` must be an integer, not 2.0"),
    (
        recipe("explore_exploit", reset_every=0.1),
        "recipes.explore_exploit",
        "`reset_every` must be an integer, not 0.1",
    ),
    (lambda: js.linear_decay(0.1, 0.05), "linear_decay", "`begin` must be an integer, not 0.05"),
    (
        lambda: js.exponential_decay(0.1, 0, 0.7),
        "exponential_decay",
        "`end` must be an integer, not 0.7",
    ),
    (density(end=1.0), "gradual_density", "`end` must be an integer, not 1.0"),
    (lambda: js.TransposableNM(2, 4, 0), "TransposableNM", "`axes` must be two integers, not 0"),
    (lambda: js.Block(4, 0.5), "Block", "`shape` must be two integers, not 4"),
    (lambda: js.Block((4, 4.5), 0.5), "Block", "`shape` must be an integer, not 4.5"),
    (lambda: js.Unstructured("0.5x"), "Unstructured", "`density` must be a number, not '0.5x'"),
    (lambda: js.Unstructured(None), "Unstructured", "`density` must be a number, not None"),
    (
        lambda: js.transposable_nm_mask(S, 2, 4, axes=None),
        "transposable_nm_mask",
        "`axes` must be two integers, not None",
    ),
    (
        lambda: js.transposable_nm_mask(S, 2.5, 4, axes=(0, 1)),
        "transposable_nm_mask",
        "`n` must be an integer, not 2.5",
    ),
    (
        lambda: js.transposable_nm_mask(YES, 2, 4, axes=(0, 1)),
        "transposable_nm_mask",
        "`scores` are bool.* Pass",
    ),
    (lambda: js.topk_mask(S.astype(complex), 0.5), "topk_mask", "`scores` are complex64"),
    (lambda: js.topk_mask(S, "half"), "topk_mask", "`density` must be a number, not 'half'"),
    (
        lambda: jax.jit(js.topk_mask)(S, 1),
        "topk_mask",
        "`density` must be a floating scalar, not int32[]",
    ),
    (
        lambda: js.block_mask(PARAMS, (2, 2), 0.5, axes=(0, 1)),
        "block_mask",
        "`scores` must be an array, not a dict",
    ),
    (lambda: js.layer_budget(PARAMS, 0.5, "er"), "layer_budget", "`plan` is a dict. Make"),
    (nm(PARAMS), "nm_mask", "`scores` must be an array, not a dict"),
    (nm(None), "nm_mask", "`scores` must be an array, not a NoneType"),
    (nm(n=2.0), "nm_mask", "`n` must be an integer, not 2.0"),
    (nm(m="4"), "nm_mask", "`m` must be an integer, not '4'"),
    (nm(axis=None), "nm_mask", "`axis` must be an integer, not None"),
    (traced_n(2.0), "nm_mask", "`n` must be an integer scalar, not float32[]"),
    (traced_n(jnp.ones(2, int)), "nm_mask", "`n` must be an integer scalar, not int32[2]"),
    (lambda: NM(2.0, 4), "NM", "`n` must be an integer, not 2.0"),
    (lambda: NM(2, None), "NM", "`m` must be an integer, not None"),
    (lambda: NM(2, 4, axis="x"), "NM", "`axis` must be an integer, not 'x'"),
    (plan({"a/w": 4}), "plan", "rule 'a/w': 4 is not a pattern. Pass"),
    (plan({"a/w": (2, 4)}), "plan", "rule 'a/w': (2, 4) is not a pattern"),
    (plan(["a/w"]), "plan", "`rules` must map paths to patterns", "a list"),
    (plan(NM(2, 4)), "plan", "`rules` must map paths to patterns", "a pattern"),
    (plan({3: NM(2, 4, axis=0)}), "plan", "rule 3 is not a path"),
    (plan({"*": NM(2, 4, axis=0)}, {"w": "text"}), "plan", "w is a str, not an array. Pass"),
    (
        lambda: js.magnitude_masks(PARAMS, {"a/w": "2:4"}),
        "magnitude_masks",
        "`plan` is a dict. Make",
    ),
    (
        lambda: js.effective_params({"a": {"w": jnp.ones((8, 4), int)}, "b": V}, STATE),
        "effective_params",
        "a/w is int32. Pass",
    ),
    (lambda: js.effective_weight(V, V), "effective_weight", "`mask` is float32, not boolean"),
    (lambda: js.effective_weight(jnp.ones(4, int), YES), "effective_weight", "`w` is int32. Pass"),
    (
        lambda: js.effective_weight(PARAMS, MASKS),
        "effective_weight",
        "`w` must be an array, not a dict",
    ),
    (
        lambda: js.effective_weight(V, YES, "x"),
        "effective_weight",
        "`decay_factor` must be an array, not a str",
    ),
    (lambda: js.rewire(optax.sgd(0.1), "2:4"), "rewire", "`plan` is a str. Make"),
    (
        lambda: js.rewire(optax.sgd(0.1), PLAN, every=1.5),
        "rewire",
        "`every` must be an integer, not 1.5",
    ),
    (update(TX, state=UNMASKED), "rewire", "tuple is not a RewireState. Pass"),
    (
        lambda: js.reset_nonparticipating(2.5),
        "reset_nonparticipating",
        "`every` must be an integer, not 2.5",
    ),
    (
        lambda: js.recipes.explore_exploit(PLAN, optax.sgd(0.1)),
        "recipes.explore_exploit",
        "`plan` is a GradientTransformation.* Make",
    ),
    (
        lambda: js.recipes.sr_ste(PLAN, optax.sgd(0.1)),
        "recipes.sr_ste",
        "`plan` is a GradientTransformation.* Make",
    ),
    (
        lambda: js.recipes.static(PLAN, optax.sgd(0.1)),
        "recipes.static",
        "`plan` is a GradientTransformation.* Make",
    ),
    (
        lambda: js.recipes.explore_exploit(optax.sgd(0.1), None),
        "recipes.explore_exploit",
        "`plan` is a NoneType. Make",
    ),
    (
        lambda: js.rewire(optax.sgd(0.1), PLAN, begin=0.5),
        "rewire",
        "`begin` must be an integer, not 0.5",
    ),
    (
        lambda: js.staged(js.by_score(), [("3:4", 3)]),
        "staged",
        "`plan` is a str. Make",
        "an earlier one",
    ),
    (
        update(TX, state=recipe("mdgf")().init(PARAMS)),
        "rewire",
        "this RewireState was created by a different recipe. Pass",
    ),
    (
        update(recipe("static")(), state=STATE),
        "rewire",
        "this RewireState was created by a different recipe",
    ),
    (recipe("mdgf", None), "rewire", "`plan` is a NoneType. Make"),
    (recipe("sdgf", None), "recipes.sdgf", "`plan` is a NoneType. Make"),
    (recipe("gradual", None), "recipes.gradual", "`plan` is a NoneType. Make"),
    (recipe("static", None), "recipes.static", "`plan` is a NoneType. Make"),
    (recipe("mdgf", total_steps=9.5), "recipes.mdgf", "`total_steps` must be an integer, not 9.5"),
    (
        recipe("mdgf", dense_until="5%"),
        "recipes.mdgf",
        "`dense_until` must be a step or a fraction of total_steps, not '5%'",
    ),
    (
        recipe("sr_ste", dense_until=None),
        "recipes.sr_ste",
        "`dense_until` must be a step or a fraction",
    ),
    (
        lambda: optax.inject_hyperparams(js.recipes.mdgf, static_args=("inner", "plan"))(
            optax.sgd(0.1), PLAN, total_steps=20
        ).init(PARAMS),
        "recipes.mdgf",
        "`dense_until` must be a step .* name it in `static_args`",
    ),
    (lambda: js.compress(PARAMS, MASKS, "2:4"), "compress", "`plan` is a str. Make"),
    (lambda: js.sparse_matmul(X, PARAMS["a"]["w"]), "sparse_matmul", "not a Sparse24. Make"),
    (lambda: js.sparse_matmul(W, W), "sparse_matmul", "`x` must be an array, not a Sparse24"),
    (lambda: js.stepwise_stages(1.5, 4), "stepwise_stages", "`n` must be an integer, not 1.5"),
    (lambda: js.geometric_stages(1, "8"), "geometric_stages", "`m` must be an integer, not '8'"),
    (lambda: js.geometric_stages(1, 8, 2.0), "geometric_stages", "`k` must be an integer, not 2.0"),
    (flax({"*": "2:4"}, model=PARAMS), "flax.plan", "`model` is a dict.* jaxsparse.plan"),
    (flax({"*": "2:4"}, model=nn.Dense), "flax.plan", "`model` is a type"),
    (flax({"kernel": 4}), "flax.plan", "rule 'kernel': 4 is not a pattern. Pass"),
    (flax("2:4"), "flax.plan", "`rules` must map paths to patterns"),
]
TABLE = [(ValueError, *row) for row in VALUES] + [(TypeError, *row) for row in TYPES]
IDS = [
    f"{name}: {says.replace('.*', '..')}" + "".join(f" ({word})" for word in more)
    for _, _, name, says, *more in TABLE
]


def test_no_row_is_there_twice():
    assert len(set(IDS)) == len(IDS)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("kind", "call", "name", "says"), [row[:4] for row in TABLE], ids=IDS)
def test_bad_input(kind, call, name, says):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert caught.type is kind
    message = str(caught.value).split("\n--------------------\n")[0]  # jax adds text under jit
    assert message.startswith(f"{name}: ")
    assert re.search(".*".join(map(re.escape, says.split(".*"))), message, re.DOTALL), message
    assert message.rstrip().endswith("."), message
