"""Lets models, and other code that is not the library's, promote shapes and dtypes as they like,
while the library around them must not.
"""

import contextlib
import functools

import jax
import pytest


@contextlib.contextmanager
def allowed():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def promoting(fn):
    """`fn`, traced or run where promotion is allowed."""

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
