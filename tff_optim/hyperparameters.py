"""Numeric hyper-parameters: one way to declare, check, schedule, read and set them.

A hyper-parameter is a number or a Keras schedule. A number lives in the state, under its name, and
can be set between rounds. A schedule is evaluated in the graph at the number of steps taken before
this one (0, then 1, ...), which then lives in the state under `step`.

All optimizers of this package keep one contract, whatever library takes their step:

- A number is checked when the optimizer is built (`checked_number`) and when it is set (`update`). It
  must be a finite Python or NumPy number of any width in an `Interval`, as given and when rounded to
  float32.
- `set_hparams` takes some of the numbers of `get_hparams`. A number keeps its dtype in the state. A
  tensor of a graph has no value yet, so it is checked when the graph runs.
"""

import collections
from collections.abc import Mapping

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.core import comparison, leaves
from tff_optim.core.checks import check_flag
from tff_optim.core.numbers import (
    FINITE,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    STEP,
    UNIT,
    Interval,
    Schedule,
    check_names,
    check_scalar,
    checked,
    checked_number,
    checked_where_run,
    complete,
    constant,
    in_dtype_of,
    to_float,
    update,
)
from tff_optim.core.tracing import converted
from tff_optim.core.types import Declared, Hparams, Number, State, Value
from tff_optim.keras_objects import arguments as keras_arguments

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


def field(
    allowed: Interval, default: object = attrs.NOTHING, *, traceable: bool = False
) -> Declared:
    """Declares a numeric hyper-parameter of a frozen attrs class.

    Args:
      allowed: The allowed numbers.
      default: The default value.
      traceable: Whether a scalar tensor of the computation being traced is also accepted. Its value is
        checked when the computation runs.

    Returns:
      An attrs field that takes a number (an int or NumPy scalar becomes a float) or a Keras
      schedule, compares schedules by their configuration, and raises `TypeError` or `ValueError`
      for anything else. The number must be allowed as given and when rounded to float32. No field may
      be called `step`: the state counts its steps under that name.

    Example:
      >>> @attrs.frozen
      ... class Scale:
      ...     factor: float = field(POSITIVE, 1.0)
      >>> Scale(2)
      Scale(factor=2.0)
    """

    def validate(owner: object, attribute: attrs.Attribute, value: object) -> None:
        name = type(owner).__name__
        if attribute.name == STEP:
            raise ValueError(
                f"`{STEP}` of `{name}` must have another name, since the state counts its steps under "
                "this one; found a hyper-parameter. Call it `step_size`, for example."
            )
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
        metadata={_MARK: allowed},
    )


def fraction(default: object = attrs.NOTHING) -> Declared:
    """Declares a decay rate in [0, 1).

    Example:
      >>> attrs.make_class("Part", {"beta": fraction(0.5)})(0.9)
      Part(beta=0.9)
    """
    return field(FRACTION, default)


def positive(default: object = attrs.NOTHING) -> Declared:
    """Declares a number greater than 0.

    Example:
      >>> attrs.make_class("Part", {"size": positive()})(1)
      Part(size=1.0)
    """
    return field(POSITIVE, default)


def non_negative(default: object = attrs.NOTHING, *, traceable: bool = False) -> Declared:
    """Declares a number of at least 0.

    Example:
      >>> attrs.make_class("Part", {"size": non_negative(0)})()
      Part(size=0.0)
    """
    return field(NON_NEGATIVE, default, traceable=traceable)


def flag(default: bool) -> Declared:
    """Declares a Python bool that shapes the graph.

    Example:
      >>> attrs.make_class("Part", {"nesterov": flag(False)})(True)
      Part(nesterov=True)
    """

    def validate(owner: object, attribute: attrs.Attribute, value: object) -> None:
        check_flag(f"`{attribute.name}` of `{type(owner).__name__}`", value, error=TypeError)

    return attrs.field(default=default, validator=validate)


def is_field(attribute: attrs.Attribute) -> bool:
    """Whether an attribute was declared with `field`, and so may be a number or a schedule."""
    return _MARK in attribute.metadata


def fields_of(part: Value) -> list[attrs.Attribute]:
    """The fields of a part that were declared with `field`."""
    if not attrs.has(type(part)):
        return []
    return [f for f in attrs.fields(type(part)) if is_field(f)]


def intervals(part: object) -> dict[str, Interval]:
    """The hyper-parameters of `part` that were given as numbers, and the interval of each.

    Example:
      >>> from tff_optim import transforms
      >>> {name: allowed.words for name, allowed in intervals(transforms.Momentum(0.5)).items()}
      {'beta': 'a number in [0, 1)'}
    """
    return {
        f.name: f.metadata[_MARK]
        for f in fields_of(part)
        if not isinstance(getattr(part, f.name), Schedule)
    }


def has_schedule(part: object) -> bool:
    """Whether a hyper-parameter of `part` is a schedule.

    Example:
      >>> from tff_optim import transforms
      >>> has_schedule(transforms.Momentum(0.5))
      False
    """
    return len(intervals(part)) < len(fields_of(part))


def initialize(part: object, counts_steps: bool = False) -> Hparams:
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
    part: object, state: State, slots: tuple[str, ...] = (), counts_steps: bool = False
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


def current(part: object, state: State) -> dict[str, Number]:
    """The values for this step, by name: from the state, or the schedule's.

    Example:
      >>> from tff_optim import transforms
      >>> momentum = transforms.Momentum(0.5)
      >>> float(current(momentum, initialize(momentum))["beta"])
      0.5
    """
    values = {}
    for f in fields_of(part):
        given = getattr(part, f.name)
        if isinstance(given, Schedule):
            step = leaves.number(state[STEP], tf.int64)
            value = tf.convert_to_tensor(converted(given)(step))
            check_scalar(type(part).__name__, f.name, value)
            values[f.name] = leaves.number(value, tf.float32)
        else:
            values[f.name] = state[f.name]
    return values


def advance(part: object, state: State) -> Hparams:
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


def get_hparams(part: object, state: State) -> Hparams:
    """The numbers in `state` that can be set between rounds.

    Example:
      >>> from tff_optim import transforms
      >>> momentum = transforms.Momentum(0.5)
      >>> list(get_hparams(momentum, initialize(momentum)))
      ['beta']
    """
    return collections.OrderedDict((name, state[name]) for name in intervals(part))


def set_hparams(part: object, state: State, hparams: Mapping[str, Number]) -> Hparams:
    """`state` with the numbers in `hparams`; see `update`.

    Example:
      >>> from tff_optim import transforms
      >>> momentum = transforms.Momentum(0.5)
      >>> float(set_hparams(momentum, initialize(momentum), {"beta": 0.25})["beta"])
      0.25
    """
    return update(state, hparams, intervals(part), type(part).__name__)
