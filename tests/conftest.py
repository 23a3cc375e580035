import os

# GPU interpret mode holds one thread of XLA's pool for each thread of a kernel; the pool of two
# cores is too small and hangs
os.environ.setdefault("NPROC", "16")
