"""Finds the Keras optimizer that an instance, a name, a config or a callable stands for."""

import copy
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

_Keras = tf.keras.optimizers.Optimizer


def _builtin_classes() -> dict[str, Any]:
    return {
        name.lower(): value
        for name, value in vars(tf.keras.optimizers).items()
        if isinstance(value, type) and issubclass(value, _Keras) and value is not _Keras
    }


def _from_name(name: Any) -> Any:
    classes = _builtin_classes()
    if not isinstance(name, str) or name.lower() not in classes:
        known = ", ".join(sorted(cls.__name__ for cls in classes.values()))
        raise ValueError(f"`optimizer` must name one of {known}; found {name!r}.")
    return classes[name.lower()]


def _from_keras_config(config: Mapping[str, Any]) -> Any:
    """Builds a built-in optimizer from what `tf.keras.optimizers.serialize` returns."""
    if "class_name" not in config:
        raise ValueError(
            "`optimizer` as a dictionary must be one that `tf.keras.optimizers.serialize` returns, "
            f"with `class_name` and `config`; found the keys {sorted(config)}."
        )
    arguments = copy.deepcopy(dict(config.get("config") or {}))
    if arguments.get("is_legacy_optimizer") or "legacy" in str(config.get("module")):
        raise ValueError(_legacy_message(config["class_name"]))
    cls = _from_name(config["class_name"].rpartition(">")[2])
    try:
        return cls.from_config(arguments)
    except TypeError as error:
        raise ValueError(
            f"`optimizer` has an entry in its `config` that {cls.__name__} does not take: {error}"
        ) from error


def _legacy_message(name: str) -> str:
    return (
        f"`optimizer` is the legacy Keras optimizer {name}, whose step cannot be run as a pure "
        f"function; use `tf.keras.optimizers.{name}` instead."
    )


def resolve(optimizer: Any) -> Any:
    """Returns the Keras optimizer that `optimizer` stands for; see `build_keras_optimizer`."""
    if isinstance(optimizer, str):
        return _from_name(optimizer)()
    if isinstance(optimizer, Mapping):
        return _from_keras_config(optimizer)
    if isinstance(optimizer, _Keras):
        return optimizer
    if isinstance(optimizer, tf.keras.optimizers.legacy.Optimizer):
        raise ValueError(_legacy_message(type(optimizer).__name__))
    if isinstance(optimizer, tff.learning.optimizers.Optimizer):
        raise TypeError(
            f"`optimizer` is a TFF optimizer already ({type(optimizer).__name__}); use it as it is."
        )
    if callable(optimizer):
        made = optimizer()
        if callable(made) or isinstance(made, (str, Mapping)):
            raise TypeError(
                "`optimizer` as a callable must return a Keras optimizer; found "
                f"{type(made).__name__}."
            )
        return resolve(made)
    raise TypeError(
        "`optimizer` must be a Keras optimizer, its name, its config, or a callable without "
        f"arguments that returns one; found {type(optimizer).__name__}."
    )
