"""Numeric hyper-parameters: one way to declare, check, schedule, read and set them.

A hyper-parameter is a number or a Keras schedule. A number lives in the state, under its name, and
can be set between rounds. A schedule is evaluated in the graph at the number of steps taken before
this one (0, then 1, ...), which then lives in the state under `step`.

Every optimizer of this package keeps one contract, whatever library its step comes from:

- A number is checked when the optimizer is built (`checked_number`) and when it is set (`update`): a
  finite Python or NumPy number of any width in an `Interval`, as given and when rounded to float32.
- `set_hparams` takes a part of what `get_hparams` returns. A number keeps the dtype that it has in
  the state. A tensor of a graph has no value yet: where the graph runs, it is checked there.
"""

import collections
import math
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import tensorflow as tf

from tff_optim import comparison, entries, keras_arguments, keras_objects, leaves
from tff_optim.intervals import (
    FINITE,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    UNIT,
    Interval,
    checked_number,
    to_float,
)
from tff_optim.messages import at, shown

__all__ = [
    "FINITE",
    "FRACTION",
    "NON_NEGATIVE",
    "POSITIVE",
    "STEP",
    "UNIT",
    "Hparams",
    "Interval",
    "Schedule",
    "advance",
    "check_names",
    "check_state",
    "checked",
    "checked_number",
    "complete",
    "constant",
    "current",
    "field",
    "flag",
    "fraction",
    "get_hparams",
    "has_schedule",
    "in_dtype_of",
    "initialize",
    "intervals",
    "non_negative",
    "positive",
    "set_hparams",
    "update",
]

Schedule = tf.keras.optimizers.schedules.LearningRateSchedule
Hparams = collections.OrderedDict[str, Any]
STEP = "step"

_MARK = "tff_optim_hyperparameter"


def _check_scalar(owner: str, name: str, value: tf.Tensor) -> None:
    if value.shape.rank != 0 or not (value.dtype.is_floating or value.dtype.is_integer):
        raise ValueError(
            f"`{name}` of `{owner}` must be one real number if it is a tensor; found "
            f"{value.dtype.name}{value.shape}."
        )


def _checked_where_run(owner: str, name: str, value: tf.Tensor, allowed: Interval) -> tf.Tensor:
    """A scalar tensor of a graph, which checks its value where the graph is run."""
    _check_scalar(owner, name, value)
    number = tf.cast(value, tf.float32)
    good = tf.math.is_finite(number) & allowed.holds(number)
    message = f"`{name}` of `{owner}` must be {allowed.words}; found:"
    with tf.control_dependencies([tf.debugging.Assert(good, [message, value])]):
        return tf.identity(value)


def checked(owner: str, name: str, value: Any, allowed: Interval) -> Any:
    """A value that a hyper-parameter is set to: a Python float, or a tensor if it is one of a graph.

    Raises:
      TypeError: If it is neither a number nor a tensor.
      ValueError: If it is not allowed, or a tensor is not a scalar.
    """
    if tf.is_symbolic_tensor(value):
        return _checked_where_run(owner, name, value, allowed)
    if isinstance(value, Schedule):
        raise TypeError(
            f"`{name}` of `{owner}` must be set to a number or a tensor; found a schedule. Give "
            "schedules when the optimizer is built."
        )
    if tf.is_tensor(value):
        _check_scalar(owner, name, value)
        value = value.numpy()
    return checked_number(owner, name, value, allowed)


def in_dtype_of(value: Any, number: Any) -> Any:
    """`value`, a number or scalar tensor, in the dtype of `number`: a tensor or a NumPy scalar."""
    dtype = leaves.spec_of(number).dtype
    return tf.cast(value, dtype) if tf.is_tensor(value) else dtype.as_numpy_dtype(value)


def update(
    state: Mapping[str, Any],
    hparams: Mapping[str, Any],
    intervals: Mapping[str, Interval],
    owner: str,
) -> Hparams:
    """Returns `state` with some of its numbers set: what every `set_hparams` does.

    Args:
      state: A mapping that holds the numbers by name, and possibly more.
      hparams: New values by name: Python or NumPy numbers, or scalar tensors. What is left out
        stays as it is.
      intervals: The names that may be set, and which numbers are allowed for each.
      owner: Whose hyper-parameters they are, for messages.

    Returns:
      An `OrderedDict`, with every number in the dtype that it has in `state`.

    Raises:
      TypeError: If a value is neither a number nor a tensor.
      ValueError: If a name is unknown, a number is not allowed, or a tensor is not a scalar.

    Example:
      >>> state = collections.OrderedDict(beta=np.float32(0.5), step=np.int64(3))
      >>> float(update(state, {"beta": 0.25}, {"beta": FRACTION}, "Momentum")["beta"])
      0.25
    """
    check_names(hparams, intervals, owner)
    new_state = collections.OrderedDict(state)
    for name, value in hparams.items():
        value = checked(owner, name, value, intervals[name])
        new_state[name] = in_dtype_of(value, state[name])
    return new_state


