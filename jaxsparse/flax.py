"""Flax Linen: plans that learn axes from the model, and a context for sparse forward passes."""

import contextlib
import dataclasses
import functools
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import core
from flax import linen as nn
from jaxtyping import PyTree

from jaxsparse import _checks
from jaxsparse._execution.sparsify import sparsify
from jaxsparse._packed.matmul import check_implementation
from jaxsparse._packed.sparse24 import Sparse24, decompress
from jaxsparse._plan.eligibility import Anywhere
from jaxsparse._plan.paths import leaf_paths
from jaxsparse._plan.pattern import Pattern
from jaxsparse._plan.plan import Plan
from jaxsparse._plan.planning import learned_plan, traced
from jaxsparse._program.arguments import split_arrays
from jaxsparse._program.uses import Use
from jaxsparse._training.forward import apply_masks
from jaxsparse._training.state import Masked, read_state, rewire_states

__all__ = ["intercept", "plan"]


def plan(
    model: nn.Module,
    rules: Mapping[str, Pattern | str | Anywhere | None],
    *init_args: Any,
    **init_kwargs: Any,
) -> Plan:
    """Plans the sparsity of a Flax Linen model; axes are those that the model sums over.

    This is `jaxsparse.plan` with the function `model.apply` and the parameters of `model.init`,
    both traced abstractly: no arithmetic, no device memory. It follows the kernels of Dense,
    DenseGeneral, attention, Einsum, Conv, recurrent cells and custom modules, also where `nn.scan`,
    `nn.vmap` or `nn.remat` stacks or wraps them, and where several submodules share them. The
    report names the kind of module that owns each leaf.

    Args:
      model: an unbound module.
      rules: as for `jaxsparse.plan`. Paths are those of the `params` collection, as in
        `"encoder/layers_0/kernel"`.
      *init_args: the arguments of `model.init` after the key: arrays, `jax.ShapeDtypeStruct`, or
        static values such as booleans.
      **init_kwargs: its keyword arguments, likewise. `rngs`, a key or a dict of keys, and `method`
        are passed to `model.init` and `model.apply`.

    Returns:
      The plan. A leaf that cannot follow its rule stays dense; `print` the plan for the reasons.

    Raises:
      TypeError: the value of a rule is not a pattern, or `model` is not a module.
      ValueError: a rule matches no leaf, or names a different axis than the model sums over.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(4)])
      >>> print(js.flax.plan(model, {"*/kernel": "2:4"}, jnp.zeros((1, 6))))
      leaf             layer    shape      axis  pattern      density    bytes saved  note
      ---------------  -------  -------  ------  ---------  ---------  -------------  -----------------------------------------
      layers_0/bias    Dense    16               dense            1                   no rule matches
      layers_0/kernel  Dense    6x16             dense            1                   axis -2 has size 6, not a multiple of m=4
      layers_2/bias    Dense    4                dense            1                   no rule matches
      layers_2/kernel  Dense    16x4         -2  2:4              0.5            120
      1 of 4 leaves are sparse, with 64 of 180 weights; 148 weights participate (density 0.822).
      Compressed, they take 120 bytes less.

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, section 4.2, for the choice of layers
      (arXiv:2104.08378).
    """  # noqa: E501
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"flax.plan: `model` is a {type(model).__name__}, not a flax.linen.Module. Use "
            "jaxsparse.plan for functions and other frameworks."
        )
    params, layers, used = _trace(model, init_args, init_kwargs)
    leaf_plan = learned_plan("flax.plan", params, rules, used)
    return Plan(
        tuple(
            dataclasses.replace(leaf, layer=layer)
            for leaf, layer in zip(leaf_plan.leaves, layers, strict=True)
        )
    )


def _trace(model: Any, args: Any, kwargs: Any) -> tuple[Any, list[str], list[set[Use]]]:
    """Traces a model: its parameter shapes, and the kind of module and the uses of each leaf."""
    key = jax.random.key(0)
    rngs = kwargs.pop("rngs", None)
    rngs = {
        "params": key,
        **(rngs if isinstance(rngs, Mapping) else {} if rngs is None else {"params": rngs}),
    }
    kinds: dict[tuple[str, ...], str] = {}

    def note(next_fun, args, kwargs, context):
        kinds.setdefault(context.module.path, type(context.module).__name__)
        return next_fun(*args, **kwargs)

    arrays, rebuild = split_arrays((args, kwargs))

    def init(arrays):
        args, kwargs = rebuild(arrays)
        return model.init(rngs, *args, **kwargs)

    def apply(params, rest, arrays):
        args, kwargs = rebuild(arrays)
        kwargs = {"mutable": True, **kwargs}
        out = model.apply({"params": params, **rest}, *args, **kwargs, rngs=rngs)
        return split_arrays(
            _with_params(out, lambda params: None) if kwargs["mutable"] is not False else out
        )[0]

    variables = dict(jax.eval_shape(init, arrays))
    params = nn.meta.unbox(variables.pop("params", {}))
    with nn.intercept_methods(note):
        used = traced("flax.plan", apply, params, variables, arrays)
    layers = [kinds.get(tuple(path.split("/")[:-1]), "") for path in leaf_paths(params)]
    return params, layers, used


