"""Matrix products with compressed 2:4 weights."""

import functools
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Real

from jaxsparse import _checks
from jaxsparse._kernels import ACTIVATIONS, KERNELS, preferred
from jaxsparse._packed.int8 import scaled_product
from jaxsparse._packed.layouts import convert
from jaxsparse._packed.partition import devices_needed, divided
from jaxsparse._packed.sparse24 import Sparse24, check_static, expand, kept_values
from jaxsparse._packed.sparse24 import transposed as to_transposed

__all__ = ["chosen", "common_dtype", "sparse_matmul", "sparse_matmul_p"]


def sparse_matmul(
    x: Real[ArrayLike, "..."],
    w: Sparse24,
    *,
    bias: Real[ArrayLike, "..."] | None = None,
    activation: str | None = None,
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Real[Array, "..."]:
    """`activation(x @ w + bias)` with a compressed weight.

    It sums over the last axes of `x` and the contracted axes of `w`. It is differentiable with
    respect to `x`, `w.values` and `bias`, in forward and reverse mode; the gradient of the values
    is the dense gradient at the kept places. Sums are taken in float32 for 16-bit floats; bias and
    activation are applied before rounding (under differentiation, after it).

    Weights of int8, as `quantize` makes them, are multiplied before they are scaled: with x as it
    comes, or with x rounded to int8 as `w.activations` says, and sums in int32. The gradient of x
    ignores the rounding of x (straight through); there is none for int8 values, and one for
    `w.scale`. No kernel takes int8 yet.

    The gradient of `x` is a product with the transpose of `w`. If `w` is transposable, kernels
    compute it like the product itself, from values that are packed again along the output at each
    use, so that nothing is stored twice. Otherwise it is a dense product.

    On a CUDA device a kernel for Sparse Tensor Cores may run, whose name is in the lowered program
    (`sparse_matmul_hopper`); everywhere else the weight is decompressed for the dense product.
    `implementation=None` chooses a kernel only where it is measured to be faster, with metadata in
    the layout `"mma16"` and no stack. Too few products are measured yet for that choice, so each
    kernel runs only if it is named. `"hopper"` and `"decode"` are right on an H200; `"ampere"` has
    only run in emulation. A named kernel processes the weights of a stack one after the other, and
    XLA copies each of them with its rows.

    Under automatic partitioning, each device of the mesh multiplies its share of rows and output
    features, and receives compressed weights where it lacks them. The contraction is divided, too,
    but not for a kernel that is named. `implementation="dense"` leaves the division to the
    compiler, which sends decompressed weights; only it can be lowered for an `AbstractMesh` or in a
    program with meshes of several shapes.

    Args:
      x: `[..., K]`, or `[..., *w.contracting]` if several axes are contracted; with a stacked
        weight (`w` of shape `[*stack, ...]`) it begins with the axes of the stack.
      w: the compressed weight.
      bias: `[*stack, *w.output]`, or None.
      activation: `"relu"`, `"gelu"` (by tanh), `"silu"` or None.
      implementation: None chooses for the device; `"dense"` runs everywhere. `"hopper"` (compute
        capability 9.0), `"ampere"` (8.0 to 8.9) and `"decode"` (8.0 and later, at most 64 rows)
        need 16-bit floats. Sizes that do not fill their tiles are padded inside. This copies
        nothing for `"hopper"` and `"decode"` if K is a multiple of 16 and, for `"hopper"`, M a
        multiple of 8; nor for `"ampere"` if rows and K are multiples of 64 and M is a multiple of
        128. None never chooses a kernel that would copy the weight or the result. If `w` is
        transposable, the gradient of `x` has the same implementation.
      precision: as in `jax.numpy.matmul`, for the dense product.
      preferred_element_type: the dtype of the result, as in `jax.numpy.matmul`; None means the
        promoted dtype of `x` and `w`, the only one that kernels return.

    Returns:
      `[..., *w.output]`.

    Raises:
      TypeError: `w` is not a `Sparse24`.
      ValueError: the axes of `x` or `bias` do not fit those of `w`, the implementation or
        activation does not exist, or the implementation cannot compute this product on any device.
      NotImplementedError: the implementation cannot run on the device.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> values, metadata = jnp.array([[-4.0, 3.0]]), jnp.array([[0x4449]], jnp.uint16)
      >>> w = js.Sparse24(values, metadata, contracting=(4,), output=(1,))
      >>> js.sparse_matmul(jnp.array([[1.0, 10.0, 100.0, 1000.0]]), w)
      Array([[260.]], dtype=float32)

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 3 (arXiv:2104.08378).
    """
    if not isinstance(w, Sparse24):
        raise TypeError(
            f"sparse_matmul: `w` is a {type(w).__name__}, not a Sparse24. Make one with "
            "jaxsparse.compress."
        )
    check_static(w, "sparse_matmul")
    check_implementation(implementation, "sparse_matmul")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"sparse_matmul: there is no activation {activation!r}. Pass one of "
            f"{tuple(ACTIVATIONS)}."
        )
    x = _checks.array(x, "sparse_matmul: `x`")
    stack, ends = w.values.shape[:-2], x.ndim - len(w.contracting)
    if x.shape[max(ends, 0) :] != w.contracting:
        raise ValueError(
            f"sparse_matmul: `x` of shape {x.shape} does not end with the contracted axes "
            f"{w.contracting} of `w`, of shape {w.shape}. Move the axes to sum over to the end of "
            "`x`."
        )
    if x.shape[: len(stack)] != stack or ends < len(stack):
        raise ValueError(
            f"sparse_matmul: `x` of shape {x.shape} does not begin with the stack {stack} of `w`, "
            f"of shape {w.shape}. Move the axes of the stack to the front of `x`, or use one "
            "weight of the stack."
        )
    if bias is not None and jnp.shape(bias) != (*stack, *w.output):
        raise ValueError(
            f"sparse_matmul: `bias` of shape {jnp.shape(bias)} does not fit `w`, which needs "
            f"{(*stack, *w.output)}. Reshape the bias."
        )
    dtype = common_dtype(x.dtype, w.dtype)
    kept = dtype if w.scale is None else w.values.dtype
    rows, m, k = x.shape[len(stack) : ends], w.values.shape[-2], math.prod(w.contracting)
    default = w.dtype if x.dtype == w.dtype else dtype
    out_dtype = default if preferred_element_type is None else jnp.dtype(preferred_element_type)
    if implementation in KERNELS:
        wider = (
            f"it returns {dtype}, but the result must be {out_dtype}"
            if out_dtype != dtype
            else None
        )
        _refuse(
            implementation,
            KERNELS[implementation].misfit(math.prod(rows), kept) or wider,
            ValueError,
        )
    multiply = functools.partial(
        _multiply,
        activation=None,
        implementation=implementation if w.scale is None else "dense",
        layout=w.layout,
        transposable=w.transposable,
        transposed=False,
        precision=_precision(precision),
        devices=None if implementation == "dense" else devices_needed(),
    )
    x = x.reshape(*stack, math.prod(rows), k).astype(dtype)
    biases = [] if bias is None else [jnp.reshape(bias, (*stack, m)).astype(_sum_dtype(dtype))]
    if w.scale is None:
        operands = x, w.values.astype(dtype), w.metadata, *biases
        y = multiply(*operands, activation=activation, out_dtype=out_dtype)
    else:
        y = scaled_product(multiply, x, w, _sum_dtype(dtype))
        y = _finished(y, biases, _differentiable(activation), out_dtype)
    return y.reshape(*stack, *rows, *w.output)


