"""Registration of the package's pytrees with `jax.export` and `flax.serialization`."""

import json
from collections.abc import Callable
from typing import Any

import jax
from flax import serialization
from jax import export

__all__ = ["register_exported", "register_saved", "register_static"]


def register_static(cls: type, encode: Callable[[Any], Any], decode: Callable[[Any], Any]) -> None:
    """Registers a class as a pytree without leaves.

    `encode` and `decode` convert its values to and from data that JSON can represent.
    """
    jax.tree_util.register_static(cls)
    register_exported(cls, encode, decode)
    register_saved(cls, lambda value: {}, lambda value, state: value)


def register_exported(
    cls: type, encode: Callable[[Any], Any], decode: Callable[[Any], Any]
) -> None:
    """Registers how `jax.export` serializes the static part of a pytree, as JSON."""
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jaxsparse.{cls.__name__}",
        serialize_auxdata=lambda static: json.dumps(encode(static)).encode(),
        deserialize_auxdata=lambda text: decode(json.loads(text)),
    )


def register_saved(
    cls: type, to_dict: Callable[[Any], dict], from_dict: Callable[[Any, dict], Any]
) -> None:
    """Registers how `flax.serialization` turns a pytree into a dict and back."""
    serialization.register_serialization_state(cls, to_dict, from_dict)
