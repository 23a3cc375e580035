"""Flax Linen: plans that learn the contraction axes from the model, and an interceptor that makes it run sparse."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
from flax import linen as nn
from flax import serialization
from flax.linen import dtypes

from jaxsparse.compress import Sparse24, decompress
from jaxsparse.contractions import Use, uses
from jaxsparse.forward import apply_masks, check_gradient
from jaxsparse.matmul import check_implementation, sparse_matmul
from jaxsparse.patterns import Pattern, why_not
from jaxsparse.plan import Leaf, Plan, apply_rules, leaf_paths
from jaxsparse.state import Forward, forwards, merged_masks

__all__ = ["intercept", "plan"]

# flax.serialization knows pytrees only where they are registered with it
serialization.register_serialization_state(Plan, lambda plan: {}, lambda plan, state: plan)
serialization.register_serialization_state(
    Forward,
    lambda forward: {name: serialization.to_state_dict(getattr(forward, name)) for name in ("decay", "inner_state")},
    lambda forward, state: dataclasses.replace(
        forward, **{name: serialization.from_state_dict(getattr(forward, name), value) for name, value in state.items()}
    ),
)
serialization.register_serialization_state(
    Sparse24,
    lambda packed: {"values": packed.values, "metadata": packed.with_layout("canonical").metadata},
    lambda packed, state: dataclasses.replace(packed, **state, layout="canonical").with_layout(packed.layout),
)


def plan(model: nn.Module, rules: Mapping[str, Pattern | str | None], *init_args, **init_kwargs) -> Plan:
    """Plans the sparsity of a Flax Linen model; the axis of each kernel is the one that the model sums over.

    The model is traced once, abstractly: no arithmetic, no device memory. What the traced program does with a leaf
    decides: a kernel of Dense, DenseGeneral, attention, Einsum, Conv or any module of your own whose matrix product can
    be followed is grouped along the innermost axis that the product sums over (for Conv the input channels), and by
    `TransposableNM` and `Block` along the innermost output axis too (for Conv the output channels), whether or not
    `nn.scan`, `nn.vmap` or `nn.remat` stacks or wraps it, and however many submodules share it. In a stack every weight is
    masked for itself, unless all take the same input, as under `nn.vmap(..., in_axes=None)`: then they are one weight.

    Args:
      model: an unbound module.
      rules: from a path, or a pattern of paths with `*`, `?` and `[...]` as in file names (`*` also crosses `/`), to a
        pattern or to None for dense. Paths are those of the `params` collection, as in `"encoder/layers_0/kernel"`. The
        first rule that matches a leaf decides. A leaf that no rule matches stays dense.
      *init_args: the arguments of `model.init` after the key, arrays or `jax.ShapeDtypeStruct`.
      **init_kwargs: its keyword arguments, passed on as they are.

    Returns:
      The plan. A leaf that cannot follow its rule stays dense; `print` the plan to see why. Embedding tables, kernels of
      grouped convolutions and everything that is no operand of a product always do.

    Raises:
      TypeError: a rule gives something that is no pattern, or `model` is no module.
      ValueError: a rule matches no leaf, or names an axis that is not the one the model sums over.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> print(js.flax.plan(model, {"*/kernel": "2:4"}, jnp.zeros((1, 6))))
      leaf             layer    shape      axis  pattern      density  why dense
      ---------------  -------  -------  ------  ---------  ---------  -----------------------------------------
      layers_0/bias    Dense    8                dense            1    no rule matches
      layers_0/kernel  Dense    6x8              dense            1    axis -2 has size 6, not a multiple of m=4
      layers_2/bias    Dense    2                dense            1    no rule matches
      layers_2/kernel  Dense    8x2          -2  2:4              0.5
      1 of 4 leaves are sparse, with 16 of 74 weights; 66 weights participate (density 0.892).

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 4.2, for which layers to prune.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"flax.plan: `model` is a {type(model).__name__}, not a flax.linen.Module. Use jaxsparse.plan for other parameters."
        )
    params, owners, found = _trace(model, init_args, init_kwargs)
    roles = dict(zip(leaf_paths(params), zip(owners, found, strict=True), strict=True))

    def decide(path, leaf, rule, pattern):
        return _decide(path, leaf, rule, pattern, *roles[path])

    planned = apply_rules("flax.plan", params, rules, decide)
    return Plan(tuple(dataclasses.replace(leaf, layer=roles[leaf.path][0]) for leaf in planned.leaves))


