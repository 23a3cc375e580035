"""Compressed weights: their format, bit for bit, and their behaviour as pytrees."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse as js

DTYPES = ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]


def bits(a):
    """Bits that distinguish -0 from 0, with all NaN equal.

    XLA moves 16-bit floats through wider ones, which loses the payload of NaN.
    """
    a = np.array(a)
    nan = np.isnan(a.astype(np.float32))
    a = a.view(f"uint{8 * a.dtype.itemsize}")
    return np.where(nan, np.iinfo(a.dtype).max, a)


def random_mask(shape, axis, seed):
    """A mask with 2 of every 4 along `axis`, at random places."""
    order = np.random.default_rng(seed).permuted(
        np.broadcast_to([True, True, False, False], (math.prod(shape) // 4, 4)), axis=1
    )
    moved = [size for i, size in enumerate(shape) if i != axis % len(shape)] + [shape[axis]]
    return np.moveaxis(order.reshape(moved), -1, axis)


def random_weights(shape, dtype, seed):
    """Weights of arbitrary bits, with NaN, infinities and subnormal numbers among them."""
    dtype = jnp.dtype(dtype)
    random = np.random.default_rng(seed)
    w = (
        random.integers(0, 256, (math.prod(shape), dtype.itemsize), np.uint8)
        .view(dtype)
        .reshape(shape)
    )
    if dtype == np.int8:
        return w
    special = np.array(
        [0.0, -0.0, 1.0, np.nan, np.inf if np.isinf(dtype.type(np.inf)) else np.nan], np.float32
    ).astype(dtype)
    return np.where(random.random(shape) < 0.5, random.choice(special, shape), w)


def packed_row(row, mask):
    """Packs one row into values and words with a nibble `idx0 | idx1 << 2` for each group."""
    values, words, nibbles = [], [], []
    for start in range(0, len(row), 4):
        first, second = [i for i in range(4) if mask[start + i]]
        values += [row[start + first], row[start + second]]
        nibbles.append(first | second << 2)
    nibbles += [0 | 1 << 2] * (-len(nibbles) % 4)
    for start in range(0, len(nibbles), 4):
        low, high = (nibbles[start + i] | nibbles[start + i + 1] << 4 for i in (0, 2))
        words.append(int.from_bytes(bytes([low, high]), "little"))
    return values, words


def check_format(w, mask, packed, begin, end, output_first=False):
    """Checks that `packed` holds `w` row by row, in the order of the outputs.

    The axes begin..end of `w` are contracted.
    """
    contracted = math.prod(w.shape[begin:end])
    if output_first:
        rows, marks = (a.reshape(-1, contracted) for a in (w, mask))
    else:
        rows, marks = (
            np.moveaxis(a.reshape(math.prod(a.shape[:begin]), contracted, -1), 1, 2).reshape(
                -1, contracted
            )
            for a in (w, mask)
        )
    values, words = zip(*map(packed_row, rows, marks), strict=True)
    assert packed.metadata.dtype == jnp.uint16
    assert packed.values.dtype == w.dtype
    assert packed.metadata.shape[-1] == math.ceil(contracted / 16)
    np.testing.assert_array_equal(
        bits(packed.values).reshape(len(rows), -1), bits(np.array(values, w.dtype))
    )
    np.testing.assert_array_equal(
        np.asarray(packed.metadata).reshape(len(rows), -1), np.array(words)
    )
    assert packed.shape == w.shape
    assert packed.ndim == w.ndim and packed.size == w.size
    assert packed.dtype == w.dtype
    assert packed.nbytes == packed.values.size * w.dtype.itemsize + 2 * packed.metadata.size


def optimized(fn):
    """Compiles `fn` with the default optimizations, unlike the other programs of the tests.

    XLA:CPU computes bfloat16 in float32, which loses the smallest numbers unless it is optimized
    away.
    """
    options = {
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
    }
    return jax.jit(fn, compiler_options=options)


def compressed(w, mask, plan):
    pack = optimized(lambda w, mask: js.compress({"w": w}, {"w": mask}, plan)["w"])
    return pack(jnp.asarray(w), jnp.asarray(mask))


def check_round_trip(w, mask, packed):
    back = optimized(js.decompress)(packed)
    assert back.shape == w.shape
    assert back.dtype == w.dtype
    np.testing.assert_array_equal(bits(back), np.where(mask, bits(w), 0))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_matrix_of_any_bits(groups, outputs, dtype, output_first, seed):
    shape = (outputs, 4 * groups) if output_first else (4 * groups, outputs)
    axis = 1 if output_first else 0
    w, mask = random_weights(shape, dtype, seed), random_mask(shape, axis, seed)
    packed = compressed(w, mask, js.plan({"w": w}, {"w": js.NM(2, 4, axis=axis)}))
    check_format(w, mask, packed, axis, axis + 1, output_first)
    check_round_trip(w, mask, packed)
    assert packed.axes == ("OK" if output_first else "KO")
    assert packed.axis == axis - 2


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    st.integers(0, 999),
)
def test_dense_general_with_several_contracted_and_output_axes(
    first, groups, out_a, out_b, dtype, seed
):
    model, x = nn.DenseGeneral((out_a, out_b), axis=(-2, -1)), jnp.zeros((2, first, 4 * groups))
    plan = js.flax.plan(model, {"kernel": "2:4"}, x)
    shape = (first, 4 * groups, out_a, out_b)
    w, mask = random_weights(shape, dtype, seed), random_mask(shape, 1, seed)
    params, masks = (
        {"kernel": jnp.asarray(w), "bias": jnp.zeros((out_a, out_b))},
        {"kernel": jnp.asarray(mask), "bias": jnp.asarray(True)},
    )
    packed = js.compress(params, masks, plan)
    assert packed["bias"] is params["bias"]
    assert packed["kernel"].contracting == shape[:2]
    assert packed["kernel"].output == shape[2:]
    check_format(w, mask, packed["kernel"], 0, 2)
    check_round_trip(w, mask, packed["kernel"])


@pytest.mark.parametrize("axis", [-2, -1])
def test_a_stack_is_packed_weight_by_weight(axis):
    shape = (3, 2, 8, 12)
    w, mask = random_weights(shape, "bfloat16", 1), random_mask(shape, axis, 1)
    packed = compressed(w, mask, js.plan({"w": w}, {"w": js.NM(2, 4, axis=axis)}))
    check_round_trip(w, mask, packed)
    assert packed.values.shape == ((3, 2, 12, 4) if axis == -2 else (3, 2, 8, 6))
    check_format(w, mask, packed, 4 + axis, 5 + axis, axis == -1)
    one = jax.tree.map(lambda leaf: leaf[1, 0], packed)
    assert one.shape == (8, 12)
    check_round_trip(w[1, 0], mask[1, 0], one)


@pytest.mark.parametrize(
    "dtype, saved",
    [("bfloat16", 28 / 64), ("float16", 28 / 64), ("int8", 12 / 32), ("float8_e4m3fn", 12 / 32)],
)
def test_bytes_saved(dtype, saved):
    w, mask = random_weights((64, 8), dtype, 0), random_mask((64, 8), 0, 0)
    packed = js.compress({"w": jnp.asarray(w)}, {"w": jnp.asarray(mask)})["w"]
    assert 1 - packed.nbytes / w.nbytes == saved


def test_worked_nibbles():
    marks = {"TTFF": 4, "TFTF": 8, "FTTF": 9, "TFFT": 12, "FTFT": 13, "FFTT": 14}
    mask = jnp.array([[letter == "T" for letter in word] for word in marks])
    params = {"w": mask.astype(jnp.float32)}
    plan = js.plan(params, {"w": js.NM(2, 4, axis=1)})
    packed = js.compress(params, {"w": mask}, plan)["w"]
    assert [int(word) & 15 for word in packed.metadata[:, 0]] == list(marks.values())


def example(dtype=jnp.float32, stack=()):
    """A weight, its mask and its packed form."""
    w = jax.random.normal(jax.random.key(0), (*stack, 24, 6)).astype(dtype)
    plan = js.plan({"w": w}, {"w": js.NM(2, 4, axis=-2)})
    masks = js.magnitude_masks({"w": w}, plan)
    return (
        jnp.where(masks["w"], w, 0),
        js.compress({"w": w}, masks, plan)["w"],
        (w, masks["w"], plan),
    )


def test_compress_under_jit():
    _, packed, (w, mask, plan) = example()
    jitted = jax.jit(lambda w, mask: js.compress({"w": w}, {"w": mask}, plan)["w"])(w, mask)
    assert jax.tree.structure(jitted) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, jitted, packed)


@pytest.mark.parametrize("layout", ["canonical", "mma16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_compress_is_elementwise_work_on_the_device(axis, layout):
    shapes = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16), jax.ShapeDtypeStruct((128, 128), bool)
    plan = js.plan({"w": shapes[0]}, {"w": js.NM(2, 4, axis=axis)})
    compiled = (
        jax.jit(lambda w, mask: js.compress({"w": w}, {"w": mask}, plan, layout=layout))
        .lower(*shapes)
        .compile()
        .as_text()
    )
    assert not any(
        name in compiled
        for name in (
            " sort(",
            " gather(",
            " scatter(",
            " custom-call(",
            " while(",
            "infeed",
            "outfeed",
            "callback",
        )
    )


def test_jit_and_device_put_keep_the_static_part():
    dense, packed, _ = example()
    for moved in (jax.jit(lambda p: p)(packed), jax.device_put(packed, jax.devices()[0])):
        assert jax.tree.structure(moved) == jax.tree.structure(packed)
        np.testing.assert_array_equal(js.decompress(moved), dense)
    np.testing.assert_array_equal(jax.jit(js.decompress)(packed), dense)


def test_casting_its_floating_arrays_casts_the_weight():
    dense, packed, _ = example()
    cast = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a, packed
    )
    assert cast.dtype == jnp.bfloat16
    assert cast.metadata.dtype == jnp.uint16
    np.testing.assert_array_equal(js.decompress(cast), dense.astype(jnp.bfloat16))


def test_scan_slices_a_stack_and_vmap_maps_over_it():
    dense, packed, _ = example(stack=(3,))
    assert packed.shape == (3, 24, 6)

    def body(carry, one):
        assert one.shape == (24, 6)
        return carry, js.decompress(one)

    np.testing.assert_array_equal(jax.lax.scan(body, 0, packed)[1], dense)
    np.testing.assert_array_equal(jax.vmap(lambda one: body(0, one)[1])(packed), dense)
    np.testing.assert_array_equal(
        js.decompress(jax.tree.map(lambda *a: jnp.stack(a), packed, packed)),
        jnp.stack([dense, dense]),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_checkpoint_gives_it_back(dtype, tmp_path):
    dense, packed, _ = example(dtype)
    tree = {"layer": {"kernel": packed, "bias": jnp.ones(6)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "packed", jax.eval_shape(lambda: tree))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    np.testing.assert_array_equal(js.decompress(restored)["layer"]["kernel"], dense)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda mask: mask.at[4:8, 2].set(True),
        lambda mask: mask.at[8:12, 0].set(False),
        jnp.zeros_like,
    ],
)
@pytest.mark.parametrize("with_plan", [True, False])
def test_a_mask_that_is_not_2_of_4_is_refused_with_its_path(spoil, with_plan):
    _, _, (w, mask, plan) = example()
    plan = js.plan({"layer": {"w": w}}, {"layer/w": js.NM(2, 4, axis=-2)}) if with_plan else None
    with pytest.raises(ValueError, match=r"layer/w.* does not keep exactly 2 of every 4 along "):
        js.compress({"layer": {"w": w}}, {"layer": {"w": spoil(mask)}}, plan)


def test_another_pattern_is_refused_with_its_path():
    w = jnp.arange(32.0).reshape(8, 4)
    plan = js.plan({"w": w}, {"w": js.NM(1, 4, axis=0)})
    with pytest.raises(ValueError, match="w is planned as 1:4, but the compressed format is 2:4"):
        js.compress({"w": w}, js.magnitude_masks({"w": w}, plan), plan)
