"""Flax NNX: plans that learn axes from the model, and a context for sparse forward passes.

A trained model runs compressed through `jaxsparse.sparsify`: merge the Params that
`jaxsparse.compress` returns into a model, and call it with
`nnx.jit(jaxsparse.sparsify(Model.__call__))`.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import errors, nnx
from jaxtyping import PyTree

from jaxsparse._checks import Gradient
from jaxsparse._plan.eligibility import Anywhere
from jaxsparse._plan.pattern import Pattern
from jaxsparse._plan.plan import Plan
from jaxsparse._plan.planning import learned_plan, traced
from jaxsparse._program.arguments import split_arrays
from jaxsparse._training.forward import apply_masks
from jaxsparse._training.state import read_state

__all__ = ["intercept", "plan"]


def plan(
    model: nnx.Module,
    rules: Mapping[str, Pattern | str | Anywhere | None],
    *args: Any,
    method: str = "__call__",
    **kwargs: Any,
) -> Plan:
    """Plans the sparsity of a Flax NNX model; axes are those that the model sums over.

    This is `jaxsparse.plan` with the call of the model as the function, traced abstractly on a copy
    of its state: random counts, batch statistics and caches do not change. The report names the
    kind of Module that owns each Param.

    Args:
      model: a Module, or an abstract one from `nnx.eval_shape`.
      rules: as for `jaxsparse.plan`. Paths are those of `nnx.state(model, nnx.Param)`, as in
        `"blocks/0/attn/query/kernel"`.
      *args: the arguments of the call: arrays, `jax.ShapeDtypeStruct`, or static values such as
        booleans.
      method: the name of the method to call.
      **kwargs: the keyword arguments of the call, likewise.

    Returns:
      The plan of `nnx.state(model, nnx.Param)`, for `nnx.Optimizer(model, tx, wrt=nnx.Param)`. A
      Param that several Modules share is one leaf, under its first path.

    Raises:
      TypeError: the value of a rule is not a pattern, or `model` is not a Module.
      ValueError: a rule matches no leaf, or names a different axis than the model sums over.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(6, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 4, rngs=rngs))
      >>> print(js.nnx.plan(model, {"*/kernel": "2:4"}, jnp.zeros((1, 6))))
      leaf             layer    shape      axis  pattern      density    bytes saved  note
      ---------------  -------  -------  ------  ---------  ---------  -------------  -----------------------------------------
      layers/0/bias    Linear   16               dense            1                   no rule matches
      layers/0/kernel  Linear   6x16             dense            1                   axis -2 has size 6, not a multiple of m=4
      layers/2/bias    Linear   4                dense            1                   no rule matches
      layers/2/kernel  Linear   16x4         -2  2:4              0.5            120
      1 of 4 leaves are sparse, with 64 of 180 weights; 148 weights participate (density 0.822).
      Compressed, they take 120 bytes less.

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 4.2, for the choice of layers
      (arXiv:2104.08378).
    """  # noqa: E501
    _check_module(model, "nnx.plan")
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)
    arrays, rebuild = split_arrays((args, kwargs))

    def call(params, rest, arrays):
        args, kwargs = rebuild(arrays)
        return split_arrays(getattr(nnx.merge(graphdef, params, *rest), method)(*args, **kwargs))[0]

    leaf_plan = learned_plan(
        "nnx.plan", params, rules, traced("nnx.plan", call, params, rest, arrays)
    )
    kinds: dict[tuple, str] = {
        path: type(node).__name__ for path, node in nnx.iter_graph(model) if _is_layer(node)
    }
    paths = [
        tuple(getattr(key, "key", None) for key in path)
        for path, _ in jax.tree.leaves_with_path(params)
    ]
    owners = [
        next(kinds[path[:i]] for i in reversed(range(len(path))) if path[:i] in kinds)
        for path in paths
    ]
    return Plan(
        tuple(
            dataclasses.replace(leaf, layer=owner)
            for leaf, owner in zip(leaf_plan.leaves, owners, strict=True)
        )
    )


def _is_layer(node: Any) -> bool:
    return isinstance(node, nnx.Module) and not isinstance(node, (nnx.List, nnx.Dict))


def _check_module(model: Any, call: str) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(f"{call}: `model` is a {type(model).__name__}, not a flax.nnx.Module.")


@contextlib.contextmanager
def intercept(
    model: nnx.Module, opt_state: PyTree, *, gradient: Gradient | None = None
) -> Iterator[None]:
    """Puts the effective weights into the Params of a Flax NNX model inside the context.

    They are what `effective_params` computes, with the masks, the decay factor and the gradient
    that the optimizer state holds for the next forward pass. On leaving the context, also through
    an exception, the Params hold the dense weights again. All other Variables, such as batch
    statistics, random counts, caches and intermediate values, are left alone and keep their
    updates.

    Enter it inside the function that is differentiated, with the model among its arguments, so that
    the gradient is that of the dense weights. Update the model after the context: values written to
    a masked Param inside it are lost.

        @nnx.jit
        def step(model, optimizer, x, y):
            def loss(model):
                with jaxsparse.nnx.intercept(model, optimizer):  # inside
                    return ((model(x) - y) ** 2).mean()

            optimizer.update(model, nnx.grad(loss)(model))

    Args:
      model: the Module whose Params the masks were made for.
      opt_state: an `nnx.Optimizer` or an optimizer state that holds masks, or a pytree of masks.
      gradient: `"dense"` or `"masked"`, as for `effective_params`.

    Raises:
      TypeError: `model` is not a Module, or a masked Param is not floating.
      ValueError: there are no masks in `opt_state`, or they were made for other Params.
      flax.errors.TraceContextError: the model comes from outside of the function that is traced.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> model, x = nnx.Linear(4, 2, use_bias=False, rngs=nnx.Rngs(0)), jnp.ones((1, 4))
      >>> model.kernel[...] = jnp.array([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]])
      >>> plan = js.nnx.plan(model, {"kernel": "2:4"}, x)
      >>> masks = js.magnitude_masks(nnx.state(model, nnx.Param), plan)
      >>> with js.nnx.intercept(model, masks):
      ...     model(x)
      Array([[7., 7.]], dtype=float32)
      >>> model(x)
      Array([[10., 10.]], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, Algorithm 1, lines 4 to 6.
    """
    _check_module(model, "nnx.intercept")
    params = nnx.state(model, nnx.Param)  # its leaves are the Variables of the model themselves
    masked = read_state(opt_state, "nnx.intercept")
    effective = apply_masks(params, masked, "nnx.intercept", gradient)
    with contextlib.ExitStack() as restore:

        def exchange(variable, other):
            dense, sparse = variable.get_raw_value(), other.get_raw_value()
            if sparse is not dense:
                variable.set_raw_value(sparse)
                restore.callback(variable.set_raw_value, dense)

        try:
            jax.tree.map(
                exchange, params, effective, is_leaf=lambda node: isinstance(node, nnx.Variable)
            )
        except errors.TraceContextError as error:
            raise errors.TraceContextError(
                "nnx.intercept: `model` comes from outside of the function that is being traced, "
                "so its Params cannot be replaced here. Pass the model as an argument of that "
                "function."
            ) from error
        yield
