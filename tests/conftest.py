import os

# GPU interpret mode holds one thread of XLA's pool for each thread of a kernel; the pool of two
# cores is too small and hangs
os.environ.setdefault("NPROC", "16")

import jax
import jaxtyping
import pytest

# signatures with shapes hold at run time
jaxtyping.install_import_hook("jaxsparse", "beartype.beartype")

# for the tests of sharding; the others run on the first
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def unchecked_types():
    """Lets bad input reach the errors of the library."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
