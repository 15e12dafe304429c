"""Numeric hyper-parameters: one way to declare, check, schedule, read and set them.

A hyper-parameter is a number or a Keras schedule. A number lives in the state, under the name of
its field, and can be set between rounds. A schedule is evaluated in the graph at the number of
steps taken before this one (0, then 1, ...), which then lives in the state under `step`.
"""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import tensorflow as tf

from tff_optim import comparison, leaves

Schedule = tf.keras.optimizers.schedules.LearningRateSchedule
Hparams = collections.OrderedDict[str, Any]
STEP = "step"

_MARK = "tff_optim_hyperparameter"


def _to_float(value: Any) -> Any:
    """Integers and NumPy scalars as Python floats; anything else as it is, for the validator."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        return float(value)
    return value


def check_number(owner: str, name: str, value: Any, rule: str, holds: Callable) -> None:
    """Raises unless `value` is a finite float for which `holds`; `rule` says it in words."""
    message = f"`{name}` of `{owner}` must be {rule}; found {value!r}."
    if not isinstance(value, float):
        raise TypeError(f"{message} Give a Python or NumPy number.")
    if not math.isfinite(value) or not holds(value):
        raise ValueError(message)


def single(value: float) -> float:
    """`value` as the state keeps it and TensorFlow computes with it: subnormal numbers are 0."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    return rounded if abs(rounded) >= np.finfo(np.float32).tiny else 0.0


def _check_kept_number(owner: str, name: str, value: Any, rule: str, holds: Callable) -> None:
    check_number(owner, name, value, rule, holds)
    kept = single(value)
    if not math.isfinite(kept) or not holds(kept):
        raise ValueError(
            f"`{name}` of `{owner}` must be {rule}; found {value!r}, which is {kept!r} when rounded "
            "to float32, in which the state keeps it."
        )


def _check_traced(owner: str, name: str, value: tf.Tensor) -> None:
    """Raises unless a tensor is one real number."""
    if value.shape.rank != 0 or not (value.dtype.is_floating or value.dtype.is_integer):
        raise ValueError(
            f"`{name}` of `{owner}` must be one real number if it is a tensor; found "
            f"{value.dtype.name}{value.shape}."
        )


def field(
    rule: str,
    holds: Callable[[float], bool],
    default: Any = attrs.NOTHING,
    *,
    traceable: bool = False,
) -> Any:
    """Declares a numeric hyper-parameter of a frozen attrs class.

    Args:
      rule: The allowed values in words, for the message: "a number in [0, 1)".
      holds: Whether a finite float is allowed.
      default: The default value.
      traceable: Whether a scalar tensor of the computation that is being traced is taken too. Its
        value is not known and not checked.

    Returns:
      An attrs field that takes a number (an int or NumPy scalar becomes a float) or a Keras
      schedule, compares schedules by their configuration, and raises `TypeError` or `ValueError`
      for anything else. The number must be allowed as given and when rounded to float32.
    """

    def validate(owner: Any, attribute: attrs.Attribute, value: Any) -> None:
        name = type(owner).__name__
        if traceable and tf.is_symbolic_tensor(value):
            _check_traced(name, attribute.name, value)
        elif not isinstance(value, Schedule):
            _check_kept_number(name, attribute.name, value, f"{rule} or a Keras schedule", holds)

    return attrs.field(
        default=default,
        converter=_to_float,
        validator=validate,
        eq=comparison.key,
        metadata={_MARK: True},
    )


def constant(rule: str, holds: Callable[[float], bool], default: Any = attrs.NOTHING) -> Any:
    """Declares a number that stays as it was given: no schedule, not in the state."""

    def validate(owner: Any, attribute: attrs.Attribute, value: Any) -> None:
        check_number(type(owner).__name__, attribute.name, value, rule, holds)

    return attrs.field(default=default, converter=_to_float, validator=validate)


def fraction(default: Any = attrs.NOTHING) -> Any:
    """Declares a decay rate in [0, 1)."""
    return field("a number in [0, 1)", lambda x: 0.0 <= x < 1.0, default)


def positive(default: Any = attrs.NOTHING) -> Any:
    """Declares a number greater than 0."""
    return field("a number greater than 0", lambda x: x > 0.0, default)


def non_negative(default: Any = attrs.NOTHING, *, traceable: bool = False) -> Any:
    """Declares a number of at least 0."""
    return field("a number of at least 0", lambda x: x >= 0.0, default, traceable=traceable)


def flag(default: bool) -> Any:
    """Declares a Python bool that shapes the graph."""

    def validate(owner: Any, attribute: attrs.Attribute, value: Any) -> None:
        if not isinstance(value, bool):
            raise TypeError(
                f"`{attribute.name}` of `{type(owner).__name__}` must be True or False; "
                f"found {value!r}."
            )

    return attrs.field(default=default, validator=validate)


