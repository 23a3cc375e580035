"""Lets models and other foreign code promote shapes and dtypes, which the library must not do."""

import contextlib
import functools

import jax
import pytest


@contextlib.contextmanager
def allowed():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def promoting(fn):
    """Wraps `fn` so that it may promote when it is traced or run."""

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        with allowed():
            return fn(*args, **kwargs)

    return wrapper


def marked(cases, names, reason):
    """The cases of a parametrized test; those that begin with one of `names` may promote."""
    marks = pytest.mark.promotes(reason)
    tuples = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=marks if case[0] in names else ()) for case in tuples]
