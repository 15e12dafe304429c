"""Hyperparameters of a rule: numbers that may change between rounds, checked whenever they are set."""

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
    """A stand-in that compares by value: Keras schedules, which compare by identity, by their config."""
    if isinstance(value, tf.keras.optimizers.schedules.LearningRateSchedule):
        return type(value), json.dumps(value.get_config(), sort_keys=True, default=repr)
    if isinstance(value, Mapping):
        return {name: comparable(x) for name, x in value.items()}
    return tuple(map(comparable, value)) if isinstance(value, list | tuple) else value


@attrs.frozen
class Hparam:
    """A number in a rule's state, or its schedule over rounds, and the range that it must stay in.

    Attributes:
      value: A number, which becomes a hyperparameter of the process. Or a Keras schedule, which is
        called with the number of finished rounds and is no hyperparameter.
      range: The range in every round.
    """

    value: float | Schedule = attrs.field(eq=comparable)
    range: checks.Range = attrs.field(default=checks.Range(), repr=False)

    @property
    def is_scheduled(self) -> bool:
        """Whether the value is a schedule."""
        return isinstance(self.value, tf.keras.optimizers.schedules.LearningRateSchedule)

    def at(self, round_number: tf.Tensor) -> tf.Tensor:
        """The value in a round, a float64 scalar; `check_schedules` checks that it is in range."""
        if not self.is_scheduled:
            return tf.constant(self.value, tf.float64)
        # In a `tf.function`, since schedules branch in Python and compare tensors with `==`.
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
    """Checks a number or schedule, and makes it an `Hparam`.

    Args:
      argument: Its name in messages.
      value: A finite number, or a Keras schedule over rounds.
      least: The lower end of its range; minus infinity for none.
      most: The upper end of its range; infinity for none.
      above: Whether the lower end itself is excluded.
      below: Whether the upper end itself is excluded.
      hint: Advice at the end of the message.

    Returns:
      An `Hparam`.

    Raises:
      ValueError: If the value is neither, or out of range.

    Example:
      >>> hparam("q", 0.5, 0.0).value
      0.5
    """
    within = checks.Range(least, most, above, below)
    if not isinstance(value, tf.keras.optimizers.schedules.LearningRateSchedule):
        return Hparam(checks.number(argument, value, within, hint=hint), within)
    found = Hparam(value, within)
    with tf.init_scope():
        first = float(found.at(tf.constant(0)))
    if not within.holds(first):
        raise ValueError(
            f"`{argument}` must be {within}; found a schedule that starts at {first:g}."
        )
    return found


def values(hparams: Hparams, round_number: tf.Tensor) -> OrderedDict[str, tf.Tensor]:
    """The values of a round, as in a rule's state."""
    return OrderedDict((name, one.at(round_number)) for name, one in hparams.items())


def settable(hparams: Hparams) -> OrderedDict[str, Hparam]:
    """Those without a schedule, which are the hyperparameters of the process."""
    return OrderedDict((name, one) for name, one in hparams.items() if not one.is_scheduled)


def read(hparams: Hparams, state: Structure) -> OrderedDict[str, Structure]:
    """The hyperparameters in a state."""
    return OrderedDict((name, state[name]) for name in settable(hparams))


def write(hparams: Hparams, state: Structure, new: State) -> OrderedDict[str, Structure]:
    """The state with new hyperparameters; an error ends the computation if one is out of range."""
    checked = settable(hparams)
    return _checked(checked, state, "found", {name: new[name] for name in checked})


def check_schedules(hparams: Hparams, state: Structure) -> OrderedDict[str, Structure]:
    """The state itself; an error ends the round if a schedule has left its range."""
    scheduled = OrderedDict((name, one) for name, one in hparams.items() if one.is_scheduled)
    return _checked(scheduled, state, "its schedule gives", {})


def _checked(
    hparams: Hparams, state: Structure, verb: str, new: State
) -> OrderedDict[str, Structure]:
    found = OrderedDict(state.items() if isinstance(state, Mapping) else state._asdict())
    found.update(new)
    if not hparams:
        return found
    holds, message = tf.constant(True), []
    for name, one in hparams.items():
        holds &= one.range.holds(found[name])
        message += [f"`{name}` must be {one.range}; {verb}", found[name]]
    return checks.asserted(holds, message, found)
