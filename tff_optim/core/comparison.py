"""Equality of objects that do not define it, such as those of Keras."""

import functools
import inspect
from collections.abc import Hashable, Mapping

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.core.types import Named, Value


def parameters(cls: Value) -> list[inspect.Parameter]:
    """The parameters of the constructor of a class."""
    if cls.__init__ is object.__init__:  # its signature is a catch-all, though it takes nothing
        return []
    return list(inspect.signature(cls.__init__).parameters.values())[1:]


def full_config(value: Value) -> Named | None:
    """The configuration of a Keras object, or `None` if it is incomplete.

    It is complete if it has every named argument of the constructor. Keras leaves it to a subclass to
    add its own arguments, and authors may forget to.
    """
    try:
        config = dict(value.get_config())
    except NotImplementedError:
        return None
    found = parameters(type(value))
    if any(p.kind is p.VAR_POSITIONAL for p in found):
        return None
    named = {p.name for p in found if p.kind is not p.VAR_KEYWORD}
    return config if named <= set(config) else None


def constructor_arguments(value: Value) -> Named:
    """The complete configuration of a Keras object.

    Raises:
      ValueError: If its `get_config` leaves out arguments of its constructor.
    """
    config = full_config(value)
    if config is None:
        raise ValueError(
            f"`get_config` of `{type(value).__qualname__}` must return every argument of its "
            "constructor; found it missing or incomplete. Override it."
        )
    return config


def key(value: object) -> Hashable:
    """A hashable stand-in for `value`: equal for objects that compute the same.

    Keras objects are compared by class and configuration, or by identity if the configuration is
    incomplete, so that different objects are never taken for equal. Partial functions are compared by
    their function and arguments.
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