def complete(known: Any, given: Any, path: str = "") -> Any:
    """The hyper-parameters of a whole process, from some of them.

    TFF's own processes take nothing but all of them, each in its very dtype.

    Args:
      known: What `get_hparams` of the process returns: numbers in mappings.
      given: Some of them, in the same mappings: Python or NumPy numbers of any width.
      path: Where they stand, for messages.

    Returns:
      All of them, structured and typed like `known`.

    Raises:
      TypeError: If a value is not a number.
      ValueError: If a name is unknown, or a number is not finite or not whole where it must be.

    Example:
      >>> known = {"finalizer": {"learning_rate": np.float32(1.0), "beta_1": np.float64(0.5)}}
      >>> complete(known, {"finalizer": {"learning_rate": 2}})["finalizer"]["learning_rate"].dtype
      dtype('float32')
    """
    where = at("hparams", path)
    if isinstance(known, Mapping):
        if not isinstance(given, Mapping):
            raise TypeError(f"{where} must be a mapping; found {shown(given)}.")
        if unknown := [name for name in given if name not in known]:
            raise ValueError(
                f"{where} must hold some of {', '.join(known) or 'nothing'}; found {shown(unknown)}."
            )
        return collections.OrderedDict(
            (
                key,
                complete(value, given[key], f"{path}/{key}".lstrip("/")) if key in given else value,
            )
            for key, value in known.items()
        )
    old = np.asarray(known)
    if old.ndim or old.dtype.kind not in "fiu":
        return given  # not a number: TFF compares its type
    number = to_float(given.numpy() if isinstance(given, tf.Tensor) else given)
    if not isinstance(number, float):
        raise TypeError(f"{where} must be a number; found {shown(given)}.")
    if old.dtype.kind != "f":
        if not math.isfinite(number) or number != int(number):
            raise ValueError(f"{where} must be a whole number; found {shown(given)}.")
        return old.dtype.type(int(number))
    with np.errstate(over="ignore"):
        new = old.dtype.type(number)
    if not np.isfinite(new):
        raise ValueError(f"{where} must be a finite number in {old.dtype}; found {shown(given)}.")
    return new


def check_names(hparams: Any, known: Mapping[str, Any], owner: str) -> None:
    """Raises `ValueError` unless `hparams` is a mapping from some of the names in `known`."""
    if not isinstance(hparams, Mapping):
        raise ValueError(
            f"`hparams` of `{owner}` must be a mapping from names to numbers; found "
            f"{shown(hparams)}."
        )
    if unknown := [name for name in hparams if name not in known]:
        raise ValueError(
            f"`hparams` of `{owner}` must hold some of {', '.join(known) or 'nothing'}; found "
            f"{', '.join(map(str, unknown))}. What else there is, is fixed when it is built."
        )


# ------------------------------------------------------------------------------------- declarations


def field(allowed: Interval, default: Any = attrs.NOTHING, *, traceable: bool = False) -> Any:
    """Declares a numeric hyper-parameter of a frozen attrs class.

    Args:
      allowed: The allowed numbers.
      default: The default value.
      traceable: Whether a scalar tensor of the computation that is being traced is taken too. Its
        value is checked where the computation runs.

    Returns:
      An attrs field that takes a number (an int or NumPy scalar becomes a float) or a Keras
      schedule, compares schedules by their configuration, and raises `TypeError` or `ValueError`
      for anything else. The number must be allowed as given and when rounded to float32.

    Example:
      >>> @attrs.frozen
      ... class Scale:
      ...     factor: float = field(POSITIVE, 1.0)
      >>> Scale(np.int64(2))
      Scale(factor=2.0)
    """

    def validate(owner: Any, attribute: attrs.Attribute, value: Any) -> None:
        name = type(owner).__name__
        if traceable and tf.is_symbolic_tensor(value):
            _check_scalar(name, attribute.name, value)
        elif isinstance(value, Schedule):
            keras_arguments.check_object(value)
        else:
            checked_number(name, attribute.name, value, allowed, " or a Keras schedule")

    return attrs.field(
        default=default,
        converter=to_float,
        validator=validate,
        eq=comparison.key,
        metadata={_MARK: allowed, entries.READER: keras_objects.rate_from_json},
    )


