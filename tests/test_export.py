"""A packed model as one artefact for three platforms, and a file of its weights."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxsparse as js

READER = """
import sys, pathlib, jax, numpy as np, jaxsparse as js
folder = pathlib.Path(sys.argv[1])
exported = jax.export.deserialize(bytearray((folder / "model").read_bytes()))
packed = {"params": js.load_safetensors(folder / "weights")}
np.save(folder / "y.npy", exported.call(packed, np.load(folder / "x.npy")).astype("float32"))
print(exported.platforms)
"""


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        dense = functools.partial(nn.Dense, dtype=x.dtype, param_dtype=x.dtype)
        h = nn.gelu(dense(64, name="up")(nn.RMSNorm(dtype=x.dtype)(x)))
        return x + dense(x.shape[-1], name="down")(h), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.bfloat16)
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(16, param_dtype=x.dtype, name="out")(blocks(name="blocks")(x, None)[0])


@pytest.mark.promotes("norms in Flax promote bfloat16")
def test_one_artefact_runs_in_a_fresh_process(tmp_path):
    model, x = Model(), jax.random.normal(jax.random.key(0), (8, 32))
    params = model.init(jax.random.key(1), x)
    plan = js.flax.plan(model, {"*/kernel": "2:4"}, x)
    packed = js.compress(params, js.magnitude_masks(params, plan), plan, layout="canonical")
    js.assert_sparse(packed, plan)
    fn = jax.jit(js.sparsify(model.apply))
    exported = jax.export.export(fn, platforms=["cpu", "cuda", "tpu"])(packed, x)
    (tmp_path / "model").write_bytes(exported.serialize())
    js.save_safetensors(packed, tmp_path / "weights")
    np.save(tmp_path / "x.npy", x)
    read = subprocess.run(
        [sys.executable, "-c", READER, tmp_path], capture_output=True, text=True, check=True
    )
    assert read.stdout.strip() == "('cpu', 'cuda', 'tpu')"
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), fn(packed, x).astype("float32"))
