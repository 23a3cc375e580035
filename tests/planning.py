"""What a plan says of the kernels of a Flax model, for the tests of `flax.plan`."""

import jax

import jaxsparse as js


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def planned(model, *args, rules=None, **kwargs):
    """Path to (axis, number of axes summed over, stack) or to the reason, for all leaves but
    biases.
    """
    plan = js.flax.plan(model, rules or {"*": "2:4"}, *args, **kwargs)
    kernels = [leaf for leaf in plan.leaves if leaf.path.split("/")[-1] not in ("bias", "scale")]
    return {
        leaf.path: (leaf.pattern.axis, len(leaf.summed), leaf.stack)
        if leaf.pattern
        else leaf.reason
        for leaf in kernels
    }