def constant(allowed: Interval, default: Any = attrs.NOTHING) -> Any:
    """Declares a number that stays as it was given: no schedule, not in the state."""

    def validate(owner: Any, attribute: attrs.Attribute, value: Any) -> None:
        checked_number(type(owner).__name__, attribute.name, value, allowed)

    return attrs.field(default=default, converter=to_float, validator=validate)


def fraction(default: Any = attrs.NOTHING) -> Any:
    """Declares a decay rate in [0, 1)."""
    return field(FRACTION, default)


def positive(default: Any = attrs.NOTHING) -> Any:
    """Declares a number greater than 0."""
    return field(POSITIVE, default)


def non_negative(default: Any = attrs.NOTHING, *, traceable: bool = False) -> Any:
    """Declares a number of at least 0."""
    return field(NON_NEGATIVE, default, traceable=traceable)


def flag(default: bool) -> Any:
    """Declares a Python bool that shapes the graph."""

    def validate(owner: Any, attribute: attrs.Attribute, value: Any) -> None:
        if not isinstance(value, bool):
            raise TypeError(
                f"`{attribute.name}` of `{type(owner).__name__}` must be True or False; "
                f"found {shown(value)}."
            )

    return attrs.field(default=default, validator=validate)


# ------------------------------------------------------------- what declared fields put into a state


def _fields(part: Any) -> list[attrs.Attribute]:
    if not attrs.has(type(part)):
        return []
    return [f for f in attrs.fields(type(part)) if _MARK in f.metadata]


def intervals(part: Any) -> dict[str, Interval]:
    """The hyper-parameters of `part` that were given as numbers, with what is allowed for each."""
    return {
        f.name: f.metadata[_MARK]
        for f in _fields(part)
        if not isinstance(getattr(part, f.name), Schedule)
    }


def has_schedule(part: Any) -> bool:
    """Whether a hyper-parameter of `part` is a schedule."""
    return len(intervals(part)) < len(_fields(part))


def initialize(part: Any, counts_steps: bool = False) -> Hparams:
    """The entries of the first state: the numbers and, if needed or asked for, `step`.

    NumPy scalars, not tensors: TFF reads the hparams of an eagerly made state and accepts only
    plain numbers there. Float32, so that every place computes with the same value, float64
    weights included.
    """
    state: Hparams = collections.OrderedDict()
    for name, allowed in intervals(part).items():
        value = getattr(part, name)
        if tf.is_tensor(value):
            value = _checked_where_run(type(part).__name__, name, value, allowed)
        state[name] = in_dtype_of(value, np.float32(0))
    if counts_steps or has_schedule(part):
        state[STEP] = np.int64(0)
    return state


def check_state(
    part: Any, state: Any, slots: tuple[str, ...] = (), counts_steps: bool = False
) -> None:
    """Raises `ValueError` unless `state` has the entries of `initialize` and the `slots`."""
    steps = [STEP] if counts_steps or has_schedule(part) else []
    leaves.check_keys(
        state, [*intervals(part), *steps, *slots], f"{type(part).__name__}` of `state"
    )


def current(part: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The values for this step, by name: from the state, or the schedule's."""
    values = {}
    for f in _fields(part):
        given = getattr(part, f.name)
        if isinstance(given, Schedule):
            value = tf.convert_to_tensor(given(leaves.number(state[STEP], tf.int64)))
            _check_scalar(type(part).__name__, f.name, value)
            values[f.name] = leaves.number(value, tf.float32)
        else:
            values[f.name] = state[f.name]
    return values


def advance(part: Any, state: Mapping[str, Any]) -> Hparams:
    """The entries of `initialize` for the next state: numbers carried over, `step` counted."""
    carried = get_hparams(part, state)
    if STEP in state:
        carried[STEP] = leaves.number(state[STEP], tf.int64) + 1
    return carried


def get_hparams(part: Any, state: Mapping[str, Any]) -> Hparams:
    """The numbers in `state` that can be set between rounds."""
    return collections.OrderedDict((name, state[name]) for name in intervals(part))


def set_hparams(part: Any, state: Mapping[str, Any], hparams: Mapping[str, Any]) -> Hparams:
    """`state` with the numbers in `hparams`; see `update`."""
    return update(state, hparams, intervals(part), type(part).__name__)
