"""Numbers of a rule that may change from round to round: checked when given, and when set."""

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import TypeAlias

import attrs
import tensorflow as tf

from aggregators.core import checks
from aggregators.core.types import State, Structure

Schedule: TypeAlias = tf.keras.optimizers.schedules.LearningRateSchedule
Number: TypeAlias = float | Schedule


def comparable(value: object) -> object:
    """Something equal for equal values: Keras schedules, which compare as objects, by their config."""
    if isinstance(value, tf.keras.optimizers.schedules.LearningRateSchedule):
        return type(value), json.dumps(value.get_config(), sort_keys=True, default=repr)
    if isinstance(value, Mapping):
        return {name: comparable(x) for name, x in value.items()}
    return tuple(map(comparable, value)) if isinstance(value, list | tuple) else value


@attrs.frozen
class Hparam:
    """A number in a rule's state, or a schedule of it over rounds, and the range it must lie in.

    Attributes:
      value: A number: a hyperparameter of the process, under its name. Or a Keras schedule, which
        is called with the number of rounds done, and is then no hyperparameter.
      range: Where it must lie, in every round.
    """

    value: float | Schedule = attrs.field(eq=comparable)
    range: checks.Range = attrs.field(default=checks.Range(), repr=False)

    @property
    def is_scheduled(self) -> bool:
        """Whether it follows a schedule."""
        return isinstance(self.value, tf.keras.optimizers.schedules.LearningRateSchedule)

    def at(self, round_number: tf.Tensor) -> tf.Tensor:
        """The value in a round: a float64 scalar; `check_schedules` tells where one leaves the range."""
        if not self.is_scheduled:
            return tf.constant(self.value, tf.float64)
        # In a function, since schedules branch in Python, and compare tensors with `==`.
        return tf.cast(tf.function(self.value)(round_number), tf.float64)


Hparams: TypeAlias = Mapping[str, Hparam]


def hparam(
    argument: str,
    value: object,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    hint: str = "",
) -> Hparam:
    """Checks a number and makes an `Hparam` of it.

    Args:
      argument: Its name in messages.
      value: A finite number, or a Keras schedule over rounds.
      least: The least value; minus infinity for no limit.
      most: The largest; infinity for no limit.
      above: Whether the least value itself is left out.
      below: Whether the largest is.
      hint: What to do instead, after the message.

    Returns:
      An `Hparam`.

    Raises:
      ValueError: If the value is neither, or out of its range.

    Example:
      >>> hparam("q", 0.5, 0.0).value
      0.5
    """
    within = checks.Range(least, most, above, below)
    if not isinstance(value, tf.keras.optimizers.schedules.LearningRateSchedule):
        return Hparam(checks.number(argument, value, within, hint=hint), within)
    found = Hparam(value, within)
    with tf.init_scope():
        first = float(found.at(tf.constant(0)))  # as a rule's state asks it
    if not within.holds(first):
        raise ValueError(
            f"`{argument}` must be {within}; found a schedule that starts at {first:g}."
        )
    return found


def values(hparams: Hparams, round_number: tf.Tensor) -> OrderedDict[str, tf.Tensor]:
    """The hyperparameters of a round, as a rule's state holds them."""
    return OrderedDict((name, one.at(round_number)) for name, one in hparams.items())


def settable(hparams: Hparams) -> OrderedDict[str, Hparam]:
    """Those that no schedule decides: a process's hyperparameters."""
    return OrderedDict((name, one) for name, one in hparams.items() if not one.is_scheduled)


def read(hparams: Hparams, state: Structure) -> OrderedDict[str, Structure]:
    """The hyperparameters in a state."""
    return OrderedDict((name, state[name]) for name in settable(hparams))


def write(hparams: Hparams, state: Structure, new: State) -> OrderedDict[str, Structure]:
    """The state with these hyperparameters; ends the computation where one is out of its range."""
    found = OrderedDict(state.items() if isinstance(state, Mapping) else state._asdict())
    checked = settable(hparams)
    found.update((name, new[name]) for name in checked)
    return _checked(checked, found, "found")


def check_schedules(hparams: Hparams, state: Structure) -> OrderedDict[str, Structure]:
    """The state as it is; ends the round where a schedule has left the range of its number."""
    found = OrderedDict(state.items() if isinstance(state, Mapping) else state._asdict())
    scheduled = OrderedDict((name, one) for name, one in hparams.items() if one.is_scheduled)
    return _checked(scheduled, found, "its schedule gives")


def _checked(
    hparams: Hparams, state: OrderedDict[str, Structure], verb: str
) -> OrderedDict[str, Structure]:
    if not hparams:
        return state
    holds, message = tf.constant(True), []
    for name, one in hparams.items():
        holds &= one.range.holds(state[name])
        message += [f"`{name}` must be {one.range}; {verb}", state[name]]
    return checks.asserted(holds, message, state)