def _multiply(*operands, **params):
    return sparse_matmul_p.bind(*_varying_alike(operands), **params)


def _precision(precision):
    """The requested precision, from the context if it is None.

    It must be read here: inside a compiled function, the context is no longer known at lowering.
    """
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if not isinstance(precision, str):
        return precision
    return (
        lax.DotAlgorithmPreset[precision]
        if precision in lax.DotAlgorithmPreset.__members__
        else lax.Precision(precision)
    )


def common_dtype(a, b):
    """The dtype in which two operands are multiplied.

    8-bit floats, which jax does not promote implicitly, are widened.
    """
    narrow = [
        dtype
        for dtype in (a, b)
        if jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 1
    ]
    if not narrow:
        return jnp.promote_types(a, b)
    return _wider(jnp.float32, *(dtype for dtype in (a, b) if dtype not in narrow))


def _wider(*dtypes):
    """Promotes dtypes, even where JAX is configured to forbid it."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def check_implementation(implementation, call):
    if implementation not in (None, "dense", *KERNELS):
        raise ValueError(
            f"{call}: there is no implementation {implementation!r}. Pass None or one of "
            f"{('dense', *KERNELS)}."
        )


def chosen(implementation: str | None, rows: int, w: Sparse24, dtype: Any, out_dtype: Any) -> str:
    """The implementation of a product on the default device: `"dense"` or the name of a kernel."""
    if implementation is not None:
        return implementation
    device = jax.devices()[0]
    if w.scale is not None or device.platform != "gpu" or "S" in w.kinds or out_dtype != dtype:
        return "dense"
    m, k = w.values.shape[-2], 2 * w.values.shape[-1]
    return preferred(rows, m, k, dtype, w.layout, _capability(device))


def _varying_alike(operands):
    """Makes the operands vary over the same axes of a mesh inside `shard_map`.

    The gradient of an operand that did not vary is then summed.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in operands]
    over = frozenset().union(*varying)
    return [
        lax.pcast(a, tuple(over - its), to="varying")
        for a, its in zip(operands, varying, strict=True)
    ]


