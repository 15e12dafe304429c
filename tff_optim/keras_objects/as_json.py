"""Keras objects by name, as JSON, and back: optimizers, schedules, regularizers and constraints.

Keras' own `deserialize` imports whatever module a configuration names, cannot read back AdamW, Lion
and Adafactor, and changes its input. This writes the same entries (`module`, `class_name`, `config`)
and builds classes of Keras and of trusted packages only (`classes.py`).
"""

import functools
import math
from collections.abc import Mapping, Sequence

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.core import comparison
from tff_optim.core.entries import Described, Entry
from tff_optim.core.messages import refusal, shown
from tff_optim.core.types import Json, Named, Value
from tff_optim.keras_objects import arguments as keras_arguments
from tff_optim.keras_objects.classes import (
    KINDS,
    OPTIMIZER,
    REGULARIZER,
    SCHEDULE,
    Kind,
    class_of,
    class_of_keras,
    nouns,
)

# Arguments that a schedule is given as, in short forms too.
_RATES = ("learning_rate", "then")
# Every Keras optimizer writes this, and its constructor takes it through `**kwargs`.
_LEGACY_FLAG = "is_legacy_optimizer"


# ------------------------------------------------------------------------------------------ writing


def is_keras_object(value: object) -> bool:
    """Whether `value` is of a kind that this module writes."""
    return isinstance(value, tuple(kind.base for kind in KINDS))


def to_json(value: object, name: str) -> Json:
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
    raise refusal(name, "be something that JSON can hold", shown(value))


def object_to_json(value: object) -> dict[str, Json]:
    """A Keras object's class and configuration.

    Raises:
      ValueError: If its class cannot be found again by name, or its `get_config` leaves out
        arguments of its constructor.
    """
    cls = type(value)
    if keras_arguments.of_keras(cls):
        module = next(kind.module for kind in KINDS if isinstance(value, kind.base))
    elif "<locals>" in cls.__qualname__:
        raise ValueError(
            f"`{cls.__qualname__}` must be defined at the top of a module to be found again; "
            "found it inside a function."
        )
    else:
        module = cls.__module__
    config = comparison.constructor_arguments(value)
    return {
        "module": module,
        "class_name": cls.__qualname__,
        "config": to_json(config, cls.__name__),
    }


# ------------------------------------------------------------------------------------------ reading


def is_described(entry: Entry) -> bool:
    """Whether an entry describes a Keras object in the long form."""
    return isinstance(entry.value, dict) and "class_name" in entry.value


def from_json(entry: Entry, *kinds: Kind, check: bool = False) -> Described:
    """Reads the description of a Keras object.

    Args:
      entry: The long form that `object_to_json` writes, in which `module` may be left out for a
        class of Keras, as may arguments at their defaults; or `[name, arguments]`, or a name.
      *kinds: The kinds that it may be of.
      check: Whether to check all arguments of the built object, if nothing else does.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If the class is unknown, of another kind, legacy or not trusted, or an argument is
        unknown, missing, or out of range.
    """
    empty = attrs.evolve(entry, value={})
    if isinstance(entry.value, str):
        cls, arguments = class_of_keras(entry, kinds), empty
    elif isinstance(entry.value, list) and len(entry.value) == 2:
        cls, arguments = class_of_keras(entry.at(0), kinds), entry.at(1)
    elif is_described(entry):
        parts = entry.fields(
            {"module", "class_name", "config", "registered_name"}, required={"class_name"}
        )
        cls, arguments = class_of(entry, kinds), parts.get("config", empty)
    else:
        entry.refuse(
            f"be {nouns(kinds)}: a name, [name, arguments], or a mapping with `class_name` and "
            "`config`",
            ValueError if isinstance(entry.value, dict) else TypeError,
        )
    make = functools.partial(_build, cls, kinds, check)
    return Described(entry, make, {"arguments": arguments_from_json(cls, arguments)})


def arguments_from_json(cls: type, entry: Entry) -> dict[str, Json | Described]:
    """The arguments for the constructor of a class, each checked as far as it is known."""
    known = keras_arguments.parameters(cls)
    more = not keras_arguments.of_keras(cls) and any(
        p.kind is p.VAR_KEYWORD for p in comparison.parameters(cls)
    )
    required = [name for name, p in known.items() if p.default is p.empty]
    names = {*known, _LEGACY_FLAG} if issubclass(cls, OPTIMIZER.base) else set(known)
    given = entry.value if more and isinstance(entry.value, dict) else ()
    parts = entry.fields({*names, *given}, required)
    if _LEGACY_FLAG in parts and parts[_LEGACY_FLAG].value is not False:
        parts[_LEGACY_FLAG].refuse("be False: legacy optimizers cannot be run as pure functions")
    arguments = {}
    for name, part in parts.items():
        is_rate = name in _RATES and issubclass(cls, (OPTIMIZER.base, SCHEDULE.base))
        read = rate_from_json(part) if is_rate else value_from_json(part)
        given = {} if is_rate and isinstance(read, Described) else part.value
        part.build(keras_arguments.check_argument, cls, name, given)
        arguments[name] = keras_arguments.as_given_in_json(cls, name, read)
    return arguments


def rate_from_json(entry: Entry) -> Json | Described:
    """A number as it is, or the schedule that an entry describes."""
    if isinstance(entry.value, str) or (isinstance(entry.value, list) and len(entry.value) != 2):
        entry.refuse("be a number or a schedule, like ['ExponentialDecay', {...}]", TypeError)
    return from_json(entry, SCHEDULE) if isinstance(entry.value, dict | list) else entry.value


def optimizer_from_json(entry: Entry) -> Described:
    """The Keras optimizer that an entry describes."""
    return from_json(entry, OPTIMIZER)


def regularizer_from_json(entry: Entry) -> Described:
    """The Keras regularizer that an entry describes."""
    return from_json(entry, REGULARIZER)


def value_from_json(entry: Entry) -> Json | Described:
    """A plain value, in which everything that describes a Keras object is read as one.

    So Keras, which would import and run what such a mapping names, is never given one.
    """
    if is_described(entry):
        return from_json(entry, *KINDS, check=True)
    if isinstance(entry.value, dict):
        return {key: value_from_json(entry.at(key)) for key in entry.value}
    if isinstance(entry.value, list):
        return [value_from_json(item) for item in entry.items()]
    return entry.value


def _build(cls: Value, kinds: Sequence[Kind], check: bool, arguments: Named) -> object:
    made = cls.from_config(arguments)
    if not isinstance(made, tuple(kind.base for kind in kinds)):
        raise TypeError(
            f"`from_config` of `{cls.__name__}` must return {nouns(kinds)}; found {shown(made)}."
        )
    if check:
        keras_arguments.check_object(made)
    return made
