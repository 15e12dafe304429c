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
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import tensorflow as tf

from tff_optim import comparison, entries, keras_arguments, keras_objects, leaves
from tff_optim.hparam_values import (
    STEP,
    Hparams,
    Schedule,
    check_names,
    check_scalar,
    checked,
    checked_where_run,
    complete,
    in_dtype_of,
    update,
)
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
from tff_optim.messages import shown

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

_MARK = "tff_optim_hyperparameter"


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
            check_scalar(name, attribute.name, value)
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
    """Declares a number that stays as it was given: no schedule, not in the state.

    Example:
      >>> @attrs.frozen
      ... class Part:
      ...     number: Any = constant(POSITIVE, 2)
      >>> Part(), dict(initialize(Part()))
      (Part(number=2.0), {})
    """

    def validate(owner: Any, attribute: attrs.Attribute, value: Any) -> None:
        checked_number(type(owner).__name__, attribute.name, value, allowed)

    return attrs.field(default=default, converter=to_float, validator=validate)


def fraction(default: Any = attrs.NOTHING) -> Any:
    """Declares a decay rate in [0, 1).

    Example:
      >>> @attrs.frozen
      ... class Part:
      ...     number: Any = fraction(0.5)
      >>> Part(0.9)
      Part(number=0.9)
    """
    return field(FRACTION, default)


def positive(default: Any = attrs.NOTHING) -> Any:
    """Declares a number greater than 0.

    Example:
      >>> @attrs.frozen
      ... class Part:
      ...     number: Any = positive()
      >>> Part(1)
      Part(number=1.0)
    """
    return field(POSITIVE, default)


def non_negative(default: Any = attrs.NOTHING, *, traceable: bool = False) -> Any:
    """Declares a number of at least 0.

    Example:
      >>> @attrs.frozen
      ... class Part:
      ...     number: Any = non_negative(0)
      >>> Part()
      Part(number=0.0)
    """
    return field(NON_NEGATIVE, default, traceable=traceable)


def flag(default: bool) -> Any:
    """Declares a Python bool that shapes the graph.

    Example:
      >>> @attrs.frozen
      ... class Part:
      ...     number: Any = flag(False)
      >>> Part(True)
      Part(number=True)
    """

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
    """The hyper-parameters of `part` that were given as numbers, with what is allowed for each.

    Example:
      >>> from tff_optim import transforms
      >>> {name: allowed.words for name, allowed in intervals(transforms.Momentum(0.5)).items()}
      {'beta': 'a number in [0, 1)'}
    """
    return {
        f.name: f.metadata[_MARK]
        for f in _fields(part)
        if not isinstance(getattr(part, f.name), Schedule)
    }


def has_schedule(part: Any) -> bool:
    """Whether a hyper-parameter of `part` is a schedule.

    Example:
      >>> from tff_optim import transforms
      >>> has_schedule(transforms.Momentum(0.5))
      False
    """
    return len(intervals(part)) < len(_fields(part))


def initialize(part: Any, counts_steps: bool = False) -> Hparams:
    """The entries of the first state: the numbers and, if needed or asked for, `step`.

    NumPy scalars, not tensors: TFF reads the hparams of an eagerly made state and accepts only
    plain numbers there. Float32, so that every place computes with the same value, float64
    weights included.

    Example:
      >>> from tff_optim import transforms
      >>> state = initialize(transforms.Momentum(0.5), counts_steps=True)
      >>> {name: float(value) for name, value in state.items()}
      {'beta': 0.5, 'step': 0.0}
    """
    state: Hparams = collections.OrderedDict()
    for name, allowed in intervals(part).items():
        value = getattr(part, name)
        if tf.is_tensor(value):
            value = checked_where_run(type(part).__name__, name, value, allowed)
        state[name] = in_dtype_of(value, np.float32(0))
    if counts_steps or has_schedule(part):
        state[STEP] = np.int64(0)
    return state


def check_state(
    part: Any, state: Any, slots: tuple[str, ...] = (), counts_steps: bool = False
) -> None:
    """Raises `ValueError` unless `state` has the entries of `initialize` and the `slots`.

    Example:
      >>> from tff_optim import transforms
      >>> momentum = transforms.Momentum(0.5)
      >>> check_state(momentum, {**initialize(momentum), "velocity": ()}, slots=("velocity",))
    """
    steps = [STEP] if counts_steps or has_schedule(part) else []
    leaves.check_keys(
        state, [*intervals(part), *steps, *slots], f"{type(part).__name__}` of `state"
    )


def current(part: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The values for this step, by name: from the state, or the schedule's.

    Example:
      >>> from tff_optim import transforms
      >>> momentum = transforms.Momentum(0.5)
      >>> float(current(momentum, initialize(momentum))["beta"])
      0.5
    """
    values = {}
    for f in _fields(part):
        given = getattr(part, f.name)
        if isinstance(given, Schedule):
            value = tf.convert_to_tensor(given(leaves.number(state[STEP], tf.int64)))
            check_scalar(type(part).__name__, f.name, value)
            values[f.name] = leaves.number(value, tf.float32)
        else:
            values[f.name] = state[f.name]
    return values


def advance(part: Any, state: Mapping[str, Any]) -> Hparams:
    """The entries of `initialize` for the next state: numbers carried over, `step` counted.

    Example:
      >>> from tff_optim import transforms
      >>> momentum = transforms.Momentum(0.5)
      >>> int(advance(momentum, initialize(momentum, counts_steps=True))["step"])
      1
    """
    carried = get_hparams(part, state)
    if STEP in state:
        carried[STEP] = leaves.number(state[STEP], tf.int64) + 1
    return carried


def get_hparams(part: Any, state: Mapping[str, Any]) -> Hparams:
    """The numbers in `state` that can be set between rounds.

    Example:
      >>> from tff_optim import transforms
      >>> momentum = transforms.Momentum(0.5)
      >>> list(get_hparams(momentum, initialize(momentum)))
      ['beta']
    """
    return collections.OrderedDict((name, state[name]) for name in intervals(part))


def set_hparams(part: Any, state: Mapping[str, Any], hparams: Mapping[str, Any]) -> Hparams:
    """`state` with the numbers in `hparams`; see `update`.

    Example:
      >>> from tff_optim import transforms
      >>> momentum = transforms.Momentum(0.5)
      >>> float(set_hparams(momentum, initialize(momentum), {"beta": 0.25})["beta"])
      0.25
    """
    return update(state, hparams, intervals(part), type(part).__name__)
