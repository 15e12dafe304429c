"""Keras objects as JSON and back, building classes of trusted packages only.

Keras' own `deserialize` imports whatever module a configuration names, cannot read back AdamW, Lion
and Adafactor, and changes its input. This writes the same entries: `module`, `class_name`, `config`.
"""

import inspect
import math
import sys
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tff_optim import comparison
from tff_optim.registry import package_of

# Base class and public module of each kind of Keras object that an optimizer can hold.
_KINDS = {
    tf.keras.optimizers.Optimizer: ("keras.optimizers", tf.keras.optimizers),
    tf.keras.optimizers.schedules.LearningRateSchedule: (
        "keras.optimizers.schedules",
        tf.keras.optimizers.schedules,
    ),
    tf.keras.regularizers.Regularizer: ("keras.regularizers", tf.keras.regularizers),
    tf.keras.constraints.Constraint: ("keras.constraints", tf.keras.constraints),
}
_ENTRIES = {"module", "class_name", "config", "registered_name"}
# What every Keras optimizer writes and its constructor takes through `**kwargs`.
_LEGACY_FLAG = "is_legacy_optimizer"


def is_keras_config(value: Any) -> bool:
    """Whether `value` describes a Keras object."""
    return isinstance(value, Mapping) and "class_name" in value


def is_keras_object(value: Any) -> bool:
    """Whether `value` is of a kind that this module writes."""
    return isinstance(value, tuple(_KINDS))


def to_json(value: Any, name: str) -> Any:
    """`value` in plain Python types: NumPy and tensor scalars as numbers, Keras objects as dicts.

    Raises:
      ValueError: If `value`, called `name` in the message, has no such form.
    """
    if tf.is_symbolic_tensor(value):
        raise ValueError(
            f"`{name}` must be something that JSON can hold; found a tensor of the computation in "
            f"which the optimizer was built: {value!r}."
        )
    if isinstance(value, np.ndarray | np.generic | tf.Tensor | tf.Variable):
        value = np.asarray(value).tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [to_json(item, name) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item, f"{name}.{key}") for key, item in value.items()}
    if is_keras_object(value):
        return object_to_json(value)
    raise ValueError(f"`{name}` must be something that JSON can hold; found {value!r}.")


def object_to_json(value: Any) -> dict[str, Any]:
    """A Keras object's class and configuration.

    Raises:
      ValueError: If its class cannot be found again by name, or its `get_config` leaves out
        arguments of its constructor.
    """
    cls = type(value)
    if package_of(cls) == "keras":
        module = next(public for base, (public, _) in _KINDS.items() if isinstance(value, base))
    elif "<locals>" in cls.__qualname__:
        raise ValueError(
            f"`{cls.__qualname__}` must be defined at the top of a module to be found again; "
            "found it inside of a function."
        )
    else:
        module = cls.__module__
    config = comparison.full_config(value)
    if config is None:
        raise ValueError(
            f"`get_config` of `{cls.__qualname__}` must return every argument of its constructor to "
            "be written to a configuration; found it missing or incomplete. Override it."
        )
    return {
        "module": module,
        "class_name": cls.__qualname__,
        "config": to_json(config, cls.__name__),
    }


def object_from_json(entry: Mapping[str, Any], trusted_packages: Collection[str]) -> Any:
    """Builds what `object_to_json` has described.

    Args:
      entry: With `module`, `class_name` and `config`; not changed.
      trusted_packages: Top-level packages, besides Keras, whose classes may be built.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If the class is unknown, legacy or not trusted, or an argument is unknown or
        missing.
    """
    if unknown := sorted(set(entry) - _ENTRIES):
        raise ValueError(f"`config` must have the entries {sorted(_ENTRIES)}; found {unknown}.")
    if missing := sorted({"module", "class_name", "config"} - set(entry)):
        raise ValueError(f"`config` of a Keras object must have {missing}; found {sorted(entry)}.")
    cls = _find_class(entry["module"], entry["class_name"], trusted_packages)
    if not isinstance(entry["config"], Mapping):
        raise TypeError(
            f"`config` of `{cls.__name__}` must be a mapping; found {entry['config']!r}."
        )
    arguments = {
        name: (
            object_from_json(value, trusted_packages)
            if is_keras_config(value)
            else to_json(value, f"{cls.__name__}.{name}")  # a copy, down to the last list
        )
        for name, value in entry["config"].items()
    }
    _check_arguments(cls, arguments)
    try:
        built = cls.from_config(dict(arguments))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`config` of `{cls.__name__}` does not fit its constructor: {error}"
        ) from error
    if missing := sorted(set(built.get_config()) - set(arguments)):
        raise ValueError(f"`config` of `{cls.__name__}` must have {missing}; found them missing.")
    return built


