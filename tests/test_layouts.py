"""Packed weights under lane-level emulations of the instructions, and conversions of layouts."""

import chex
import jax
import jax.numpy as jnp
import lanes
import numpy as np
import pytest
from flax import serialization

import jaxsparse as js
from jaxsparse._packed import layouts


def packed(rows=128, columns=256, layout="mma16", dtype=jnp.bfloat16, seed=0):
    """The masked weight as `[M, K]`, and its packed form."""
    mask, weights = lanes.prune(np.random.default_rng(seed), rows, columns)
    w = js.compress(
        {"w": jnp.asarray(weights.T, dtype)}, {"w": jnp.asarray(mask.T)}, layout=layout
    )["w"]
    return weights * mask, w


def product(instruction, values, words, x):
    """W x by an emulated instruction for 64 rows and 32 columns."""
    (rows, _), (_, columns) = words.shape[:2], words.shape[:2]
    y = np.zeros((64 * rows, x.shape[1]), np.float32)
    for i, k, selector in np.ndindex(rows, columns, 2):
        column = 64 * k + 32 * selector
        a = values[64 * i : 64 * i + 64, column // 2 : column // 2 + 16]
        y[64 * i : 64 * i + 64] += instruction(a, x[column : column + 32], words[i, k], selector)
    return y


def by_warps(a, x, words, selector):
    """The product of 64 rows by mma.sp, one for each warp and 8 columns of x."""
    y = np.zeros((64, x.shape[1]), np.float32)
    for warp, n in np.ndindex(4, x.shape[1] // 8):
        a_fragment = a[16 * warp : 16 * warp + 16][lanes.A_ROW, lanes.A_COLUMN]
        b_fragment = x[:, 8 * n : 8 * n + 8][lanes.B_ROW, lanes.B_COLUMN]
        d = lanes.mma_sp_m16n8k32(
            a_fragment,
            b_fragment,
            np.zeros((32, 4), np.float32),
            words[32 * warp : 32 * warp + 32],
            selector,
        )
        y[16 * warp : 16 * warp + 16, 8 * n : 8 * n + 8][lanes.C_ROW, lanes.C_COLUMN] = d
    return y


@pytest.mark.parametrize("instruction", [by_warps, lanes.wgmma_sp_m64k32])
def test_the_lanes_read_what_was_packed(instruction):
    dense, w = packed()
    x = np.random.default_rng(1).integers(-9, 10, (256, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        product(instruction, np.asarray(w.values, np.float32), np.asarray(w.metadata), x), dense @ x
    )


WRONG = {
    "lanes of a quad exchanged": lambda words: words.reshape(*words.shape[:-1], 32, 4)[
        ..., [1, 0, 2, 3]
    ].reshape(words.shape),
    "selectors exchanged": lambda words: words.reshape(*words.shape[:-1], 32, 2, 2)[
        ..., ::-1, :
    ].reshape(words.shape),
    "row halves exchanged": lambda words: words >> 16 | words << 16,
    "warps exchanged": lambda words: np.roll(words, 32, -1),
    "column tiles exchanged": lambda words: words[:, ::-1],
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("instruction", [by_warps, lanes.wgmma_sp_m64k32])
def test_the_emulators_notice_a_wrong_arrangement(instruction, change):
    dense, w = packed()
    x = np.random.default_rng(1).integers(-9, 10, (256, 8)).astype(np.float32)
    assert (
        product(instruction, np.asarray(w.values, np.float32), change(np.asarray(w.metadata)), x)
        != dense @ x
    ).any()


def test_the_emulators_refuse_unordered_places():
    _, w = packed()
    bad = np.asarray(w.metadata) & ~np.uint32(15)
    with pytest.raises(lanes.UnorderedMetadataError):
        product(
            lanes.wgmma_sp_m64k32,
            np.asarray(w.values, np.float32),
            bad,
            np.ones((256, 8), np.float32),
        )


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (64, 64), (8, 4), (200, 68), (130, 132)])
def test_layouts_round_trip_and_hold_only_legal_words(rows, columns):
    dense, tiled = packed(rows, columns)
    _, canonical = packed(rows, columns, "canonical")
    assert tiled.metadata.shape == (-(-rows // 128) * 2, -(-columns // 128) * 2, 128)
    assert canonical.with_layout("mma16").metadata.tolist() == tiled.metadata.tolist()
    back = tiled.with_layout("canonical")
    assert (
        back.metadata.dtype == jnp.uint16 and back.metadata.tolist() == canonical.metadata.tolist()
    )
    assert (jax.tree.structure(back), jax.tree.structure(tiled)) == (
        jax.tree.structure(canonical),
        jax.tree.structure(tiled),
    )
    nibbles = np.asarray(tiled.metadata)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    assert set(np.unique(nibbles)) <= {4, 8, 9, 12, 13, 14}
    np.testing.assert_array_equal(js.decompress({"w": tiled})["w"], dense.T)


def test_a_stack_is_tiled_weight_by_weight():
    both = [packed(seed=seed)[1] for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    assert (
        stacked.with_layout("canonical").with_layout("mma16").metadata.tolist()
        == stacked.metadata.tolist()
    )
    x = jnp.asarray(np.random.default_rng(2).integers(-3, 4, (2, 5, 256)), jnp.bfloat16)
    scanned = jax.lax.scan(
        lambda _, step: (None, js.sparse_matmul(step[0], step[1])), None, (x, stacked)
    )[1]
    np.testing.assert_array_equal(
        scanned, jnp.stack([js.sparse_matmul(a, w) for a, w in zip(x, both, strict=True)])
    )


@pytest.mark.parametrize("jit", [False, True])
def test_compress_chooses_the_layout_of_the_backend(monkeypatch, jit):
    mask, weights = lanes.prune(np.random.default_rng(0), 64, 64)
    plan = js.plan({"w": jnp.asarray(weights.T)}, {"w": js.NM(2, 4, axis=0)})

    def layout(dtype):
        pack = lambda w, m: js.compress({"w": w}, {"w": m}, plan)["w"]  # noqa: E731
        return (jax.jit(pack) if jit else pack)(
            jnp.asarray(weights.T, dtype), jnp.asarray(mask.T)
        ).layout

    # the fallback on a CPU reads the metadata without a conversion
    assert layout(jnp.bfloat16) == "canonical"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (layout(jnp.bfloat16), layout(jnp.float16), layout(jnp.float32)) == (
        "mma16",
        "mma16",
        "canonical",
    )


def test_flax_writes_canonical_metadata_and_restores_the_layout_of_the_target():
    assert js.flax  # registers what flax.serialization has to know
    both = {layout: packed(layout=layout)[1] for layout in ("canonical", "mma16")}
    fresh = {layout: jax.tree.map(jnp.zeros_like, w) for layout, w in both.items()}
    assert serialization.to_bytes(both["canonical"]) == serialization.to_bytes(both["mma16"])
    for layout, w in both.items():
        restored = serialization.from_bytes(
            fresh[layout], serialization.to_bytes(both["canonical"])
        )
        chex.assert_trees_all_equal(restored, w)


@pytest.mark.usefixtures("unchecked_types")
def test_layouts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no metadata layout 'mma8'"):
        packed(layout="mma8")
    with pytest.raises(ValueError, match="for weights of 16 bits, but this weight is float32"):
        packed(dtype=jnp.float32)


def test_the_dense_fallback_takes_canonical_metadata_as_they_are():
    _, w = packed(64, 64, "canonical")
    text = jax.jit(js.sparse_matmul).lower(jnp.ones((3, 64), jnp.bfloat16), w).as_text()
    assert "ui32" not in text
    assert layouts.preferred_layout(jnp.bfloat16) == "canonical"