# --- the context

_FLAG = "jaxsparse"  # set on the scopes of models that run under the context
# part of the key of jit's caches, so that functions are traced again for other masks
_token = jax.make_user_context(None)


class _Token:
    """Identifies a set of masks in the key of jit's caches.

    The caches keep it alive, so it holds weak references to the arrays. It also records whether a
    module ran under it.
    """

    def __init__(self, leaves):
        self.leaves = tuple(map(weakref.ref, leaves))
        self.ran = False


_tokens: "weakref.WeakValueDictionary[tuple, _Token]" = weakref.WeakValueDictionary()


def _token_of(opt_state: PyTree, gradient: Any, implementation: Any) -> _Token:
    """The token of these masks.

    It is the same one as long as the arrays are the same, so that functions are not traced again.
    """
    sources = [(state.masks, state.forward) for state in rewire_states(opt_state)]
    leaves = jax.tree.leaves(sources or opt_state)
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return _Token([leaf for leaf in leaves if isinstance(leaf, jax.Array)])
    key = (*map(id, leaves), gradient, implementation)
    token = _tokens.get(key)
    if token is None or any(
        ref() is not leaf for ref, leaf in zip(token.leaves, leaves, strict=True)
    ):
        token = _tokens[key] = _Token(leaves)
    return token


@dataclasses.dataclass(eq=False)
class _Sparse:
    """How models run inside one context."""

    token: _Token
    masked: Masked | None
    gradient: _checks.Gradient | None
    implementation: str | None
    inside: bool = False  # while a model runs sparse: models that it applies are left alone

    def effective(self, variables):
        """The variables with effective parameters."""
        self.token.ran = True
        if self.masked is None or "params" not in variables:
            return variables
        params = apply_masks(variables["params"], self.masked, "flax.intercept", self.gradient)
        return {**variables, "params": params}

    def apply(self, run, variables, mutable, args, kwargs):
        """Runs `core.apply` from effective or compressed parameters.

        If it returns parameters, these are replaced by the original ones.
        """
        effective = self.effective(variables)
        returns = mutable is not False and "params" in variables
        packed = any(
            isinstance(leaf, Sparse24) for leaf in jax.tree.leaves(variables, is_leaf=_is_packed)
        )
        self.inside = True
        try:
            out = (self.compressed if packed else _plainly)(run, effective, returns, args, kwargs)
        finally:
            self.inside = False
        if not returns:
            return out
        if packed:
            return _with_params(out, lambda params: variables["params"])
        dense_leaves = dict(
            zip(
                map(id, jax.tree.leaves(effective["params"])),
                jax.tree.leaves(variables["params"]),
                strict=True,
            )
        )
        return _with_params(
            out, lambda params: jax.tree.map(lambda leaf: dense_leaves.get(id(leaf), leaf), params)
        )

    def compressed(self, run, variables, returns, args, kwargs):
        """Runs `core.apply` from compressed parameters; the output leaves the parameters out."""
        arrays, rebuild = split_arrays((args, kwargs), _is_packed)
        restore_output: list = []

        def called(variables, arrays):
            args, kwargs = rebuild(arrays)
            out = run(variables, *args, **kwargs)
            out = _with_params(out, lambda params: None) if returns else out
            arrays_out, restore = split_arrays(out)
            restore_output[:] = [restore]
            return arrays_out

        arrays_out = sparsify(called, implementation=self.implementation)(variables, arrays)
        return restore_output[0](arrays_out)


class _Active(threading.local):
    """The contexts that a thread is in, innermost last."""

    def __init__(self):
        self.contexts: list[_Sparse] = []


_active = _Active()
_lock = threading.Lock()
_entered = 0
_core_apply, _core_bind = core.apply, core.bind


def _is_packed(leaf):
    return isinstance(leaf, Sparse24)


def _plainly(run, variables, returns, args, kwargs):
    return run(variables, *args, **kwargs)


def _with_params(out, change):
    """Changes the parameters among the variables that a mutating `apply` returned."""
    y, variables = out
    return (
        (y, {**variables, "params": change(variables["params"])}) if "params" in variables else out
    )


def _current() -> _Sparse | None:
    contexts = _active.contexts
    return contexts[-1] if contexts and not contexts[-1].inside else None


