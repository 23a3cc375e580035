"""Summaries of plans of Flax models, for the tests of `flax.plan`."""

import jax

import jaxsparse as js


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def planned(model, *args, rules=None, **kwargs):
    """Maps paths to (axis, number of summed axes, stack) or to the reason, except biases."""
    plan = js.flax.plan(model, rules or {"*": js.anywhere("2:4")}, *args, **kwargs)
    kernels = [leaf for leaf in plan.leaves if leaf.path.split("/")[-1] not in ("bias", "scale")]
    return {
        leaf.path: (leaf.pattern.axis, len(leaf.summed), leaf.stack)
        if leaf.pattern
        else leaf.reason
        for leaf in kernels
    }
