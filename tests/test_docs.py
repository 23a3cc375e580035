"""Runs the Python of the documentation and compares the output with the page."""

import contextlib
import io
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js

DOCS = pathlib.Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.S)


def run(page):
    """Runs the blocks of a page in one namespace and compares what they print with the page."""
    namespace = {}
    for code, printed in BLOCK.findall((DOCS / page).read_text()):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, namespace)
        assert [line.rstrip() for line in out.getvalue().splitlines()] == printed.splitlines()
    return namespace


PAGES = (
    "getting_started.md",
    "nnx.md",
    "equinox.md",
    "pruning.md",
    "quantization.md",
    "extending/recipe.md",
    "extending/pattern.md",
)


@pytest.mark.promotes("pages show programs as users write them")
@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page):
    run(page)


def named(axis):
    return lambda params, x: js.plan(params, {"w": js.NM(2, 4, axis=axis)})


def learnt(fn):
    return lambda params, x: js.plan(params, {"w": "2:4"}, fn, x)


WEIGHTS = {  # kinds: a plan, the shape of the weight, the size of the last axis of x
    "KO": (named(0), (20, 6), 20),
    "OK": (named(1), (130, 144), 144),
    "SKO": (
        learnt(lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]),
        (3, 16, 16),
        16,
    ),
    "OKO": (learnt(lambda p, x: jnp.einsum("bi,hiw->bhw", x, p["w"])), (5, 12, 7), 12),
    "KKO": (learnt(lambda p, x: jnp.tensordot(x.reshape(-1, 3, 8), p["w"], 2)), (3, 8, 9), 24),
}


@pytest.mark.parametrize("layout", ["canonical", "mma16"])
@pytest.mark.parametrize("kinds", WEIGHTS)
def test_the_reader_reads_what_compress_writes(kinds, layout):
    reader = run("format.md")
    planned, shape, inputs = WEIGHTS[kinds]
    params = {"w": jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)}
    plan = planned(params, jnp.zeros((2, inputs), jnp.bfloat16))
    masks = js.magnitude_masks(params, plan)
    w = js.compress(params, masks, plan, layout=layout)["w"]
    assert w.kinds == kinds
    values, metadata = np.asarray(w.values), np.asarray(w.metadata)
    if layout == "mma16":
        metadata = reader["canonical"](metadata, values.shape[-2], 2 * values.shape[-1])
    weight = reader["read"](values, metadata, w.contracting, w.output, w.kinds)
    np.testing.assert_array_equal(weight, jnp.where(masks["w"], params["w"], 0))


def test_the_notes_that_are_explained_are_those_of_plans():
    page = (DOCS / "troubleshooting.md").read_text()
    table = page.split("## Why was my layer skipped?")[1].split("##")[0]
    notes = re.findall(r"^\| ([a-z][^|]+) \|", table, re.M)[1:]
    assert len(notes) == 12
    source = "".join(path.read_text() for path in pathlib.Path(js.__file__).parent.rglob("*.py"))
    for note in notes:
        longest = max(re.split(r"\.\.\.|'|-?\d+|lm_head", note), key=len)
        assert longest in source, note