def _refuse(implementation, reason, error):
    if reason:
        raise error(
            f'sparse_matmul: "{implementation}" cannot compute this: {reason}. Pass '
            "implementation=None to choose automatically."
        )


# x [*stack, N, K], values [*stack, M, K/2], metadata in `layout`, optional bias [*stack, M] ->
# [*stack, N, M]. If `transposed`, multiplies by the transpose of the same weight, without bias:
# x [*stack, N, M] -> [*stack, N, K]
sparse_matmul_p = Primitive("sparse_matmul")


@sparse_matmul_p.def_abstract_eval
def _abstract(x, values, *_, transposed, out_dtype, **__):
    shape = (*x.shape[:-1], _features(values, transposed))
    return (
        x.update(shape=shape, dtype=out_dtype)
        if x.manual_axis_type.varying
        else jax.core.ShapedArray(shape, out_dtype)
    )


def _features(values, transposed):
    return 2 * values.shape[-1] if transposed else values.shape[-2]


@functools.cache
def _jitted(**params):
    return jax.jit(functools.partial(sparse_matmul_p.bind, **params))


@sparse_matmul_p.def_impl
def _impl(*operands, **params):
    with jax.disable_jit(False):  # only jit lowers the primitive
        return _jitted(**params)(*operands)


def _dense(x, values, metadata, *bias, activation, layout, precision, transposed, out_dtype, **_):
    w = expand(values, convert(metadata, layout, "canonical", values))
    if jnp.issubdtype(w.dtype, jnp.integer):
        w = w.astype(x.dtype)
    y = _contract(x, w, -1, -2 if transposed else -1, precision, out_dtype)
    return _finished(y, bias, ACTIVATIONS[activation], out_dtype)


def _finished(y, bias, activate, out_dtype):
    if bias:
        y += bias[0][..., None, :]
    return activate(y).astype(out_dtype)


def _differentiable(activation):
    """The activation; the gradient of `jax.nn.relu` at 0 is 0."""
    return jax.nn.relu if activation == "relu" else ACTIVATIONS[activation]


