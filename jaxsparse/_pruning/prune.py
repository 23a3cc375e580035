"""One-shot pruning of a trained model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxsparse import _checks
from jaxsparse._plan.masks import magnitude_masks
from jaxsparse._plan.paths import leaf_paths
from jaxsparse._plan.pattern import Pattern
from jaxsparse._plan.plan import Plan, map_planned, match
from jaxsparse._program.arguments import is_array
from jaxsparse._pruning import methods
from jaxsparse._pruning.calibration import Calibration, Method, Pruned
from jaxsparse._training.forward import effective_params

__all__ = ["PruneMethod", "PruneResult", "prune"]

PruneMethod = Literal["magnitude", "wanda", "sparsegpt"]


class PruneResult(NamedTuple):
    """A pruned model.

    Attributes:
      params: the weights; those that do not participate are 0.
      masks: the masks, as `magnitude_masks` returns them.
    """

    params: Any
    masks: Any


def prune(
    fn: Callable,
    params: PyTree,
    plan: Plan,
    *args: Any,
    method: PruneMethod = "sparsegpt",
    batches: Sequence[tuple] | None = None,
    damping: float = 0.01,
    block: int = 128,
    progress: Callable[[str], Any] = lambda path: None,
) -> PruneResult:
    """Prunes a trained model in one shot, on calibration data.

    `fn` is traced, and its program is evaluated on the calibration data, equation by equation. When
    it first multiplies by a planned weight, the weight is pruned on the inputs that the weights
    before it, pruned already, give it. Loops over layers (`lax.scan`) are followed step by step, so
    that each layer is pruned on the outputs of the pruned layers before it. A weight that a loop
    uses in several steps is pruned on the inputs of all steps. Weights that share an input share
    its second moments, which are summed in float32 over all batches.

    Args:
      fn: a function of the parameters and the calibration data, such as `model.apply`.
      params: pytree of trained weights.
      plan: which leaf follows which pattern.
      *args: the calibration data, as one batch: what `fn` takes after the parameters.
      method: `"magnitude"` keeps the largest weights. `"wanda"` keeps the weights of largest
        magnitude times the root mean square of their input, here and among the weights of each
        group or leaf that the pattern ranks. `"sparsegpt"` also corrects the weights that stay for
        the error of those that go.
      batches: the calibration data, as several batches of equal shapes: a tuple of arguments for
        each. They go through the program side by side, so that memory holds what each of them needs
        at one point of the program, and the moments of one weight.
      damping: for SparseGPT, the fraction of the mean of the diagonal that is added to the second
        moments.
      block: for SparseGPT, how many columns are pruned before the columns after them are corrected;
        under an `Unstructured` pattern, each block keeps the density.
      progress: called with the path of each weight once it is pruned, for a progress bar.

    Returns:
      A `PruneResult`: the weights, of the dtypes of `params`, and the masks, which `compress`,
      `recipes.static(masks=)` and every other recipe take.

    Raises:
      TypeError: `fn` is not callable, `plan` is not a plan, or a calibration argument is not an
        array.
      ValueError: there is no such method, or it does not support a pattern; `params` do not match
        the plan; there is no calibration data, or it is empty, traced, or of batches that differ in
        shape; a planned weight is not used by a product or a convolution, or its inputs cannot be
        seen; its second moments are singular.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxsparse as js
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"up": jax.random.normal(keys[0], (16, 32)),
      ...           "down": jax.random.normal(keys[1], (32, 16))}
      >>> x = jax.random.normal(keys[2], (256, 16))
      >>> plan = js.plan(params, {"*": "2:4"}, model, x)
      >>> pruned, masks = js.prune(model, params, plan, x, method="sparsegpt")
      >>> error = lambda p: float(jnp.square(model(p, x) - model(params, x)).mean())
      >>> error(pruned) < error(js.prune(model, params, plan, x, method="magnitude").params)
      True
      >>> packed = js.compress(pruned, masks, plan)

    References:
      Frantar and Alistarh, SparseGPT (arXiv:2301.00774), Algorithm 1; Sun et al., A Simple and
      Effective Pruning Approach for Large Language Models (Wanda, arXiv:2306.11695), section 3.
    """
    if not callable(fn):
        raise TypeError(
            f"prune: `fn` is a {type(fn).__name__}, not a function. Pass the function that runs "
            "the model."
        )
    _checks.choice("prune", "method", method, PruneMethod)
    match(plan, params, "prune")
    if method == "magnitude":
        masks = magnitude_masks(params, plan)
        return PruneResult(effective_params(params, masks), masks)
    data = _checked_batches(args, batches)
    how = _method(plan, method, damping, block)

    leaves, structure = jax.tree.flatten(params)
    abstract = jax.core.Tracer | jax.ShapeDtypeStruct
    if any(isinstance(leaf, abstract) for leaf in jax.tree.leaves((leaves, data))):
        raise ValueError(
            f'prune: the parameters or the data are abstract, and "{method}" takes concrete ones. '
            "Call it outside of jit, vmap and grad; it compiles what is worth it."
        )
    paths = leaf_paths(params)
    weights = [
        Pruned(plan.sparse[path], jnp.asarray(leaf), jnp.zeros(jnp.shape(leaf), bool))
        for path, leaf in zip(paths, leaves, strict=True)
        if path in plan.sparse
    ]
    place = {pruned.leaf.path: i for i, pruned in enumerate(weights)}
    try:
        program = jax.make_jaxpr(fn)(params, *data[0])
    except Exception as error:
        error.add_note("prune: this is the error of `fn`, called with `params` and a batch.")
        raise
    inputs = [[*map(jnp.asarray, (*leaves, *jax.tree.leaves(batch)))] for batch in data]
    sources = [place.get(path) for path in paths]
    Calibration(weights, how, progress).run(
        program, inputs, [*sources, *[None] * (len(inputs[0]) - len(sources))]
    )
    for pruned in weights:
        _check_done(pruned)
    arrays = [
        leaf if source is None else weights[source].array
        for leaf, source in zip(leaves, sources, strict=True)
    ]
    masks = map_planned(
        lambda leaf, _: weights[place[leaf.path]].mask,
        plan,
        params,
        call="prune",
        dense=lambda _: jnp.asarray(True),
    )
    return PruneResult(jax.tree.unflatten(structure, arrays), masks)


def _check_done(pruned: Pruned) -> None:
    """Checks that the program has shown the inputs of every part of a weight."""
    if len(pruned.done) == pruned.parts:
        return
    used = (
        f"is a stack of {pruned.parts} weights, of which products of `fn` use {len(pruned.done)}"
        if pruned.done
        else "is not used by a matrix product of `fn`"
    )
    raise ValueError(
        f"prune: {pruned.leaf.path} {used}, so there are no inputs to prune it on. Plan it dense, "
        'or pass method="magnitude".'
    )


def _checked_batches(args: tuple, batches: Sequence[tuple] | None) -> list[tuple]:
    """The batches of calibration data, whose leaves are arrays of equal shapes."""
    if bool(args) == (batches is not None):
        raise ValueError(
            "prune: pass calibration data either as arguments of `fn` after `params`, or as "
            "`batches`, a tuple of arguments for each batch; "
            + ("there are both." if args else "there are neither.")
        )
    data = [args] if batches is None else [tuple(batch) for batch in batches]
    if not data:
        raise ValueError("prune: `batches` is empty. Pass at least one tuple of arguments.")
    specs = []
    for i, batch in enumerate(data):
        for path, leaf in jax.tree.leaves_with_path(batch):
            if not is_array(leaf):
                where = jax.tree_util.keystr(path)
                raise TypeError(
                    f"prune: calibration argument {where} is a {type(leaf).__name__}, not an array."
                    " Bind it with functools.partial."
                )
            if 0 in jnp.shape(leaf):
                raise ValueError(
                    f"prune: calibration argument {jax.tree_util.keystr(path)} of batch {i} has "
                    f"shape {jnp.shape(leaf)}, which is empty. Pass data."
                )
        specs.append(jax.tree.map(lambda leaf: (jnp.shape(leaf), leaf.dtype), batch))
        if specs[i] != specs[0]:
            raise ValueError(
                f"prune: batch {i} has the shapes {specs[i]}, and batch 0 has {specs[0]}. Pass "
                "batches of equal shapes."
            )
    return data


def _method(plan: Plan, method: PruneMethod, damping: float, block: int) -> Method:
    """The functions of a method; raises if it does not support a pattern of the plan."""
    for path, leaf in plan.sparse.items():
        pattern = cast(Pattern, leaf.pattern)
        if pattern.scope == "global":
            raise ValueError(
                f'prune: {path} is planned as {pattern}, but "{method}" prunes one weight after '
                'the other. Plan it with scope="leaf", or pass method="magnitude".'
            )
        if method == "sparsegpt" and pattern.axes and not pattern.groups:
            raise ValueError(
                f"prune: {path} is planned as {pattern}, for which SparseGPT is not defined. Pass "
                'method="wanda".'
            )
    if method == "wanda":
        return Method(methods.diagonal_moments, methods.wanda)
    _checks.factor("prune", "damping", damping)
    if _checks.integer(block, "prune: `block`") < 1:
        raise ValueError(f"prune: block={block} must be at least 1.")
    return Method(
        methods.moments, functools.partial(methods.sparsegpt, damping=damping, block=block)
    )