def _find_class(module: Any, class_name: Any, trusted_packages: Collection[str]) -> Any:
    for name, value in (("module", module), ("class_name", class_name)):
        if not isinstance(value, str):
            raise TypeError(f"`{name}` must be a string; found {value!r}.")
    root = module.partition(".")[0]
    if root in ("keras", "tensorflow"):
        if "legacy" in module:
            raise ValueError(
                f"`module` must not be that of a legacy optimizer; found {module!r}. "
                f"Use tf.keras.optimizers.{class_name}."
            )
        for base, (_, public) in _KINDS.items():
            cls = getattr(public, class_name, None)
            if isinstance(cls, type) and issubclass(cls, base):
                return cls
        raise ValueError(
            "`class_name` must be a Keras optimizer, schedule, regularizer or constraint; "
            f"found {class_name!r}."
        )
    if root not in trusted_packages:
        raise ValueError(
            f"`module` must be of Keras or of a package in `trusted_packages` "
            f"{sorted(trusted_packages)}; found {module!r}."
        )
    if module not in sys.modules:
        raise ValueError(
            f"`module` must be imported already, nothing is imported for a configuration; "
            f"found {module!r}."
        )
    cls = sys.modules[module]
    for part in class_name.split("."):
        cls = getattr(cls, part, None)
    if not isinstance(cls, type) or not issubclass(cls, tuple(_KINDS)):
        raise ValueError(
            "`class_name` must be an optimizer, schedule, regularizer or constraint of "
            f"{module!r}; found {class_name!r}."
        )
    if package_of(cls) not in {*trusted_packages, "keras"}:
        raise ValueError(
            f"`class_name` must be of Keras or of a package in `trusted_packages` "
            f"{sorted(trusted_packages)}; found one of {cls.__module__!r}."
        )
    return cls


def _check_arguments(cls: Any, arguments: Mapping[str, Any]) -> None:
    parameters = dict(inspect.signature(cls.__init__).parameters)
    parameters.pop("self", None)
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    of_keras = package_of(cls) == "keras"
    known = {
        name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    if arguments.get(_LEGACY_FLAG, False) is not False:
        raise ValueError(
            f"`{_LEGACY_FLAG}` of `{cls.__name__}` must be False; "
            f"found {arguments[_LEGACY_FLAG]!r}."
        )
    unknown = sorted(set(arguments) - known - {_LEGACY_FLAG})
    if unknown and (of_keras or not takes_more):
        raise ValueError(
            f"`config` of `{cls.__name__}` must have {sorted(known)}; found {unknown}."
        )
    required = {n for n in known if parameters[n].default is inspect.Parameter.empty}
    if missing := sorted(required - set(arguments)):
        raise ValueError(f"`config` of `{cls.__name__}` must have {missing}; found them missing.")
    if of_keras:
        for name in known & set(arguments):
            _check_type(cls, name, arguments[name], parameters[name].default)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_type(cls: Any, name: str, value: Any, default: Any) -> None:
    """Keras checks few of its arguments: the type must be that of the default."""
    numeric = _is_number(value)
    several_numbers = isinstance(value, list) and all(_is_number(item) for item in value)
    if name == "learning_rate":
        schedule = tf.keras.optimizers.schedules.LearningRateSchedule
        rule, holds = "a number or a schedule", numeric or isinstance(value, schedule)
    elif name == "name":
        rule, holds = "a string or None", value is None or isinstance(value, str)
    elif isinstance(default, bool):
        rule, holds = "True or False", isinstance(value, bool)
    elif isinstance(default, str):
        rule, holds = "a string", isinstance(value, str)
    elif default is None:
        rule, holds = "a number or None", value is None or numeric
    elif isinstance(default, int | float):
        several = several_numbers and isinstance(default, int)  # the axes of a constraint
        rule, holds = "a number", numeric or several
    else:
        rule, holds = "a number or a list of numbers", numeric or several_numbers
    if not holds:
        raise TypeError(f"`{name}` of `{cls.__name__}` must be {rule}; found {value!r}.")
