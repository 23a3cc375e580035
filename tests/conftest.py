import os

# GPU interpret mode holds one thread of XLA's pool for each thread of a kernel; the pool of two
# cores is too small and hangs
os.environ.setdefault("NPROC", "16")

import jax

# for the tests of sharding; the others run on the first
jax.config.update("jax_num_cpu_devices", 8)
