"""Models in safetensors files, with their compressed weights unchanged."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxsparse._packed.sparse24 import ARRAYS, Sparse24
from jaxsparse._plan.paths import leaf_paths

__all__ = ["Entry", "load_safetensors", "read", "save_safetensors"]

KEY, VERSION = "jaxsparse", 1
DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64"),
)
FIELDS = ("contracting", "output", "axes", "transposable", "layout")


class Entry(NamedTuple):
    """One weight in a file.

    Attributes:
      path: its path.
      value: the array, or the compressed weight.
    """

    path: str
    value: Any


def save_safetensors(params: PyTree, file: Any) -> None:
    """Writes a model to a safetensors file, with its compressed weights unchanged.

    A compressed weight at `path` becomes the tensors `path/values` and `path/metadata`, and
    `path/scale` and `path/input_scale` if it has them; what else it consists of is in the header,
    under `jaxsparse`, as JSON. Masked weights are written as dense arrays. It needs the package
    safetensors.

    Args:
      params: pytree of arrays and `Sparse24`.
      file: the path of the file.

    Raises:
      ImportError: safetensors is not installed.
      TypeError: a leaf is not an array, or the format has no such dtype.
      ValueError: two leaves would have the same name.

    Returns:
      None.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import jaxsparse as js
      >>> params = {"w": jnp.array([[1.0], [-4.0], [3.0], [2.0]]), "b": jnp.zeros(1)}
      >>> plan = js.plan(params, {"w": js.NM(2, 4, axis=0)})
      >>> packed = js.compress(params, js.magnitude_masks(params, plan), plan)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     js.save_safetensors(packed, f"{folder}/model.safetensors")
      ...     js.load_safetensors(f"{folder}/model.safetensors")["w"].values
      Array([[-4.,  3.]], dtype=float32)
    """
    tensors: dict[str, Any] = {}
    compressed: dict[str, dict] = {}
    leaves = jax.tree.leaves(params, is_leaf=_is_packed)
    paths = leaf_paths(jax.tree.map(lambda leaf: 0, params, is_leaf=_is_packed))
    for path, leaf in zip(paths, leaves, strict=True):
        parts = {path: leaf}
        if _is_packed(leaf):
            parts = {f"{path}/{name}": getattr(leaf, name) for name in ARRAYS[leaf.activations]}
            fields = FIELDS if leaf.scale is None else (*FIELDS, "activations")
            compressed[path] = {name: getattr(leaf, name) for name in fields}
        for name, array in parts.items():
            kind = str(getattr(array, "dtype", type(array).__name__))
            if kind not in DTYPES:
                raise TypeError(
                    f"save_safetensors: {name} is {kind}, which the format does not have. Cast it "
                    f"to one of {', '.join(DTYPES)}."
                )
            if name in tensors:
                raise ValueError(f"save_safetensors: two leaves are called {name}. Rename one.")
            tensors[name] = jnp.asarray(array)
    # transformers reads no file without a format it knows
    header = {KEY: json.dumps({"version": VERSION, "compressed": compressed}), "format": "pt"}
    _safetensors("save_safetensors").save_file(tensors, file, metadata=header)


def load_safetensors(file: Any, like: PyTree | None = None) -> Any:
    """Reads a model that `save_safetensors` wrote, or any safetensors file.

    Compressed weights are checked once: their shapes, dtypes and layout, and every place.

    Args:
      file: the path of the file.
      like: pytree of the same structure, with arrays, `jax.ShapeDtypeStruct` or `Sparse24` that
        have the shapes and dtypes to expect. None returns nested dicts along the paths, which lack
        a leading `params/`.

    Returns:
      The pytree.

    Raises:
      ImportError: safetensors is not installed.
      FileNotFoundError: there is no such file.
      ValueError: the file is cut short or not safetensors; a compressed weight is damaged or
        inconsistent; or a leaf of `like` is missing, or has another shape, dtype or form. The
        message names the file and the leaf.

    Example:
      >>> import jaxsparse as js
      >>> js.load_safetensors("missing.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: load_safetensors: there is no file missing.safetensors.
    """
    values = {entry.path: entry.value for entry in read(file, "load_safetensors")}
    if like is None:
        return _nested(values, file)
    leaves, structure = jax.tree.flatten(like, is_leaf=_is_packed)
    paths = leaf_paths(jax.tree.map(lambda leaf: 0, like, is_leaf=_is_packed))
    for path, leaf in zip(paths, leaves, strict=True):
        if path not in values:
            raise ValueError(
                f"load_safetensors: {file} has no {path}; it has {', '.join(list(values)[:8])}."
            )
        expected, actual = _described(leaf), _described(values[path])
        if expected != actual:
            raise ValueError(
                f"load_safetensors: in {file}, {path} is {actual}, not {expected} as in `like`."
            )
    return jax.tree.unflatten(structure, [values[path] for path in paths])


def read(file: Any, call: str) -> list[Entry]:
    """The weights in a file, in the order of their paths."""
    library = _safetensors(call)
    if not pathlib.Path(file).is_file():
        raise FileNotFoundError(f"{call}: there is no file {file}.")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            header = opened.metadata() or {}
        tensors = library.load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{call}: {file} is cut short or not a safetensors file ({error})."
        ) from None
    saved = json.loads(header.get(KEY, f'{{"version": {VERSION}, "compressed": {{}}}}'))
    if saved["version"] != VERSION:
        raise ValueError(
            f"{call}: {file} has version {saved['version']} of the format, and this library reads "
            f"version {VERSION}."
        )
    entries = []
    for path, fields in saved["compressed"].items():
        try:
            names = ARRAYS.get(fields.get("activations"), ARRAYS[None])
            arrays = {name: tensors.pop(f"{path}/{name}") for name in names}
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            entries.append(Entry(path, Sparse24(**arrays, **fields)))
        except KeyError as error:
            raise ValueError(f"{call}: {file} has no tensor {error}.") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{call}: {path} in {file} is damaged. {error}") from None
    entries += [Entry(path, value) for path, value in tensors.items()]
    return sorted(entries, key=lambda entry: entry.path)


def _nested(values: dict[str, Any], file: Any) -> dict:
    tree: dict = {}
    for path, value in values.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"load_safetensors: {file} has a leaf at {folder} and others below it. Pass "
                    "`like`."
                )
        node[name] = value
    return tree


def _described(leaf: Any) -> str:
    """The form, shape and dtype of a leaf."""
    form = f"compressed along {leaf.kinds} " if _is_packed(leaf) else ""
    if _is_packed(leaf) and leaf.scale is not None:
        form += f"as int8 for activations={leaf.activations!r} "
    shape = "x".join(map(str, leaf.shape)) or "a scalar"
    return f"{form}{shape} {leaf.dtype}"


def megabytes(value: Any) -> tuple[float, float]:
    """The megabytes of a weight in its form, and as a dense array."""
    if not _is_packed(value):
        return value.nbytes / 1e6, value.nbytes / 1e6
    return value.nbytes / 1e6, value.size * value.dtype.itemsize / 1e6


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Sparse24)


def _safetensors(call: str) -> Any:
    try:
        import safetensors.flax
    except ImportError:
        raise ImportError(f"{call}: it needs safetensors. pip install safetensors") from None
    return safetensors.flax