def _trace(model, args, kwargs):
    """The shapes of the parameters, and for each leaf the kind of its module and how the model uses it."""
    key = jax.random.key(0)
    kinds: dict[tuple[str, ...], str] = {}

    def note(next_fun, args, kwargs, context):
        kinds.setdefault(context.module.path, type(context.module).__name__)
        return next_fun(*args, **kwargs)

    def init(*args):
        return model.init(key, *args, **kwargs)

    def apply(params, rest, *args):
        return model.apply({"params": params, **rest}, *args, rngs={"params": key}, mutable=True, **kwargs)

    variables = dict(jax.eval_shape(init, *args))
    params = nn.meta.unbox(variables.pop("params", {}))
    with nn.intercept_methods(note):
        program = jax.make_jaxpr(apply)(params, variables, *args)
    owners = [tuple(path.split("/")[:-1]) for path in leaf_paths(params)]
    return params, [kinds.get(path, "") for path in owners], uses(program, len(owners))


def _decide(path: str, leaf, rule: str, pattern: Pattern, layer: str, found: set[Use]) -> Leaf:
    def dense(reason):
        return Leaf(path, leaf.shape, None, reason=reason)

    if layer == "Embed":
        return dense("an embedding table")
    if not found:
        return dense("not used by the model when it is called with these arguments")
    bad = sorted(use.reason for use in found if use.reason)
    if bad:
        return dense(bad[0])
    count = len(pattern.multiples)
    products = {tuple(axis - leaf.ndim for axis in _innermost(use, leaf.ndim)[:count]) for use in found}
    if len(products) > 1:
        return dense(f"shared by products that sum over different axes {sorted({axes[0] for axes in products})}")
    (axes,) = products
    if len(axes) < count:
        return dense("the product has no output axis of its own")
    if pattern.axes is not None and tuple(axis - leaf.ndim if axis >= 0 else axis for axis in pattern.axes) != axes:
        named, learned = (", ".join(map(str, one)) for one in (pattern.axes, axes))
        raise ValueError(
            f"flax.plan: rule {rule!r} names axis {named} for {path} of shape {leaf.shape}, but the model sums over axis {learned}. "
            f'Leave the axis out, as in "{pattern}".'
        )
    pattern = pattern.along(axes)
    reason = why_not(pattern, leaf.shape, leaf.dtype)
    if reason:
        return dense(reason)
    contracting = min(_run_length(use.summed, use.summed[-1]) for use in found)
    stack = tuple(sorted({axis - leaf.ndim for use in found for axis in use.stack}))
    return Leaf(path, leaf.shape, pattern, contracting, stack)


def _innermost(use: Use, ndim: int) -> tuple[int, ...]:
    """The innermost axis that a product sums over, and the innermost of those it keeps, if there is one."""
    kept = [axis for axis in range(ndim) if axis not in use.summed and axis not in use.stack]
    return (use.summed[-1], *kept[-1:])


def _run_length(summed: tuple[int, ...], last: int) -> int:
    """How many neighbouring axes are summed over up to `last`."""
    length = 1
    while last - length in summed:
        length += 1
    return length


@contextlib.contextmanager
def intercept(opt_state=None, *, gradient: str | None = None, implementation: str | None = None) -> Iterator[None]:
    """Makes Flax Linen models run with sparse weights while the context lasts, without a change to their code.

    With an optimizer state or masks, the outermost module call of each `model.apply` sees the effective parameters,
    as `sparse_params` computes them. In any case, compressed leaves (`Sparse24`, from `compress`) run: Dense and
    DenseGeneral, the projections of attention among them, through `sparse_matmul`; every other module with its kernel
    decompressed at the call. With metadata in the layout `"mma16"` the bias is added before the result is rounded, as a
    kernel does it; else after, as Flax does. `model.init` is left alone.

    Enter it inside the function that is traced, with the state among its arguments. Flax does not tell `jax.jit` of
    interceptors: around a call of a function that was compiled before, this context would change nothing, without an
    error. Compressed leaves in place of dense ones make `jax.jit` trace anew by themselves.

        @jax.jit
        def loss(params, opt_state, x):
            with jaxsparse.flax.intercept(opt_state):  # inside
                return model.apply(params, x).mean()

    Args:
      opt_state: an optimizer state that holds masks, or a pytree of masks; None for compressed leaves alone.
      gradient: `"dense"` or `"masked"`, as for `sparse_params`.
      implementation: of every product through `sparse_matmul`, as there.

    Raises:
      ValueError: there are no masks in `opt_state`, or there is no such implementation; in a call of a module, the masks were made
        for other parameters, or what `sparse_matmul` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> model, x = nn.Dense(2), jnp.ones((1, 4))
      >>> params = {"params": {"kernel": jnp.array([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]])}}
      >>> model = nn.Dense(2, use_bias=False)
      >>> with js.flax.intercept(js.magnitude_masks(params, js.flax.plan(model, {"kernel": "2:4"}, x))):
      ...     model.apply(params, x)
      Array([[7., 7.]], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, Algorithm 1, lines 4 to 6.
    """
    masks = None if opt_state is None else merged_masks(opt_state, "flax.intercept")
    treated = forwards(opt_state)
    if gradient is not None:
        check_gradient(gradient, "flax.intercept")
    check_implementation(implementation, "flax.intercept")
    inside = False

    def interceptor(next_fun, args, kwargs, context):
        nonlocal inside
        if context.module.is_initializing() or context.method_name == "_call_intercepted":  # the wrapper of _with_params
            return next_fun(*args, **kwargs)
        if context.method_name == "setup":  # runs again where the parameters are changed; compressed ones cannot be read before
            return None if any(map(_is_packed, _own_params(context.module).values())) else next_fun()
        if not hasattr(type(context.module), context.method_name):  # what a lifted transformation wraps around a method
            return next_fun(*args, **kwargs)
        if inside:
            return _run_layer(next_fun, args, kwargs, context, implementation)
        inside = True
        try:
            return _with_params(context, _outermost(masks, treated, gradient, context.module), args, kwargs)
        finally:
            inside = False

    with nn.intercept_methods(interceptor):
        yield


