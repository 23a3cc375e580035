"""Compressed weights of 8 bits, with activations calibrated on data."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxsparse import _checks
from jaxsparse._execution.sparsify import Sparsified
from jaxsparse._execution.weights import Ready
from jaxsparse._packed.int8 import input_scales, to_int8
from jaxsparse._packed.sparse24 import Activations, Sparse24
from jaxsparse._plan.paths import leaf_paths

__all__ = ["quantize"]


def quantize(
    packed: PyTree,
    *,
    activations: Activations = "float",
    fn: Callable | None = None,
    batches: Iterable[tuple] | None = None,
    percentile: float | None = None,
) -> Any:
    """Rounds compressed weights to int8, and optionally the activations they are multiplied by.

    Each output of a weight has its own scale, the largest magnitude of its weights divided by 127,
    in the dtype of the weight (float32 for floats of 8 bits); the weight is rounded to the nearest
    multiple, and keeps its dtype and its places. It takes 20 bits a group of four instead of 32
    (38 % less than dense int8), and one scale for each output. Everything that takes compressed
    weights takes the result: `sparsify`, `sparse_matmul`, `decompress`, `save_safetensors` and
    checkpoints.

    Activations that are rounded are multiplied in integers and summed in int32, which is exact.
    Static scales are calibrated by running `fn` from the int8 weights, with activations in float.

    Args:
      packed: pytree of weights, as `compress` returns it; dense leaves stay unchanged.
      activations: what is rounded beside the weights. `"float"` rounds weights alone. `"token"`
        rounds each row of the activations by its own largest magnitude, when the model runs.
        `"tensor"` rounds the activations of each weight (in a stack, of each weight in it) by one
        scale, fixed here; larger magnitudes are clipped when the model runs.
      fn: for `"tensor"`, the function to calibrate, of `packed` and the arguments in a batch, such
        as `model.apply`.
      batches: for `"tensor"`, the calibration data: a tuple of arguments for each batch.
      percentile: for `"tensor"`, the percentile of the magnitudes, in (0, 100], that is still
        represented; the largest over batches counts. None means 100, the maximum.

    Returns:
      The pytree with int8 weights.

    Raises:
      TypeError: a compressed weight does not hold floats, or `fn` is not callable.
      ValueError: `packed` holds no compressed weight; a weight is quantized already or not finite;
        `activations` is unknown; calibration data is missing, empty, or passed for a choice that
        does not use it; in calibration, a weight is not used by a product, or its inputs are not
        finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxsparse as js
      >>> def model(params, x):
      ...     return x @ params["w"]
      >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> x = jax.random.normal(jax.random.key(1), (8, 64))
      >>> plan = js.plan(params, {"w": "2:4"}, model, x)
      >>> packed = js.compress(params, js.magnitude_masks(params, plan), plan)
      >>> small = js.quantize(packed, activations="tensor", fn=model, batches=[(x,)])
      >>> small["w"].values.dtype, small["w"].scale.shape, small["w"].input_scale.shape
      (dtype('int8'), (32,), ())
      >>> y, exact = js.sparsify(model)(small, x), js.sparsify(model)(packed, x)
      >>> bool(jnp.linalg.norm(y - exact) < 0.02 * jnp.linalg.norm(exact))
      True

    References:
      Wu et al., Integer Quantization for Deep Learning Inference (arXiv:2004.09602).
    """
    _checks.choice("quantize", "activations", activations, Activations)
    _check_calibration(activations, fn, batches, percentile)
    leaves, structure = jax.tree.flatten(packed, is_leaf=_is_packed)
    paths = leaf_paths(jax.tree.map(lambda leaf: 0, packed, is_leaf=_is_packed))
    weights = {
        path: leaf for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, Sparse24)
    }
    if not weights:
        raise ValueError(
            "quantize: there is no compressed weight among the leaves. Pass what "
            "jaxsparse.compress returns."
        )
    for path, w in weights.items():
        _check_weight(path, w)
    small = {path: to_int8(w) for path, w in weights.items()}

    def with_weights(new):
        return jax.tree.unflatten(
            structure, [new.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        )

    if fn is not None and batches is not None:
        small = _calibrated(small, with_weights, fn, batches, percentile)
    else:
        small = {path: dataclasses.replace(w, activations=activations) for path, w in small.items()}
    return with_weights(small)


def _check_calibration(activations: str, fn: Any, batches: Any, percentile: Any) -> None:
    if activations != "tensor":
        if not fn is batches is percentile is None:
            raise ValueError(
                'quantize: `fn`, `batches` and `percentile` are for activations="tensor", the only '
                "choice that is calibrated. Pass that, or leave them out."
            )
        return
    if fn is None or batches is None:
        raise ValueError(
            'quantize: activations="tensor" is calibrated on data. Pass `fn` and `batches`, or '
            'activations="token".'
        )
    if not callable(fn):
        raise TypeError(
            f"quantize: `fn` is a {type(fn).__name__}, not a function. Pass the function that runs "
            "the model."
        )
    if percentile is not None and not 0 < percentile <= 100:
        raise ValueError(f"quantize: percentile={percentile} is not in (0, 100].")


def _check_weight(path: str, w: Sparse24) -> None:
    if w.scale is not None:
        raise ValueError(
            f"quantize: {path} is quantized already. Pass the weights that compress returns."
        )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"quantize: {path} holds {w.dtype}. Pass weights of a floating dtype.")
    if not isinstance(w.values, jax.core.Tracer) and not jnp.isfinite(w.values).all():
        raise ValueError(f"quantize: {path} has weights that are not finite. Check the parameters.")


def _calibrated(
    weights: dict[str, Sparse24],
    with_weights: Callable,
    fn: Callable,
    batches: Iterable[tuple],
    percentile: float | None,
) -> dict[str, Sparse24]:
    """The weights with the scales of their inputs.

    While the program runs, the input scale of each weight of each stack is its number, which
    follows the weight through loops to the product that observes its inputs.
    """
    numbered, count = {}, 1  # 0 would be no scale
    for path, w in weights.items():
        stack = w.values.shape[:-2]
        size = int(np.prod(stack, dtype=int))
        numbers = jnp.arange(count, count + size, dtype=jnp.float32).reshape(stack)
        numbered[path] = dataclasses.replace(w, input_scale=numbers, activations="tensor")
        count += size
    most = np.full(count, -1.0, np.float32)

    def record(numbers, magnitudes):
        np.maximum.at(most, np.asarray(numbers).astype(int), magnitudes)

    def observe(ready: Ready) -> Ready:
        leaf = ready.leaf
        numbers = leaf.input_scale
        x = jnp.abs(ready.x.astype(jnp.float32)).reshape(*numbers.shape, -1)
        top = x.max(-1) if percentile is None else jnp.percentile(x, percentile, -1)
        jax.debug.callback(record, numbers, top)
        return ready._replace(leaf=dataclasses.replace(leaf, input_scale=None, activations="float"))

    run = jax.jit(Sparsified(fn, None, observe))
    params = with_weights(numbered)
    empty = True
    for batch in batches:
        if not isinstance(batch, (tuple, list)):
            raise TypeError(
                f"quantize: a batch is a {type(batch).__name__}. Pass a tuple of arguments for "
                "each batch."
            )
        if any(0 in jnp.shape(leaf) for leaf in jax.tree.leaves(batch)):
            raise ValueError("quantize: an argument in a batch is empty. Pass data.")
        run(params, *batch)
        empty = False
    if empty:
        raise ValueError("quantize: `batches` is empty. Pass at least one tuple of arguments.")
    jax.effects_barrier()
    calibrated = {}
    for path, w in numbered.items():
        these = most[np.asarray(w.input_scale, int)]
        if (these < 0).any():
            raise ValueError(
                f"quantize: `fn` does not multiply by all of {path}, so its inputs cannot be seen. "
                'Decompress it first, or pass activations="token".'
            )
        if not np.isfinite(these).all():
            raise ValueError(
                f"quantize: the inputs of {path} are not finite. Check the parameters and the "
                "calibration data."
            )
        calibrated[path] = dataclasses.replace(w, input_scale=input_scales(jnp.asarray(these)))
    return calibrated


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Sparse24)
