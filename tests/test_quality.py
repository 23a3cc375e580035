"""The quality benchmark: comparable runs, correct statistics, and every step runs."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import stats

import jaxsparse as js
from benchmarks.quality import compare, pool, runs, store, tasks, train
from benchmarks.quality.__main__ import missing, some
from benchmarks.quality.models import SPARSE, Conv, attention, products

pytestmark = [pytest.mark.slow, pytest.mark.promotes("the benchmark is not the library")]

ROOT = pathlib.Path(__file__).parent.parent
FINDINGS = (
    "gap",
    "ties",
    "decaying",
    "exploration",
    "sweeps",
    "structures",
    "decorrelation",
    "variances",
    "digits",
)


def smoke(folder, *arguments):
    """The finished runs of a smoke run, by cell and seed."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.quality",
        "--smoke",
        "--out",
        str(folder),
        *arguments,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return store.read(folder)


def test_smoke_runs_take_every_step_and_seeds_train_alone_as_together(tmp_path):
    records = smoke(tmp_path, "--workers", "1")
    assert any("decorrelation" in record for record in records.values())
    assert all(0 < record["bits"] < 9 and 0 <= record["error"] <= 1 for record in records.values())
    summary = json.loads((tmp_path / "findings.json").read_text())
    assert [name for name, _ in summary["findings"]] == list(FINDINGS)
    assert summary["runs"] == len(records) >= 12
    for name in FINDINGS:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    seeds, scale = {}, runs.tiny(runs.CPU)
    for cell, seed in records:
        if cell.recipe in ("dense", "RESET") and cell.task == "characters":
            seeds.setdefault(cell, []).append(seed)
    pairs = {cell: some for cell, some in seeds.items() if len(some) > 1}  # not of the tuning
    assert {cell.recipe for cell in pairs} == {"dense", "RESET"}
    for cell, alone in pairs.items():
        together = dict(train.train(cell, alone, dataclasses.replace(scale, together=True)))
        assert len({record["bits"] for record in together.values()}) == len(alone)
        for seed, record in together.items():
            assert record["bits"] == pytest.approx(records[cell, seed]["bits"], rel=1e-3)


@pytest.fixture(scope="module")
def cells():
    return store.cells(runs.CPU, {})


@functools.cache
def shapes(task, width, small):
    task = tasks.load(task, runs.CPU)
    model = task.model(width, small)
    return (
        model,
        jax.eval_shape(model.init, jax.random.key(0), task.validation[0][0]),
        task.validation[0][0],
    )


def test_every_run_of_the_matrix_and_of_the_tuning_can_be_made(cells):
    wanted = {cell for _, cell in runs.matrix(cells)}
    wanted |= {cell for part in runs.tuning(cells) for tried in part.values() for cell in tried}
    plan_of = functools.cache(
        lambda task, width, pattern: js.flax.plan(
            shapes(task, width, 1.0)[0], {SPARSE: pattern}, shapes(task, width, 1.0)[2]
        )
    )
    for cell in wanted:
        if cell.recipe in runs.RECIPES:
            plan = plan_of(cell.task, cell.width, runs.as_pattern(cell.pattern))
            assert [leaf.density for leaf in plan.sparse.values()] == [
                runs.density(cell.pattern)
            ] * (2 if cell.task == "convolutions" else 4)
            parts = list(train.phases(cell, plan))
            assert sum(steps for _, steps, _ in parts) == cell.steps >= 1000
            jax.eval_shape(parts[-1][0].init, shapes(cell.task, cell.width, 1.0)[1])
    assert {cell.recipe for cell in wanted} == {*runs.RECIPES, *runs.WITHOUT_PLAN}


@pytest.mark.parametrize("task", ["characters", "transformer", "convolutions"])
@pytest.mark.parametrize("pattern", ["2:4", "1:16"])
def test_small_has_as_many_weights_as_participate(cells, task, pattern):
    def hidden(small):
        width = cells("dense", "dense", task).width
        leaves = jax.tree.leaves_with_path(shapes(task, width, small)[1])
        return sum(
            leaf.size
            for path, leaf in leaves
            if "hidden" in jax.tree_util.keystr(path) and "kernel" in jax.tree_util.keystr(path)
        )

    assert hidden(runs.density(pattern)) == hidden(1.0) * runs.density(pattern)


