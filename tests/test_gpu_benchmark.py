"""The logic of the GPU benchmark without a GPU: errors it finds, cases it skips, its output."""

import dataclasses
import functools
import json
import pathlib
from types import SimpleNamespace

import interpreted
import jax
import jax.numpy as jnp
import pytest

import jaxsparse as js
from jaxsparse._kernels import KERNELS, hopper

pytestmark = [pytest.mark.slow, pytest.mark.promotes("the benchmark is not the library")]


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
    wrong = checks.probes(exact, dtype=dtype)
    assert wrong == {"values": 0, "metadata": 0, "selectors": 0, "x": 0}


def with_metadata(change):
    return lambda x, w: exact(x, dataclasses.replace(w, metadata=change(w.metadata)))


WRONG = {
    "values shifted": (
        lambda x, w: exact(x, dataclasses.replace(w, values=jnp.roll(w.values, 1, 1))),
        "values",
    ),
    "rows of the weight exchanged": (lambda x, w: exact(x, w)[:, ::-1], "values"),
    "halves of words exchanged": (
        with_metadata(lambda words: words >> 16 | words << 16),
        "metadata",
    ),
    "lanes of a quad exchanged": (
        with_metadata(lambda words: words.reshape(-1, 2)[:, ::-1].reshape(words.shape)),
        "selectors",
    ),
    "columns of x exchanged": (lambda x, w: exact(x.at[:, :2].set(x[:, 1::-1]), w), "values"),
    "rows of x exchanged": (lambda x, w: exact(x[::-1], w), "x"),
}


@pytest.mark.parametrize(("multiply", "operand"), WRONG.values(), ids=WRONG.keys())
def test_the_probes_name_what_is_wrong(checks, multiply, operand):
    assert checks.probes(multiply)[operand] > 0


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 cannot interpret transposed references"
)
def test_the_probes_pass_the_hopper_kernel(checks):
    run = functools.partial(
        hopper.matmul, cores=2, ops=interpreted.hopper_ops, **interpreted.params()
    )
    assert not any(checks.probes(lambda x, w: run(x, w.values, w.metadata)).values())


def test_integers_and_errors_notice_a_missing_step(checks):
    def lacks_a_step(x, w):
        return exact(x.at[:, 64:128].set(0), w)

    assert (
        checks.wrong_integers(exact, 8, 128, 256) == 0 and checks.error(exact, 8, 128, 256) <= 0.51
    )
    assert (
        checks.wrong_integers(lacks_a_step, 8, 128, 256) > 0
        and checks.error(lacks_a_step, 8, 128, 256) > 1
    )


def test_a_wrong_gradient_is_noticed(gpu, monkeypatch):
    right = gpu.x_gradient("dense")

    def checked(gradient):
        monkeypatch.setattr(gpu, "x_gradient", lambda name: gradient)
        return gpu.checks("dense", {"small": (128, 128), "padded": (133, 132)}, (8, 3))

    assert checked(right)["right"] and checked(right)["wrong integers of gradients"] == {
        "8 x 128 x 128": 0
    }
    assert not checked(lambda ct, w: right(ct.at[:, :4].set(0), w))["right"]
    assert not checked(lambda ct, w: exact(ct, w))["right"]


