"""Counts traces and compilations, since JAX may drop entries of its own caches at any time."""

import contextlib
import functools
import types

import jax


def counted(fn):
    """`fn` with a counter `traces` of its calls; under `jax.jit` each call is a trace."""

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        wrapper.traces += 1
        return fn(*args, **kwargs)

    wrapper.traces = 0
    return wrapper


@contextlib.contextmanager
def compilations():
    """Counts, in `number`, the programs that are compiled or read from the persistent cache."""
    compiled = types.SimpleNamespace(number=0)

    def listen(event, duration, **_):
        compiled.number += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
