import contextlib
import os
import pathlib

# GPU interpret mode occupies one thread of XLA's pool for each thread of a kernel; the pool of a
# machine with two cores is too small, and hangs
os.environ.setdefault("NPROC", "16")
# most of the time of the tests is compilation; `programs.output` runs without these flags
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
# and many compile what another did; `make clean` empties it
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import chex
import jax
import jaxtyping
import optax
import promotion
import pytest

# signatures with shapes are held at run time
CHECKED = ("_masks", "_packed", "_kernels", "_training.forward", "_analysis.trajectories")
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook([f"jaxsparse.{name}" for name in CHECKED], CHECKER)

# for the tests of sharding; the others run on the first
jax.config.update("jax_num_cpu_devices", 8)
# the library never promotes implicitly, so that it works in programs that forbid promotion
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# of Adam, which raises a float to an integer step
optax.tree.bias_correction = promotion.promoting(optax.tree.bias_correction)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("aot"):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _promotion(request):
    """Allows promotion in tests with the marker `promotes`, which names the foreign code."""
    if request.node.get_closest_marker("promotes") is None:
        yield
    else:
        with promotion.allowed():
            yield


@pytest.fixture(autouse=True)
def _traces():
    """Starts the counts of `chex.assert_max_traces` from zero in each test."""
    chex.clear_trace_counter()


@contextlib.contextmanager
def unchecked():
    """Lets bad input reach the errors of the library."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@contextlib.contextmanager
def _raises(*args, raises=pytest.raises, **kwargs):
    with unchecked(), raises(*args, **kwargs) as info:
        yield info


pytest.raises = _raises


@pytest.fixture
def unchecked_types():
    """Lets bad input reach the errors of the library for a whole test."""
    with unchecked():
        yield