def _apply(fn, mutable=False, flags=None):
    """Replaces `flax.core.apply`, through which every `apply` goes."""

    @functools.wraps(fn)
    def wrapper(variables, *args, **kwargs):
        sparse = _current()
        if sparse is None:
            return _core_apply(fn, mutable=mutable, flags=flags)(variables, *args, **kwargs)
        run = _core_apply(fn, mutable=mutable, flags={**(flags or {}), _FLAG: sparse.token})
        return sparse.apply(run, variables, mutable, args, kwargs)

    return wrapper


def _bind(variables, rngs=None, mutable=False, flags=None):
    """Replaces `flax.core.bind`, through which `Module.bind` goes."""
    sparse = _current()
    if sparse is None:
        return _core_bind(variables, rngs=rngs, mutable=mutable, flags=flags)
    return _core_bind(
        decompress(sparse.effective(variables)),
        rngs=rngs,
        mutable=mutable,
        flags={**(flags or {}), _FLAG: sparse.token},
    )


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """Replaces the functions of Flax while any context is active.

    Flax can intercept methods, but not `apply`, and methods are too late where the outermost class
    is lifted.
    """
    global _entered
    with _lock:
        _entered += 1
        core.apply, core.bind = _apply, _bind
    try:
        yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                core.apply, core.bind = _core_apply, _core_bind


@contextlib.contextmanager
def intercept(
    opt_state: PyTree = None,
    *,
    gradient: _checks.Gradient | None = None,
    implementation: str | None = None,
) -> Iterator[None]:
    """Runs Flax Linen models with sparse weights inside the context, without changing their code.

    With an optimizer state or masks, every `model.apply` and `model.bind` inside sees the effective
    parameters, as `effective_params` computes them, whatever lifts or wraps the model.
    `model.apply` runs compressed leaves (`Sparse24`, from `compress`) as under `sparsify`;
    `model.bind` decompresses them. The context does not affect `model.init`, nor models that a
    model applies itself. Of nested contexts, the innermost applies: under `intercept(None)` dense
    models run dense.

    Masks may change at every step, so enter the context inside the compiled function, with the
    state among its arguments:

        @jax.jit
        def loss(params, opt_state, x):
            with jaxsparse.flax.intercept(opt_state):
                return model.apply(params, x).mean()

    It also works around a compiled function, because it is part of the key of jit's caches: the
    function is traced again for each set of masks, which become constants of the program.

    A context applies to its own thread only. Every model in it whose parameters fit the masks runs
    masked, including target networks. If only one of two such models is to be sparse, run the other
    outside of the context, or use `effective_params` instead.

    Args:
      opt_state: an optimizer state that holds masks, or a pytree of masks; None if there are only
        compressed leaves.
      gradient: `"dense"` or `"masked"`, as for `effective_params`.
      implementation: what computes every product with a compressed weight, as for `sparse_matmul`.

    Raises:
      ValueError: there are no masks in `opt_state`, or the implementation does not exist; when a
        model runs, the masks were made for other parameters, or the model was bound outside of the
        context; on exit, no Flax module ran inside.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> model, x = nn.Dense(2, use_bias=False), jnp.ones((1, 4))
      >>> kernel = jnp.array([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]])
      >>> params = {"params": {"kernel": kernel}}
      >>> masks = js.magnitude_masks(params, js.flax.plan(model, {"kernel": "2:4"}, x))
      >>> with js.flax.intercept(masks):
      ...     model.apply(params, x)
      Array([[7., 7.]], dtype=float32)

    References:
      Advances in Sparse Neural Model Training, Algorithm 1, lines 4 to 6.
    """
    masked = None if opt_state is None else read_state(opt_state, "flax.intercept")
    if gradient is not None:
        _checks.choice("flax.intercept", "gradient", gradient, _checks.Gradient)
    check_implementation(implementation, "flax.intercept")
    token = _token_of(opt_state, gradient, implementation)
    sparse = _Sparse(token, masked, gradient, implementation)

    def check(next_fun, args, kwargs, context):
        module, here = context.module, _active.contexts[-1] is sparse and not sparse.inside
        token.ran |= here
        # excludes the methods of a class that only wraps a lifted one
        bound = module.scope is not None and hasattr(type(module), context.method_name)
        if (
            here
            and bound
            and not module.is_initializing()
            and module.scope.get_flag(_FLAG, None) is not token
        ):
            raise ValueError(
                f"flax.intercept: a {type(module).__name__} was bound, or wrapped by nn.apply, "
                "before the context was entered, so it would run dense. Call model.apply, "
                "model.bind or nn.apply inside the context."
            )
        return next_fun(*args, **kwargs)

    with _installed(), _token(token), nn.intercept_methods(check):
        _active.contexts.append(sparse)
        try:
            yield
        finally:
            _active.contexts.remove(sparse)
    if not token.ran:
        raise ValueError(
            "flax.intercept: no Flax Linen module ran inside the context. For other models use "
            "jaxsparse.effective_params, jaxsparse.nnx or jaxsparse.sparsify."
        )
