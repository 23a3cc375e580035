"""Matrix products with compressed 2:4 weights."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxsparse.compress import Sparse24, expand, gather
from jaxsparse.patterns import array

__all__ = ["sparse_matmul", "sparse_matmul_p"]


def sparse_matmul(x, w: Sparse24, *, implementation: str | None = None, precision: lax.PrecisionLike = None) -> jax.Array:
    """`x @ w` with a compressed weight: sums over the last axes of `x` and the contracted axes of `w`.

    Differentiable with respect to `x` and to `w.values`, forwards and backwards; the gradient of the values is that
    at the kept places. Sums are taken in float32 for 16-bit floats.

    Args:
      x: `[..., K]`, or `[..., *w.contracting]` where several axes are contracted; with a stacked weight (`w` of shape
        `[*stack, ...]`) it begins with the axes of the stack.
      w: the compressed weight.
      implementation: None chooses the best for the device; `"dense"` decompresses and calls the dense product,
        which runs everywhere.
      precision: as in `jax.numpy.matmul`.

    Returns:
      `[..., *w.output]`, in the promoted dtype of `x` and `w`.

    Raises:
      TypeError: `w` is no `Sparse24`.
      ValueError: the axes of `x` do not fit those of `w`, or there is no such implementation.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> w = js.Sparse24(jnp.array([[-4.0, 3.0]]), jnp.array([[9]], jnp.uint16), contracting=(4,), output=(1,))
      >>> js.sparse_matmul(jnp.array([[1.0, 10.0, 100.0, 1000.0]]), w)
      Array([[260.]], dtype=float32)

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3.
    """
    if not isinstance(w, Sparse24):
        raise TypeError(f"sparse_matmul: `w` is a {type(w).__name__}, not a Sparse24. Make one with jaxsparse.compress.")
    if implementation not in (None, "dense"):
        raise ValueError(f'sparse_matmul: there is no implementation {implementation!r}. Pass None or "dense".')
    x = array(x, "sparse_matmul: `x`")
    stack, ends = w.values.shape[:-2], x.ndim - len(w.contracting)
    if x.shape[max(ends, 0) :] != w.contracting:
        raise ValueError(
            f"sparse_matmul: `x` of shape {x.shape} does not end with the contracted axes {w.contracting} of `w`, of shape {w.shape}. "
            "Move the axes to sum over to the end of `x`."
        )
    if x.shape[: len(stack)] != stack or ends < len(stack):
        raise ValueError(
            f"sparse_matmul: `x` of shape {x.shape} does not begin with the stack {stack} of `w`, of shape {w.shape}. "
            "Move the axes of the stack to the front of `x`, or use one weight of the stack."
        )
    dtype = jnp.promote_types(x.dtype, w.dtype)
    rows = x.shape[len(stack) : ends]
    y = sparse_matmul_p.bind(
        x.reshape(*stack, math.prod(rows), math.prod(w.contracting)).astype(dtype),
        w.values.astype(dtype),
        w.with_layout("canonical").metadata,
        precision=lax.Precision(precision) if isinstance(precision, str) else precision,
    )
    return y.reshape(*stack, *rows, *w.output)


# x [*stack, N, K], values [*stack, M, K/2], metadata uint16 [*stack, M, ceil(K/16)] -> [*stack, N, M]
sparse_matmul_p = Primitive("sparse_matmul")


@sparse_matmul_p.def_abstract_eval
def _abstract(x, values, metadata, **_):
    return jax.core.ShapedArray((*x.shape[:-1], values.shape[-2]), x.dtype)


@functools.cache
def _jitted(**params):
    return jax.jit(functools.partial(sparse_matmul_p.bind, **params))


@sparse_matmul_p.def_impl
def _impl(*operands, **params):
    return _jitted(**params)(*operands)


def _dense(x, values, metadata, *, precision):
    return _contract(x, expand(values, metadata), -1, -1, precision)


def _contract(a, b, a_axis, b_axis, precision):
    """Sums over one of the last two axes each; leading axes are batches. Accumulates in float32 where the dtype is narrower."""
    stack = tuple(range(a.ndim - 2))
    sums = (((a.ndim + a_axis,), (b.ndim + b_axis,)), (stack, stack))
    wide = jnp.promote_types(a.dtype, jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype
    return lax.dot_general(a, b, sums, precision=precision, preferred_element_type=wide).astype(a.dtype)


mlir.register_lowering(sparse_matmul_p, mlir.lower_fun(_dense, multiple_results=False))


def _jvp(primals, tangents, **params):
    x, values, metadata = primals
    x_dot, values_dot, _ = tangents
    y = sparse_matmul_p.bind(x, values, metadata, **params)
    parts = []
    if type(x_dot) is not ad.Zero:
        parts.append(sparse_matmul_p.bind(x_dot, values, metadata, **params))
    if type(values_dot) is not ad.Zero:
        parts.append(sparse_matmul_p.bind(x, values_dot, metadata, **params))
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


def _transpose(ct, x, values, metadata, *, precision):
    if type(ct) is ad.Zero:
        return None, None, None
    if ad.is_undefined_primal(x):
        return _contract(ct, expand(values, metadata), -1, -2, precision), None, None
    return None, gather(_contract(ct, x, -2, -2, precision), metadata), None


def _batch(operands, dims, **params):
    x, values, metadata = operands
    x_dim, values_dim, metadata_dim = dims
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    if values_dim is metadata_dim is None:  # one weight: more rows
        x = jnp.moveaxis(x, x_dim, -3)
        y = sparse_matmul_p.bind(x.reshape(*x.shape[:-3], -1, x.shape[-1]), values, metadata, **params)
        return y.reshape(*y.shape[:-2], size, -1, y.shape[-1]), y.ndim - 2
    x, values, metadata = (
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(operands, dims, strict=True)
    )
    return sparse_matmul_p.bind(x, values, metadata, **params), 0


ad.primitive_jvps[sparse_matmul_p] = _jvp
ad.primitive_transposes[sparse_matmul_p] = _transpose
batching.primitive_batchers[sparse_matmul_p] = _batch