def test_attention_is_that_of_flax_with_its_gradients():
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weights = (jax.random.normal(one, (2, 6, 3, 4)) for one in keys)

    def attended(attend, mask):
        return jax.grad(lambda *inputs: (attend(*inputs, mask=mask) * weights).sum(), (0, 1, 2))(
            query, key, value
        )

    # sums of numbers of about 10, some of which cancel
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for mask in (None, nn.make_causal_mask(jnp.ones((2, 6)))):
        close(
            attention(query, key, value, mask),
            nn.dot_product_attention(query, key, value, mask=mask),
        )
        close(attended(attention, mask), attended(nn.dot_product_attention, mask))


TO_HEADS, FROM_HEADS = (
    functools.partial(nn.DenseGeneral, (3, 2)),
    functools.partial(nn.DenseGeneral, 5, axis=(-2, -1)),
)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(functools.partial(nn.Dense, 5), (4, 5)), (TO_HEADS, (4, 3, 2)), (FROM_HEADS, (3, 4, 5))],
)
def test_products_are_those_of_flax_with_their_gradients(layer, shape):
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (2, 6, 3, 4)), jax.random.normal(keys[1], shape)

    def applied(x, kernel, **how):
        return layer(use_bias=False, **how).apply({"params": {"kernel": kernel}}, x)

    def gradients(**how):
        return jax.grad(lambda *inputs: (applied(*inputs, **how) ** 2).sum(), (0, 1))(x, kernel)

    # sums of numbers of about 100, some of which cancel
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    close(applied(x, kernel, dot_general=products), applied(x, kernel))
    jax.tree.map(close, gradients(dot_general=products), gradients())


def test_a_convolution_is_that_of_flax_with_its_gradients():
    keys = jax.random.split(jax.random.key(0), 2)
    images, kernel = (
        jax.random.normal(keys[0], (2, 8, 8, 3)),
        jax.random.normal(keys[1], (3, 3, 3, 5)),
    )

    def squares(layer, images, kernel):
        return (layer.apply({"params": {"kernel": kernel}}, images) ** 2).sum()

    for stride in (1, 2):
        layers = Conv(5, stride), nn.Conv(5, (3, 3), stride, padding=1, use_bias=False)
        for argument in (1, 2):
            ours, theirs = (jax.grad(squares, argument)(layer, images, kernel) for layer in layers)
            # sums of numbers of about 100
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_text_is_the_library_without_tests_split_by_file():
    held_out, rest = tasks.library()
    assert len(rest) > 5 * len(held_out) > 1e6
    # functools, unittest
    assert "def lru_cache(" in held_out + rest and "class TestCase(" in held_out + rest
    assert "test_lru_cache" not in held_out + rest
    for module in ("functools", "json.decoder", "argparse"):
        text = pathlib.Path(__import__(module, fromlist=["_"]).__file__).read_text()
        assert (text in held_out) != (text in rest)
    assert tasks.as_tokens("\n ~é").tolist() == [95, 0, 94, 96]


def test_batches_do_not_depend_on_where_chunks_begin():
    task = tasks.load("characters", runs.tiny(runs.CPU))
    draw = train.drawn(task.draw, train.one_seed)
    whole, parts = draw(3, task.train, 0, 8), [draw(3, task.train, first, 4) for first in (0, 4)]
    np.testing.assert_array_equal(whole[0], np.concatenate([part[0] for part in parts]))
    np.testing.assert_array_equal(whole[0][..., 1:], whole[1][..., :-1])


def test_differences_are_paired_by_seed(cells):
    scale, rng = runs.CPU, np.random.default_rng(0)
    a, b = cells("2:4", "RESET"), cells("dense", "dense")
    x, y = rng.normal(2, 1, 5), rng.normal(1, 1, 5)
    records = {(a, seed): {"bits": x[seed]} for seed in (0, 1, 3, 4)} | {
        (b, seed): {"bits": y[seed]} for seed in (0, 2, 3, 4)
    }
    one = compare.Runs(records | {(a, runs.TUNING_SEED): {"bits": 99.0}}, scale).difference(a, b)
    common = [0, 3, 4]
    assert (
        one.seeds == 3
        and one.mean == pytest.approx((x - y)[common].mean())
        and one.spread == pytest.approx((x - y)[common].std(ddof=1))
    )
    assert one.p == pytest.approx(stats.ttest_rel(x[common], y[common]).pvalue)
    assert compare.Runs({}, scale).difference(a, b) is None
    single = compare.Runs({(a, 0): {"bits": 2.0}, (b, 0): {"bits": 1.5}}, scale).difference(a, b)
    assert single.mean == 0.5 and math.isnan(single.p) and "untested" in str(single)