def written(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_the_smoke_run_takes_every_step(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "MASKS", gpu.MASKS[:1])
    gpu.main(["--smoke", "--out", str(tmp_path)])
    results = written(tmp_path)
    assert results["checks"]["dense"]["right"] and not results["left_out"] and not results["wrong"]
    assert [(one["M"], one["rows"]) for one in results["timings"]] == [
        (128, 8),
        (128, 3),
        (133, 8),
        (133, 3),
    ]
    assert all(one["microseconds"].keys() == {"dense", "jax dense"} for one in results["timings"])
    assert all("needs a CUDA device" in results["checks"][name]["why"] for name in KERNELS)
    assert [one.keys() for one in results["gradients"]] == [
        {"shape", "rows", "dense", "dense, turned before", "turning", "decompressing", "jax dense"}
    ]
    once = {one["what"]: one for one in results["weights once"]}
    assert (
        once["read once"]["over reading once"] == 1
        and {"2:4 axis 0", "compress, mma16"} < once.keys()
    )
    assert all(one["GB/s"] > 0 for one in once.values())
    assert [*tmp_path.glob("*.png")] and "over jax dense" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed_and_time_runs_out(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "weights_once", lambda *_: [])
    monkeypatch.setattr(gpu, "runs_here", lambda name: None)
    x_gradient, fused = gpu.x_gradient, gpu.fused
    monkeypatch.setattr(gpu, "x_gradient", lambda name: x_gradient("dense"))
    monkeypatch.setattr(gpu, "fused", lambda name: fused("dense"))
    monkeypatch.setattr(
        gpu, "product", lambda name: exact if name == "decode" else lambda x, w: exact(x, w) + 1
    )
    gpu.main(["--smoke", "--out", str(tmp_path)])
    results = written(tmp_path)
    assert [results["checks"][name]["right"] for name in KERNELS] == [False, False, True]
    assert all(one["best"] == "decode" and one["over jax dense"] > 0 for one in results["timings"])
    monkeypatch.setattr(gpu, "checks", lambda *_: {"right": True})
    gpu.main(["--smoke", "--out", str(tmp_path), "--seconds", "0"])
    assert not written(tmp_path)["timings"] and written(tmp_path)["left_out"][:2] == [
        "small",
        "padded",
    ]
    assert len(written(tmp_path)["left_out"]) == 4


def test_a_kernel_that_hangs_or_faults_takes_nothing_with_it(gpu, tmp_path, monkeypatch):
    assert "needs a CUDA device" in gpu.examined_apart("hopper", 300)["why"]
    assert "did not end in 0 seconds" in gpu.examined_apart("hopper", 0.01)["why"]
    assert "invalid choice: 'none'" in gpu.examined_apart("none", 300)["why"]

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "weights_once", fails)
    monkeypatch.setattr(gpu, "gradient_turns", lambda *_: {})
    gpu.main(["--smoke", "--out", str(tmp_path / "new")])
    assert written(tmp_path / "new")["failed"] == {
        "masks and packing": "RuntimeError: out of memory"
    }
    assert len(written(tmp_path / "new")["timings"]) == 4


def test_nan_is_not_right(gpu, monkeypatch):
    errors = iter([0.1, float("nan")])
    monkeypatch.setattr(gpu.gpu_checks, "error", lambda *_, **__: next(errors, 0.1))
    assert not gpu.checks("dense", {"small": (128, 128)}, (8, 3))["right"]


def test_a_kernel_that_is_wrong_for_one_shape_is_not_timed_there(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "runs_here", lambda name: None if name == "decode" else "no")
    monkeypatch.setattr(gpu, "checks", lambda *_: {"right": True})
    monkeypatch.setattr(gpu, "weights_once", lambda *_: [])
    monkeypatch.setattr(gpu, "gradient_turns", lambda *_: {})
    monkeypatch.setattr(
        gpu,
        "product",
        lambda name: lambda x, w: exact(x, w) + (jnp.nan if w.output == (133,) else 0),
    )
    gpu.main(["--smoke", "--out", str(tmp_path)])
    results = written(tmp_path)
    assert [(one["shape"], one["kernel"]) for one in results["wrong"]] == [("padded", "decode")] * 2
    assert [one["microseconds"].keys() for one in results["timings"]] == [
        {"decode", "jax dense"},
        {"decode", "jax dense"},
        {"jax dense"},
        {"jax dense"},
    ]


def test_variants_tell_configurations_apart(gpu, monkeypatch):
    def matmul(x, values, metadata, config, cores):
        if config["unroll"] == 3:
            raise ValueError("too much shared memory")
        w = js.Sparse24(values, metadata, (128,), (128,), layout="mma16")
        return exact(x, w) + (8 if config["unroll"] == 2 else 0)

    fake = SimpleNamespace(module=SimpleNamespace(Config=dict, matmul=matmul))
    monkeypatch.setitem(gpu.KERNELS, "decode", fake)
    configs = [{"unroll": 1}, {"unroll": 2}, {"unroll": 3}]
    first, second, dense, third = gpu.variants("decode", 8, 128, 128, configs, 2)
    assert (
        first["error"] < 1
        and second["error"] > 7
        and second["microseconds"] != second["microseconds"]
    )
    assert first["config"] == "{'unroll': 1}" and first["microseconds"] > 0
    assert dense["config"] == "jax dense" and "too much shared memory" in third["why"]


