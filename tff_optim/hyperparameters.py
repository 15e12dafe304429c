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

import numpy as np
import tensorflow as tf

from tff_optim.core import leaves
from tff_optim.core.hparam_values import (
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
from tff_optim.core.intervals import (
    FINITE,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    UNIT,
    Interval,
    checked_number,
)
from tff_optim.core.tracing import as_written
from tff_optim.hparam_fields import (
    constant,
    field,
    fields_of,
    flag,
    fraction,
    has_schedule,
    intervals,
    non_negative,
    positive,
)

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
    for f in fields_of(part):
        given = getattr(part, f.name)
        if isinstance(given, Schedule):
            step = leaves.number(state[STEP], tf.int64)
            value = tf.convert_to_tensor(as_written(given)(step))
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
