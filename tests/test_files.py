"""Models in safetensors files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxsparse as js
from jaxsparse import inspect

PARAMS = {
    "params": {
        "up": {"kernel": jax.random.normal(jax.random.key(0), (3, 16, 8)).astype("bfloat16")},
        "down": {"kernel": jax.random.normal(jax.random.key(1), (8, 16))},
        "norm": {"scale": jnp.ones(8), "steps": jnp.arange(3), "zero": -jnp.zeros(4)},
    }
}
PLAN = js.plan(PARAMS, {"up/kernel": js.NM(2, 4, axis=1), "down/kernel": js.NM(2, 4, axis=0)})
MASKS = js.magnitude_masks(PARAMS, PLAN)


def packed(layout="canonical"):
    up = js.compress(PARAMS["params"]["up"], MASKS["params"]["up"], layout=layout)
    return {"params": {**js.compress(PARAMS, MASKS, PLAN)["params"], "up": up}}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(
            np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8)
        )


@pytest.mark.parametrize("layout", ["canonical", "mma16"])
def test_packed_and_masked_models_come_back_bit_by_bit(tmp_path, layout):
    file = tmp_path / "model.safetensors"
    masked = js.effective_params(PARAMS, MASKS)
    for model in (packed(layout), masked):
        js.save_safetensors(model, file)
        same(js.load_safetensors(file), model["params"])
        same(js.load_safetensors(file, like=model), model)
        same(js.load_safetensors(file, like=jax.eval_shape(lambda m=model: m)), model)


def test_others_can_read_the_arrays(tmp_path):
    js.save_safetensors(packed(), tmp_path / "a")
    arrays = safetensors.numpy.load_file(tmp_path / "a")
    np.testing.assert_array_equal(
        arrays["down/kernel/values"], packed()["params"]["down"]["kernel"].values
    )
    assert arrays["down/kernel/metadata"].dtype == np.uint16
    safetensors.numpy.save_file({"x/y": np.arange(3)}, tmp_path / "b")
    assert js.load_safetensors(tmp_path / "b")["x"]["y"].tolist() == [0, 1, 2]


def damaged(tmp_path, change):
    file = tmp_path / "model.safetensors"
    js.save_safetensors(packed(), file)
    with safetensors.safe_open(file, "numpy") as opened:
        header = opened.metadata()
    arrays = safetensors.flax.load_file(file)
    change(arrays, header)
    safetensors.flax.save_file(arrays, file, metadata=header)
    return file


DAMAGE = {
    "places": (
        lambda arrays, _: arrays.update({"down/kernel/metadata": jnp.zeros((16, 1), jnp.uint16)}),
        "down/kernel in .*model.safetensors is damaged. Sparse24: the places in group 0",
    ),
    "a shape": (
        lambda arrays, _: arrays.update({"down/kernel/values": jnp.zeros((16, 6))}),
        r"down/kernel in .* is damaged\. Sparse24: `values` of shape \(16, 6\) do not fit",
    ),
    "a layout": (
        lambda _, header: header.update(jaxsparse=header["jaxsparse"].replace("canonical", "mma8")),
        "kernel in .* is damaged. .*mma8",
    ),
    "a tensor": (
        lambda arrays, _: arrays.pop("up/kernel/metadata"),
        "model.safetensors has no tensor 'up/kernel/metadata'",
    ),
    "the version": (
        lambda _, header: header.update(
            jaxsparse=header["jaxsparse"].replace('"version": 1', '"version": 2')
        ),
        "has version 2 of the format, and this library reads version 1",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(tmp_path, name):
    change, message = DAMAGE[name]
    file = damaged(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        js.load_safetensors(file)
    with pytest.raises(SystemExit, match=message):
        inspect.main([str(file)])


@pytest.mark.parametrize("bytes_left", [0, 4, 100, -1])
def test_a_file_that_is_cut_short_is_refused(tmp_path, bytes_left):
    file = tmp_path / "model.safetensors"
    js.save_safetensors(packed(), file)
    file.write_bytes(file.read_bytes()[:bytes_left])
    with pytest.raises(ValueError, match="is cut short or not a safetensors"):
        js.load_safetensors(file)


def test_what_is_not_as_expected_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    js.save_safetensors(packed(), file)
    for like, message in {
        "dense": (PARAMS, "down/kernel is compressed along KO 8x16 float32, not 8x16 float32"),
        "more": ({**packed()["params"], "more": jnp.ones(1)}, "has no more; it has down/kernel,"),
        "shape": ({"norm": {"scale": jnp.ones(4)}}, "norm/scale is 8 float32, not 4 float32"),
        "dtype": (
            {"norm": {"scale": jnp.ones(8, "bfloat16")}},
            "norm/scale is 8 float32, not 8 bfloat16",
        ),
    }.values():
        with pytest.raises(ValueError, match=message):
            js.load_safetensors(file, like=like)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    file = tmp_path / "model.safetensors"
    for params, error, message in (
        ({"w": "text"}, TypeError, "w is str, which the format does not have"),
        ({"w": jnp.ones(2, "float8_e4m3fn")}, TypeError, "w is float8_e4m3fn"),
        ({"w": packed()["params"]["up"]["kernel"], "w/values": jnp.ones(1)}, ValueError, "two"),
    ):
        with pytest.raises(error, match=message):
            js.save_safetensors(params, file)
    assert not file.exists()


def test_the_command_prints_what_a_file_holds(tmp_path, capsys):
    js.save_safetensors(packed("mma16"), tmp_path / "model.safetensors")
    inspect.main([str(tmp_path / "model.safetensors")])
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[2:]]
    assert [row[0] for row in table] == [
        *("down/kernel", "norm/scale", "norm/steps", "norm/zero", "up/kernel", "all"),
    ]
    assert table[0][1:6] == ["8x16", "float32", "2:4,", "canonical", "KO"]
    assert table[4][1:6] == ["3x16x8", "bfloat16", "2:4,", "mma16", "SKO"]
    with pytest.raises(SystemExit, match="there is no file nothing"):
        inspect.main(["nothing"])