def _share(params, summed_over, *operands):
    """The product of one device, added up over axes of the mesh."""
    if not summed_over:
        return sparse_matmul_p.bind(*operands, **params)
    x, values, metadata, *bias = operands
    sums = {**params, "activation": None, "out_dtype": _sum_dtype(params["out_dtype"])}
    y = lax.psum(sparse_matmul_p.bind(x, values, metadata, **sums), summed_over)
    return _finished(y, bias, ACTIVATIONS[params["activation"]], params["out_dtype"])


def _sum_dtype(dtype):
    return _wider(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _contract(a, b, a_axis, b_axis, precision, wanted=None):
    """Sums over one of the last two axes of each operand; leading axes are batches.

    The result has the dtype of the sums, at least as wide as `wanted`.
    """
    stack = tuple(range(a.ndim - 2))
    sums = (((a.ndim + a_axis,), (b.ndim + b_axis,)), (stack, stack))
    dtype = _sum_dtype(a.dtype)
    if wanted is not None and jnp.dtype(wanted).itemsize > 1:
        dtype = _wider(dtype, wanted)
    return lax.dot_general(a, b, sums, precision=precision, preferred_element_type=dtype)


_lower_dense = mlir.lower_fun(_dense, multiple_results=False)


def _lowering(lower, unavailable):
    """Lowers a product by `lower` on one device; several devices each compute a share of it.

    `unavailable(kernel, module)` says why a kernel cannot run on the device, or None.
    """

    def lowering(ctx, *operands, devices, **params):
        name, module = params["implementation"], ctx.module_context
        if name in KERNELS:
            _refuse(name, unavailable(KERNELS[name], module), NotImplementedError)
        several = getattr(module.axis_context, "num_devices", 1) > 1
        if devices is None or not several or module.lowering_parameters.for_export:
            return lower(ctx, *operands, **params)
        params["devices"] = None
        product = functools.partial(
            divided,
            functools.partial(sparse_matmul_p.bind, **{**params, "implementation": "dense"}),
            functools.partial(_share, params),
            transposed=params["transposed"],
            layout=params["layout"],
            sums=name not in KERNELS,
        )
        return mlir.lower_fun(product, multiple_results=False)(ctx, *operands)

    return lowering


def _lower_cuda(
    ctx, *operands, implementation, layout, activation, transposable, transposed, **params
):
    x, values = ctx.avals_in[:2]
    n, m, k = x.shape[-2], _features(values, transposed), x.shape[-1]
    device, reason = _device(ctx.module_context)
    capability = _capability(device)
    name = implementation
    if name is None:
        ready = reason is None and x.ndim == 2 and params["out_dtype"] == x.dtype
        name = preferred(n, m, k, x.dtype, layout, capability) if ready else "dense"
    if name == "dense" or (transposed and not transposable):
        return _lower_dense(
            ctx, *operands, layout=layout, activation=activation, transposed=transposed, **params
        )
    kernel = KERNELS[name]
    _refuse(name, reason, NotImplementedError)
    _refuse(name, kernel.misfit(n, x.dtype), ValueError)
    mosaic = importlib.import_module("jaxsparse._kernels.mosaic")

    run = functools.partial(kernel.module.matmul, activation=activation, cores=device.core_count)
    run = functools.partial(_with_kernel, run, kernel.layout, layout, transposed)
    with mosaic.architecture(capability):
        return mlir.lower_fun(run, multiple_results=False)(ctx, *operands)


def _with_kernel(run, wanted, layout, transposed, x, values, metadata, *bias):
    """Computes the product by a kernel, which takes a single weight; loops over stacks."""
    stack = x.shape[:-2]
    if stack:
        operands = [a.reshape(-1, *a.shape[len(stack) :]) for a in (x, values, metadata, *bias)]
        y = lax.map(lambda one: _with_kernel(run, wanted, layout, transposed, *one), operands)
        return y.reshape(*stack, *y.shape[1:])
    if transposed:
        values, metadata = to_transposed(values, convert(metadata, layout, "canonical", values))
        layout = "canonical"
    return run(x, values, convert(metadata, layout, wanted, values), *bias)


def _device(module):
    """A device of the kind that a module is lowered for, and why no kernel may run there.

    Either is None: the device if its kind is not known yet, the reason if there is none.
    """
    if module.lowering_parameters.for_export or len(module.platforms) > 1 or module.backend is None:
        return None, None
    kinds = {_capability(device): device for device in module.backend.devices()}
    context = module.axis_context
    if hasattr(context, "manual_axes"):  # inside shard_map
        whole = set(context.manual_axes) == set(context.mesh.axis_names)
    else:
        whole = getattr(context, "num_devices", 1) == 1
    reason = (
        None
        if whole
        else "the compiler cannot partition it over several devices; call it inside shard_map"
    )
    return next(iter(kinds.values())) if len(kinds) == 1 else None, reason


def _capability(device):
    """The compute capability of a CUDA device as a pair, or None."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


mlir.register_lowering(
    sparse_matmul_p, _lowering(_lower_dense, lambda kernel, module: "it needs a CUDA device")
)
mlir.register_lowering(
    sparse_matmul_p,
    _lowering(
        _lower_cuda, lambda kernel, module: kernel.unavailable(_capability(_device(module)[0]))
    ),
    platform="cuda",
)


def _jvp(primals, tangents, **params):
    x, values, metadata, *bias = primals
    x_dot, values_dot, _, *bias_dot = tangents
    activation = params["activation"]
    params["activation"] = None
    y = sparse_matmul_p.bind(x, values, metadata, **params)
    parts = []
    if type(x_dot) is not ad.Zero:
        parts.append(sparse_matmul_p.bind(x_dot, values, metadata, **params))
    if type(values_dot) is not ad.Zero:
        parts.append(sparse_matmul_p.bind(x, values_dot, metadata, **params))
    y_dot = sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)
    if not bias and activation is None:
        return y, y_dot

    def finish(y, *bias):
        wide = y.astype(_sum_dtype(y.dtype))
        return _finished(wide, bias, _differentiable(activation), y.dtype)

    bias_dot = map(ad.instantiate_zeros, bias_dot)
    return jax.jvp(finish, (y, *bias), (y_dot, *bias_dot))


def _transpose(ct, x, values, metadata, *, transposed, **params):
    if type(ct) is ad.Zero:
        return None, None, None
    ct = ct.astype(common_dtype(ct.dtype, ct.dtype))
    if ad.is_undefined_primal(x):
        params["out_dtype"] = x.aval.dtype
        return (
            sparse_matmul_p.bind(ct, values, metadata, transposed=not transposed, **params),
            None,
            None,
        )
    outputs, inputs = (x, ct) if transposed else (ct, x)
    product = _contract(outputs, inputs, -2, -2, params["precision"]).astype(values.aval.dtype)
    return (
        None,
        kept_values(product, convert(metadata, params["layout"], "canonical", values.aval)),
        None,
    )


def _batch(operands, dims, **params):
    x, *rest = operands
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    if all(d is None for d in dims[1:]):  # one weight: more rows
        x = jnp.moveaxis(x, dims[0], -3)
        y = sparse_matmul_p.bind(x.reshape(*x.shape[:-3], -1, x.shape[-1]), *rest, **params)
        return y.reshape(*y.shape[:-2], size, -1, y.shape[-1]), y.ndim - 2
    operands = (
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(operands, dims, strict=True)
    )
    return sparse_matmul_p.bind(*operands, **params), 0


ad.primitive_jvps[sparse_matmul_p] = _jvp
ad.primitive_transposes[sparse_matmul_p] = _transpose
batching.primitive_batchers[sparse_matmul_p] = _batch
