"""Functions that accept compressed weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse._execution.report import Report, Usage
from jaxsparse._execution.run import Run
from jaxsparse._execution.weights import Ready, Weight
from jaxsparse._packed.matmul import check_implementation
from jaxsparse._packed.sparse24 import Sparse24
from jaxsparse._plan.paths import leaf_paths
from jaxsparse._program.arguments import is_traceable

__all__ = ["Sparsified", "sparsify"]


def sparsify(fn: Callable, *, implementation: str | None = None) -> "Sparsified":
    """Makes a function accept `Sparse24` leaves in place of dense weights in its arguments.

    `fn` is traced as `jax.jit` traces it, and its program runs with `sparse_matmul` in place of
    every matrix product that sums over exactly the contracted axes of a compressed weight. This
    covers dense layers, attention projections, `einsum` in any order of axes, the gates of
    recurrent cells, experts, convolutions whose windows do not overlap (any without groups, if
    `implementation` names a kernel) and raw `x @ w.T`, in any framework, also inside `jit`, `scan`,
    `vmap`, `remat`, `cond` and `while_loop`. Weights are followed to their products
    through casts, transpositions, reshapes, slices, concatenations along an output axis, and
    scaling by values that are constant along the contracted axes. A weight that is used in any
    other way is decompressed there; `report` says which and why.

    The result works under `jit`, `grad` (with respect to activations and to the values of weights),
    `vmap`, `scan`, `remat`, `shard_map` and `jax.export`. Under `jit` it is traced once for each
    shape, and so is `fn`; called eagerly, it keeps the traced program for each shape. Without
    compressed leaves it calls `fn` itself.

    Args:
      fn: a function of pytrees of arrays, such as `model.apply`. Use `functools.partial` to bind
        other arguments, as in `sparsify(functools.partial(model.apply, mutable=["batch_stats"]))`.
      implementation: what computes every product, as for `sparse_matmul`.

    Returns:
      A callable with the signature of `fn`. Its method `report` takes the same arguments (arrays or
      `jax.ShapeDtypeStruct`) and reports what runs compressed, without running it; `print` the
      result for a table.

    Raises:
      TypeError: `fn` is not callable; or, in a call, an argument is not an array.
      ValueError: `sparse_matmul` has no such `implementation`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxsparse as js
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"].T
      >>> params = {"up": jnp.ones((16, 32)), "down": jnp.ones((2, 32))}
      >>> x = jnp.ones((1, 16))
      >>> plan = js.plan(params, {"*": "2:4"}, model, x)
      >>> packed = js.compress(params, js.magnitude_masks(params, plan), plan)
      >>> sparse_model = js.sparsify(model)
      >>> jax.jit(sparse_model)(packed, x)
      Array([[128., 128.]], dtype=float32)
      >>> print(sparse_model.report(packed, x))
      leaf    product                       runs        implementation
      ------  ----------------------------  ----------  ----------------
      up      dot_general (1, 16) (16, 32)  compressed  dense
      down    dot_general (1, 32) (32, 2)   compressed  dense
      2 of 2 uses run compressed.

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3 (arXiv:2104.08378).
    """
    if not callable(fn):
        raise TypeError(
            f"sparsify: `fn` is a {type(fn).__name__}, not a function. Pass the function that runs "
            "the model."
        )
    check_implementation(implementation, "sparsify")
    return Sparsified(fn, implementation)


class Sparsified:
    """A function that accepts compressed weights, as `sparsify` returns it."""

    def __init__(
        self,
        fn: Callable,
        implementation: str | None,
        observe: Callable[[Ready], Ready] = lambda ready: ready,
    ):
        functools.update_wrapper(self, fn, updated=())
        self._fn = fn
        self._implementation = implementation
        self._observe = observe
        self._trace = jax.make_jaxpr(fn, return_shape=True)

    def __call__(self, *args, **kwargs):
        """Calls the function; weights in its arguments may be compressed."""
        return self._call({}, args, kwargs)

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """Reports how the function uses the compressed weights in its arguments.

        The arguments may be abstract.
        """
        rows: dict[Any, Usage] = {}
        _checked_paths(args, kwargs)
        jax.eval_shape(lambda args, kwargs: self._call(rows, args, kwargs), args, kwargs)
        return Report(tuple(rows.values()))

    def _call(self, rows, args, kwargs):
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_packed)
        if not any(map(_is_packed, leaves)):
            return self._fn(*args, **kwargs)
        paths = _checked_paths(args, kwargs)
        dense_args, dense_kwargs = jax.tree.unflatten(
            treedef, [_dense_spec(leaf) if _is_packed(leaf) else leaf for leaf in leaves]
        )
        try:
            program, out = self._trace(*dense_args, **dense_kwargs)
        except jax.errors.ConcretizationTypeError as error:
            error.add_note(
                "sparsify: the arguments of the function are traced. Use functools.partial to bind "
                "those that it branches on."
            )
            raise
        operands = [
            Weight.of(leaf, i)
            if _is_packed(leaf)
            else leaf
            if isinstance(leaf, jax.Array)
            else jnp.asarray(leaf, var.aval.dtype)
            for i, (leaf, var) in enumerate(zip(leaves, program.jaxpr.invars, strict=True))
        ]
        run = Run(paths, self._implementation, rows, self._observe)
        results = run.evaluate(program.jaxpr, program.consts, operands)
        return jax.tree.unflatten(
            jax.tree.structure(out), [run.dense(result, "returned") for result in results]
        )


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Sparse24)


def _checked_paths(args: Any, kwargs: Any) -> list[str]:
    """The path of every leaf of the arguments; raises if a leaf is not an array."""
    paths = []
    for name, part in [*((f"argument {i}", arg) for i, arg in enumerate(args)), ("", kwargs)]:
        leaves = jax.tree.leaves(part, is_leaf=_is_packed)
        named = [
            path or name
            for path in leaf_paths(jax.tree.map(lambda leaf: 0, part, is_leaf=_is_packed))
        ]
        for path, leaf in zip(named, leaves, strict=True):
            if not _is_packed(leaf) and not is_traceable(leaf):
                raise TypeError(
                    f"sparsify: {path} is a {type(leaf).__name__}, not an array. Bind it with "
                    "functools.partial, as in sparsify(functools.partial(model.apply, "
                    "method=...))."
                )
        paths += named
    return paths


def _dense_spec(leaf: Sparse24) -> jax.ShapeDtypeStruct:
    """The abstract dense weight, with the mesh axes and sharding of its compressed values."""
    aval = jax.typeof(leaf.values)
    varying = aval.manual_axis_type if aval.manual_axis_type.varying else None
    return jax.ShapeDtypeStruct(
        leaf.shape,
        leaf.dtype,
        manual_axis_type=varying,
        sharding=aval.sharding if varying else None,
    )