def _with_params(context, change, args, kwargs):
    """Calls the intercepted method again, with the parameters of its module changed."""

    def _call_intercepted(module, *args, **kwargs):
        return getattr(module, context.method_name)(*args, **kwargs)

    def changed(variables):
        return {**variables, "params": change(variables["params"])} if "params" in variables else variables

    return nn.map_variables(_call_intercepted, "params", trans_in_fn=changed)(context.module, *args, **kwargs)


def _outermost(masks, treated, gradient, module):
    prefix = "".join(f"{name}/" for name in module.path)

    def settle(path, leaf):
        # a layer of flax.linen keeps its weight as "kernel" and is met again in _run_layer; others could read theirs in `setup`
        layer = len(path) > 1 or isinstance(module, (nn.Dense, nn.DenseGeneral))
        boxed = _is_boxed(leaf)
        packed = leaf.value if boxed else leaf
        if layer and getattr(path[-1], "key", None) == "kernel":
            return packed
        return leaf.replace_boxed(decompress(packed)) if boxed else decompress(packed)

    def change(params):
        if masks is not None:
            params = apply_masks(params, masks, treated, "flax.intercept", prefix=prefix, gradient=gradient)
        return jax.tree.map_with_path(settle, params, is_leaf=lambda leaf: _is_packed(leaf) or _is_boxed(leaf))

    return change


def _own_params(module):
    return module.variables.get("params", {})


def _is_packed(leaf):
    return isinstance(leaf, Sparse24)


def _is_boxed(leaf):
    return isinstance(leaf, nn.meta.AxisMetadata) and _is_packed(getattr(leaf, "value", None))


def _run_layer(next_fun, args, kwargs, context, implementation):
    """Calls a module inside the outermost one: its own compressed kernel runs compressed if it can, else is decompressed."""
    module = context.module
    own = _own_params(module)
    if not any(map(_is_packed, own.values())):
        return next_fun(*args, **kwargs)
    plain = type(module) in (nn.Dense, nn.DenseGeneral)  # a subclass may do more than they
    inputs = [*args, *kwargs.values()] if kwargs.keys() <= {"inputs"} else []
    if plain and _is_packed(own.get("kernel")) and context.method_name == "__call__" and len(inputs) == 1:
        axes = _contracted_axes(module, inputs[0], own["kernel"])
        if axes is not None:
            return _dense(module, inputs[0], own, axes, implementation)

    def change(params):
        return {name: decompress(leaf) if _is_packed(leaf) else leaf for name, leaf in params.items()}

    return _with_params(context, change, args, kwargs)


def _contracted_axes(module, x, kernel: Sparse24):
    """The axes of x that a Dense or DenseGeneral sums over, where `kernel` is packed for just that; else None."""
    plain = module.dot_general is None and module.dot_general_cls is None and module.promote_dtype is dtypes.promote_dtype
    if not plain or getattr(module, "batch_dims", None):
        return None
    axis = getattr(module, "axis", -1)
    axes = tuple(sorted(a % x.ndim for a in (axis if isinstance(axis, Iterable) else (axis,))))  # as DenseGeneral does
    sizes = tuple(x.shape[a] for a in axes)
    fits = kernel.contracting == sizes and not kernel.output_first and kernel.values.ndim == 2
    return axes if fits else None


def _dense(module, x, params, axes, implementation):
    kernel, bias = params["kernel"], params.get("bias")
    x, values, bias = dtypes.promote_dtype(x, kernel.values, bias, dtype=module.dtype)
    rows = [a for a in range(x.ndim) if a not in axes]
    product = functools.partial(
        sparse_matmul,
        x.transpose(*rows, *axes),
        dataclasses.replace(kernel, values=values),
        implementation=implementation,
        precision=module.precision,
    )
    if bias is None or kernel.layout == "mma16":  # a kernel may run, and adds the bias before it rounds
        return product(bias=bias)
    return product() + bias
