"""Counts traces in Python, since JAX may drop entries of its own caches at any time."""

import functools


def counted(fn):
    """`fn` with a counter `traces` of its calls; under `jax.jit` each call is a trace."""

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        wrapper.traces += 1
        return fn(*args, **kwargs)

    wrapper.traces = 0
    return wrapper