def test_tuning_takes_the_best_of_all_settings_at_the_best_rate(cells):
    records = {}

    def finish(tried, bits):
        records.update(
            {
                (cell, runs.TUNING_SEED): {"bits": value}
                for cell, value in zip(tried, bits, strict=True)
            }
        )

    rates, _ = runs.tuning(cells)
    assert cells.settings["characters"] == 1e-2
    finish(rates["characters"], [2.0, 1.9, 2.1, 2.2])
    settings = runs.tuned(runs.CPU, records, {})
    assert settings["characters"] == 5e-3 and settings["RESET"] == 100
    at_best = runs.tuning(runs.Cells(runs.CPU, settings))[1]
    assert {cell.rate for tried in at_best.values() for cell in tried} == {5e-3}
    finish(at_best["RESET"], [2.0, 2.1, 1.9])
    finish(at_best["FIX"][:2], [2.0, 2.1])  # only some seeds
    assert (
        runs.tuned(runs.CPU, records, {})["RESET"] == 300
        and runs.tuned(runs.CPU, records, {})["FIX"] == 0.25
    )
    assert runs.tuned(runs.GPU, {}, runs.tuned(runs.CPU, records, {}))["RESET"] == 300


def test_settings_stretch_with_the_run(cells):
    at = {
        steps: dict(cells("1:16", "RESET", steps=steps).options)["reset_every"]
        for steps in (1000, 3000, 9000)
    }
    assert at == {1000: 100, 3000: 100, 9000: 300}
    assert dict(cells("2:4", "FIX", steps=1000).options)["fix_after"] == 250
    assert (
        dict(cells("1:16", "SDGF geometric").options)["k"] == 4
        and dict(cells("2:4", "SDGF geometric").options)["k"] == 16
    )


def test_finished_runs_come_back_and_are_not_run_again(cells, tmp_path, monkeypatch):
    a, b = cells("dense", "dense"), cells("1:16", "MDGF linear")
    keep = store.Store(tmp_path)
    keep.add(a, 0, {"bits": 2.0})
    store.Store(tmp_path).add(b, 1, {"bits": 3.0})
    records = store.read(tmp_path)
    assert records.keys() == {(a, 0), (b, 1)} and records[b, 1]["bits"] == 3.0
    assert missing([(a, (0, 1)), (b, (0, 1)), (a, (0, 1, 2))], records) == [
        (a, [1]),
        (b, [0]),
        (a, [2]),
    ]
    monkeypatch.setattr(tasks, "fingerprint", lambda: "another")
    with pytest.raises(SystemExit, match="which is another text"):
        store.Store(tmp_path)


def test_workers_report_what_went_wrong_and_stop_in_time(cells):
    wrong = runs.Cell("none", 32, 20, 1e-3, "dense", "dense")
    with pytest.raises(RuntimeError, match="KeyError: 'none'"):
        list(pool.run([(wrong, [0])], runs.tiny(runs.CPU), 2, math.inf, print))
    in_this_process = runs.tiny(runs.GPU)
    assert list(pool.run([(cells("dense", "dense"), [0])], in_this_process, 1, 0.0, print)) == []


def test_a_smoke_run_has_something_of_every_recipe(cells):
    seen = [cell for _, cell in some(runs.matrix(cells))]
    functions = {runs.RECIPES[cell.recipe].function for cell in seen if cell.recipe in runs.RECIPES}
    assert functions == {recipe.function for recipe in runs.RECIPES.values()}
    assert {cell.recipe for cell in seen} >= {*runs.WITHOUT_PLAN} and len(seen) == len(
        functions
    ) + 2
