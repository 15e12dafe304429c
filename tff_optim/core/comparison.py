"""What equality looks at in objects that have no equality of their own, such as Keras' ones."""

import functools
import inspect
from collections.abc import Hashable, Mapping
from typing import Any

import attrs
import numpy as np
import tensorflow as tf


def full_config(value: Any) -> dict[str, Any] | None:
    """The configuration of a Keras object, or `None` if it does not tell the whole object.

    It does if it holds every named argument of the constructor. Keras' base classes leave it to a
    subclass to add its own arguments, and nothing reminds the author of it.
    """
    try:
        config = dict(value.get_config())
    except NotImplementedError:
        return None
    constructor = type(value).__init__
    if constructor is object.__init__:  # its signature is a catch-all, though it takes nothing
        return config
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    return config if named <= set(config) else None


def key(value: Any) -> Any:
    """A hashable stand-in for `value`: equal for objects that compute the same.

    Keras objects are compared by class and configuration, or by identity where the configuration
    does not tell everything: taking different ones for equal would run the wrong one. Partial
    functions are compared by what they are made of.
    """
    if tf.is_symbolic_tensor(value):
        return ("tensor", id(value))
    if isinstance(value, tuple | list):
        return (type(value), tuple(key(item) for item in value))
    if isinstance(value, Mapping):
        return (type(value), tuple(sorted((str(k), key(v)) for k, v in value.items())))
    if isinstance(value, np.ndarray | np.generic | tf.Tensor | tf.Variable):
        array = np.asarray(value)
        return (array.dtype.str, array.shape, array.tobytes())
    if isinstance(value, functools.partial):
        return (type(value), key((value.func, value.args, value.keywords)))
    if not attrs.has(type(value)) and hasattr(value, "get_config"):
        config = full_config(value)
        return (type(value), id(value) if config is None else key(config))
    return value if isinstance(value, Hashable) else (type(value), id(value))