def test_every_variant_is_one_that_the_kernels_take(gpu):
    for kernel in KERNELS.values():
        for (n, _, k), configs in kernel.configs.items():
            assert kernel.misfit(n, jnp.bfloat16) is None and k % kernel.multiples[0] == 0
            assert all(kernel.module.Config(**config) for config in configs)
    for configs in KERNELS["decode"].configs.values():
        assert all(config["warpgroups"] <= config["tile_m"] // 16 for config in configs)
    assert set(gpu.MASKS) < gpu.masks.patterns().keys()
    assert set(gpu.CHECKED) < gpu.SHAPES.keys()


def test_without_a_gpu_it_says_so(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "is not a GPU; --smoke runs the steps without one" in capsys.readouterr().err


def test_a_row_of_the_table(gpu):
    seconds = {"decode": 1e-3, "hopper": 2e-3, "jax dense": 1.5e-3, "torch semi-structured": 3e-3}
    row = gpu.gpu_report.row("some", 1000, 1000, 1000, seconds, (4e12, 1e12))
    assert (row["best"], row["over jax dense"], row["over torch"], row["TFLOP/s"]) == (
        "decode",
        1.5,
        3.0,
        pytest.approx(2.0),
    )
    assert row["GB/s"] == pytest.approx(1.125 + 4) and row["of bound"] == pytest.approx(0.5)


def timed(m, k, n, dense, **kernels):
    return {
        "shape": f"{m} x {k}",
        "rows": n,
        "M": m,
        "K": k,
        "microseconds": {"jax dense": dense, **kernels},
    }


def test_choices_are_where_a_kernel_won_at_every_shape(gpu):
    timings = [
        *(
            timed(m, m, n, 10, decode=d)
            for n in (1, 16)
            for m, d in ((1024, 11), (2048, 6), (4096, 6))
        ),
        *(
            timed(m, m, 64, 10, decode=d, hopper=h)
            for m, d, h in ((1024, 11, 20), (2048, 8, 20), (4096, 9.9, 20))
        ),
        *(timed(m, 2048, 4096, 10, hopper=h) for m, h in ((1024, 12), (4096, 9), (8192, 7))),
        timed(8192, 512, 4096, 10, hopper=9),
    ]
    decode = ((9, 0),), "decode", 1, 16, 2048 * 2048, 2048
    hopper = ((9, 0),), "hopper", 4096, 4096, 8192 * 512, 512
    assert gpu.gpu_report.choices(timings, [], (9, 0)) == [decode, hopper]  # the faster one first
    assert gpu.gpu_report.choices([], [], (9, 0)) == []


def test_a_shape_at_which_a_kernel_was_wrong_is_one_that_it_lost(gpu):
    timings = [
        timed(1024, 1024, 16, 10, decode=5),
        timed(2048, 2048, 16, 10),
        timed(4096, 4096, 16, 10, decode=5),
    ]
    wrong = [{"kernel": "decode", "shape": "2048 x 2048", "rows": 16, "error": 3.0}]
    assert gpu.gpu_report.choices(timings, [], (9, 0)) == [
        (((9, 0),), "decode", 16, 16, 1024 * 1024, 1024)
    ]
    assert gpu.gpu_report.choices(timings, wrong, (9, 0)) == [
        (((9, 0),), "decode", 16, 16, 4096 * 4096, 4096)
    ]


def test_the_readme_shows_what_was_measured_or_that_nothing_was(gpu, tmp_path, monkeypatch):
    import readme

    text = "before\n<!-- gpu -->\nold\n<!-- end -->\nafter"
    monkeypatch.setattr(readme.timing, "RESULTS", tmp_path)
    assert "no speed is measured" in readme.filled(text) and "old" not in readme.filled(text)
    peaks = (4e12, 1e12)
    timings = [
        gpu.gpu_report.row("some", n, 1000, 1000, {"decode": 1e-3, "jax dense": n * 1e-3}, peaks)
        for n in (1, 2)
    ]
    timings.append(gpu.gpu_report.row("other", 2, 500, 1000, {"jax dense": 1e-3}, peaks))
    configs = [
        {"config": "{'tile_m': 16}", "microseconds": 20.0, "error": 0.5},
        {"config": "{'tile_m': 32}", "microseconds": 10.0, "error": 0.5},
        {"config": "jax dense", "microseconds": 15.0, "error": 0.5},
        {"config": "{'tile_m': 64}", "why": "too much shared memory"},
    ]
    timing = readme.timing
    timing.save(
        "NVIDIA_X",
        tmp_path,
        variants={"decode, 16 x 1000 x 1000": configs},
        checks={"decode": {"right": True}},
        timings=timings,
        wrong=[],
        left_out=["a"],
    )
    lines = readme.filled(text).splitlines()
    assert any("`decode` right" in line for line in lines)
    assert any("1 left out" in line for line in lines)
    (best,) = [line.split("|")[1:-1] for line in lines if line.startswith("| 16 x 1000")]
    assert [cell.strip() for cell in best[1:]] == ["`decode`, tile_m 32", "10.0", "15.0", "1.50"]
    assert [line for line in lines if line.startswith("| some")] == [
        "| some    | 1000 x 1000 | 1.00 | 2.00 |"
    ]
    assert not any(line.startswith("| other") for line in lines)
    assert any("NVIDIA_X.png" in line for line in lines)