def _fields(part: Any) -> list[attrs.Attribute]:
    if not attrs.has(type(part)):
        return []
    return [f for f in attrs.fields(type(part)) if f.metadata.get(_MARK)]


def numbers(part: Any) -> list[str]:
    """Names of the hyper-parameters of `part` that were given as numbers."""
    return [f.name for f in _fields(part) if not isinstance(getattr(part, f.name), Schedule)]


def has_schedule(part: Any) -> bool:
    """Whether a hyper-parameter of `part` is a schedule."""
    return len(numbers(part)) < len(_fields(part))


def initialize(part: Any, counts_steps: bool = False) -> Hparams:
    """The entries of the first state: the numbers and, if needed or asked for, `step`.

    NumPy scalars, not tensors: TFF reads the hparams of an eagerly made state and accepts only
    plain numbers there. Float32, so that every place computes with the same value, float64
    weights included.
    """
    state: Hparams = collections.OrderedDict(
        (name, in_single(getattr(part, name))) for name in numbers(part)
    )
    if counts_steps or has_schedule(part):
        state[STEP] = np.int64(0)
    return state


def in_single(value: Any) -> Any:
    """A number or tensor scalar in float32: a number as a NumPy scalar, a tensor as a tensor."""
    return tf.cast(value, tf.float32) if tf.is_tensor(value) else np.float32(value)


def check_state(
    part: Any, state: Any, slots: tuple[str, ...] = (), counts_steps: bool = False
) -> None:
    """Raises `ValueError` unless `state` has the entries of `initialize` and the `slots`."""
    steps = [STEP] if counts_steps or has_schedule(part) else []
    leaves.check_keys(state, [*numbers(part), *steps, *slots], f"{type(part).__name__}` of `state")


def current(part: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The values for this step, by name: from the state, or the schedule's."""
    values = {}
    for f in _fields(part):
        given = getattr(part, f.name)
        if isinstance(given, Schedule):
            value = tf.convert_to_tensor(given(leaves.number(state[STEP], tf.int64)))
            _check_traced(type(part).__name__, f.name, value)
            values[f.name] = leaves.number(value, tf.float32)
        else:
            values[f.name] = state[f.name]
    return values


def advance(part: Any, state: Mapping[str, Any]) -> Hparams:
    """The entries of `initialize` for the next state: numbers carried over, `step` counted."""
    carried = collections.OrderedDict((name, state[name]) for name in numbers(part))
    if STEP in state:
        carried[STEP] = leaves.number(state[STEP], tf.int64) + 1
    return carried


def get_hparams(part: Any, state: Mapping[str, Any]) -> Hparams:
    """The numbers in `state` that can be set between rounds."""
    return collections.OrderedDict((name, state[name]) for name in numbers(part))


def set_hparams(part: Any, state: Mapping[str, Any], hparams: Mapping[str, Any]) -> Any:
    """`state` with the numbers in `hparams`; plain numbers are checked as at construction.

    Raises:
      ValueError: If `hparams` has other names than `get_hparams` gives, a number is out of range,
        or a tensor is not a scalar. Values of symbolic tensors cannot be checked.
      TypeError: If a value is neither a number nor a tensor.
    """
    leaves.check_keys(hparams, numbers(part), f"hparams of {type(part).__name__}")
    new_state = collections.OrderedDict(state)
    for name, given in hparams.items():
        new_state[name] = checked(part, name, given)
    return new_state


def checked(part: Any, name: str, given: Any) -> Any:
    """`given` as a value for the state, in float32; all is checked that is known of it."""
    if tf.is_symbolic_tensor(given):
        _check_traced(type(part).__name__, name, given)
        return in_single(given)
    value = _number_in(type(part).__name__, name, given)
    attribute = attrs.fields_dict(type(part))[name]
    if isinstance(value, Schedule):
        raise TypeError(
            f"`{name}` of `{type(part).__name__}` must be set to a number or a tensor; found "
            "a schedule. Give schedules at construction."
        )
    attribute.validator(part, attribute, value)  # type: ignore[misc]
    return in_single(value)


def check_finite(owner: str, name: str, given: Any) -> None:
    """Raises unless `given` is a finite number, or a symbolic tensor of one."""
    if tf.is_symbolic_tensor(given):
        _check_traced(owner, name, given)
    else:
        value = _number_in(owner, name, given)
        check_number(owner, name, value, "a finite number", lambda x: True)


def _number_in(owner: str, name: str, given: Any) -> Any:
    """`_to_float`, also of an eager tensor."""
    if tf.is_tensor(given):
        _check_traced(owner, name, given)
        given = given.numpy()
    return _to_float(given)
