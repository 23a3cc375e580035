"""The benchmark's logic, where there is no GPU: what it finds wrong, what it leaves out, what it writes."""

import dataclasses
import functools
import importlib
import json
import pathlib
from types import SimpleNamespace

import interpreted
import jax
import jax.numpy as jnp
import pytest

import jaxsparse as js
from jaxsparse.kernels import KERNELS, hopper


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    import gpu

    return gpu


@pytest.fixture
def checks(gpu):
    return gpu.gpu_checks


def exact(x, w):
    return js.sparse_matmul(x, w)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_probes_find_nothing_wrong_with_a_right_product(checks, dtype):
    found = checks.probes(exact, dtype=dtype)
    assert found == {"values": 0, "metadata": 0, "selectors": 0, "x": 0}


def with_metadata(change):
    return lambda x, w: exact(x, dataclasses.replace(w, metadata=change(w.metadata)))


WRONG = {
    "values shifted": (lambda x, w: exact(x, dataclasses.replace(w, values=jnp.roll(w.values, 1, 1))), "values"),
    "rows of the weight exchanged": (lambda x, w: exact(x, w)[:, ::-1], "values"),
    "halves of words exchanged": (with_metadata(lambda words: words >> 16 | words << 16), "metadata"),
    "lanes of a quad exchanged": (with_metadata(lambda words: words.reshape(-1, 2)[:, ::-1].reshape(words.shape)), "selectors"),
    "columns of x exchanged": (lambda x, w: exact(x.at[:, :2].set(x[:, 1::-1]), w), "values"),
    "rows of x exchanged": (lambda x, w: exact(x[::-1], w), "x"),
}


@pytest.mark.parametrize(("multiply", "operand"), WRONG.values(), ids=WRONG.keys())
def test_the_probes_name_what_is_wrong(checks, multiply, operand):
    assert checks.probes(multiply)[operand] > 0


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 cannot interpret transposed references")
def test_the_probes_pass_the_hopper_kernel(checks):
    run = functools.partial(hopper.matmul, cores=2, ops=interpreted.hopper_ops, **interpreted.params())
    assert not any(checks.probes(lambda x, w: run(x, w.values, w.metadata)).values())


def test_integers_and_errors_notice_a_missing_step(checks):
    def lacks_a_step(x, w):
        return exact(x.at[:, 64:128].set(0), w)

    assert checks.wrong_integers(exact, 8, 128, 256) == 0 and checks.error(exact, 8, 128, 256) <= 0.51
    assert checks.wrong_integers(lacks_a_step, 8, 128, 256) > 0 and checks.error(lacks_a_step, 8, 128, 256) > 1


def test_a_wrong_gradient_is_noticed(gpu):
    right, shapes = gpu.x_gradient("dense"), {"small": (128, 128)}

    def found(gradient):
        return gpu.checks(exact, gradient, lambda *sizes: True, shapes, [8])

    assert found(right)["right"] and found(right)["wrong integers of gradients"] == {"8 x 128 x 128": 0}
    assert not found(lambda ct, w: right(ct.at[:, :4].set(0), w))["right"]
    assert not found(lambda ct, w: exact(ct, w))["right"]


def written(folder):
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


def test_the_smoke_run_takes_every_step(gpu, tmp_path):
    gpu.main(["--smoke", "--out", str(tmp_path)])
    found = written(tmp_path)
    assert found["checks"]["dense"]["right"] and not found["left_out"]
    assert [(one["M"], one["rows"]) for one in found["timings"]] == [(128, 8), (136, 8), (128, 3), (136, 3)]
    assert all(one["microseconds"].keys() == {"dense", "jax dense"} for one in found["timings"])
    assert all("needs a CUDA device" in found["kernels"][name] for name in KERNELS)
    assert all(time > 0 for time in found["packing"].values())
    parts = {"dense", "dense, turned before", "turning", "decompressing", "jax dense"}
    assert [(one["shape"], one["microseconds"].keys()) for one in found["gradients"]] == [(name, parts) for name in gpu.SMOKE_SHAPES]


def test_a_wrong_kernel_is_not_timed_and_time_runs_out(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "runs_here", lambda name: None)
    x_gradient = gpu.x_gradient
    monkeypatch.setattr(gpu, "x_gradient", lambda name: x_gradient("dense"))
    monkeypatch.setattr(gpu, "product", lambda name: exact if name == "decode" else lambda x, w: exact(x, w) + 1)
    gpu.main(["--smoke", "--out", str(tmp_path)])
    found = written(tmp_path)
    assert [found["checks"][name]["right"] for name in KERNELS] == [False, False, True]
    fitting = [one for one in found["timings"] if one["M"] == 128]
    assert all(one["best"] == "decode" and one["over jax dense"] > 0 for one in fitting)
    assert all(one["microseconds"].keys() == {"jax dense"} for one in found["timings"] if one["M"] == 136)
    gpu.main(["--smoke", "--out", str(tmp_path), "--seconds", "0"])
    assert not written(tmp_path)["timings"] and len(written(tmp_path)["left_out"]) == 6


def test_variants_tell_configurations_apart(gpu, monkeypatch):
    def matmul(x, values, metadata, config, cores):
        w = js.Sparse24(values, metadata, (128,), (128,), layout="mma16")
        return exact(x, w) + (8 if config["unroll"] == 2 else 0)

    monkeypatch.setattr(gpu.importlib, "import_module", lambda name: SimpleNamespace(Config=dict, matmul=matmul))
    first, second = gpu.variants("decode", 8, 128, 128, [{"unroll": 1}, {"unroll": 2}], 2)
    assert first["differs"] < 0.1 and second["differs"] > 7
    assert first["config"] == "{'unroll': 1}" and first["microseconds"] > 0


def test_every_variant_and_shape_is_one_that_the_kernels_take(gpu):
    for name, (n, m, k, configs) in gpu.VARIANTS.items():
        module = importlib.import_module(f"jaxsparse.kernels.{name}")
        assert gpu.fits(name, n, m, k) and all(module.Config(**config) for config in configs)
    fitting = {name: sum(gpu.fits(name, 1, *shape) for shape in gpu.SHAPES.values()) for name in KERNELS}
    assert fitting == {"hopper": 15, "ampere": 14, "decode": 15}


def test_without_a_gpu_it_says_so(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "is no GPU; --smoke runs the steps without one" in capsys.readouterr().err


def test_a_row_of_the_table(gpu):
    seconds = {"decode": 1e-3, "hopper": 2e-3, "jax dense": 1.5e-3, "torch semi-structured": 3e-3}
    row = gpu.row("some", 1000, 1000, 1000, seconds, (4e12, 1e12))
    assert (row["best"], row["over jax dense"], row["over torch"], row["TFLOP/s"]) == ("decode", 1.5, 3.0, pytest.approx(2.0))
    assert row["GB/s"] == pytest.approx(1.125 + 4) and row["of bound"] == pytest.approx(0.5)
