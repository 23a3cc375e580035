import os

# GPU interpret mode occupies one thread of XLA's pool for each thread of a kernel; the pool of a
# machine with two cores is too small, and hangs
os.environ.setdefault("NPROC", "16")

import jax
import optax
import promotion
import pytest

# for the tests of sharding; the others run on the first
jax.config.update("jax_num_cpu_devices", 8)
# the library never promotes implicitly, so that it works in programs that forbid promotion
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# of Adam, which raises a float to an integer step
optax.tree.bias_correction = promotion.promoting(optax.tree.bias_correction)


@pytest.fixture(autouse=True)
def _promotion(request):
    """Allows promotion in tests with the marker `promotes`, which names the foreign code."""
    if request.node.get_closest_marker("promotes") is None:
        yield
    else:
        with promotion.allowed():
            yield
