"""Numbers of a rule that may change from round to round: checked when given, and when set."""

import json
import math
import numbers
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias

import attrs
import tensorflow as tf

from aggregators.core.checks import only_if

Schedule: TypeAlias = tf.keras.optimizers.schedules.LearningRateSchedule
Number: TypeAlias = float | Schedule


def comparable(value: Any) -> Any:
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
      least: The least value.
      most: The largest; infinity for any finite number.
      above: Whether the least value itself is left out.
      below: Whether the largest is.
    """

    value: float | Schedule = attrs.field(eq=comparable)
    least: float = attrs.field(default=-math.inf, repr=False)
    most: float = attrs.field(default=math.inf, repr=False)
    above: bool = attrs.field(default=False, repr=False)
    below: bool = attrs.field(default=False, repr=False)

    @property
    def is_scheduled(self) -> bool:
        """Whether it follows a schedule."""
        return isinstance(self.value, tf.keras.optimizers.schedules.LearningRateSchedule)

    @property
    def range(self) -> str:
        """The range in words."""
        ends = []
        if self.least > -math.inf:
            ends.append(f"{'above' if self.above else 'of at least'} {self.least:g}")
        if self.most < math.inf:
            ends.append(f"{'below' if self.below else 'of at most'} {self.most:g}")
        return " ".join(["a finite number", " and ".join(ends)]).strip()

    def at(self, round_number: Any) -> tf.Tensor:
        """The value in a round: a float64 scalar; `check_schedules` tells where one leaves the range."""
        if not self.is_scheduled:
            return tf.constant(self.value, tf.float64)
        # In a function, since schedules branch in Python, and compare tensors with `==`.
        return tf.cast(tf.function(self.value)(round_number), tf.float64)

    def holds(self, value: Any) -> Any:
        """Whether a Python number or a tensor lies in the range."""
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low & high & (abs(value) < math.inf)


def hparam(
    argument: str,
    value: Any,
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
      value: A number, or a Keras schedule over rounds.
      least: As in `Hparam`.
      most: As in `Hparam`.
      above: As in `Hparam`.
      below: As in `Hparam`.
      hint: What to do instead, after the message.

    Returns:
      An `Hparam`.

    Raises:
      ValueError: If the value is neither, or out of its range.

    Example:
      >>> hparam("q", 0.5, 0.0).value
      0.5
    """
    found = Hparam(value, least, most, above, below)
    if found.is_scheduled:
        with tf.init_scope():
            first = float(found.at(tf.constant(0)))  # as a rule's state asks it
        if not found.holds(first):
            raise ValueError(
                f"`{argument}` must be {found.range}; found a schedule that starts at {first:g}."
            )
        return found
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not found.holds(float(value)):
        raise ValueError(
            f"`{argument}` must be {found.range}; found {value!r}.{hint and ' ' + hint}"
        )
    return attrs.evolve(found, value=float(value))


def values(hparams: Mapping[str, Hparam], round_number: Any) -> OrderedDict[str, tf.Tensor]:
    """What a rule's state holds of its numbers in this round."""
    return OrderedDict((name, one.at(round_number)) for name, one in hparams.items())


def settable(hparams: Mapping[str, Hparam]) -> OrderedDict[str, Hparam]:
    """Those that no schedule decides: a process's hyperparameters."""
    return OrderedDict((name, one) for name, one in hparams.items() if not one.is_scheduled)


def read(hparams: Mapping[str, Hparam], state: Any) -> OrderedDict[str, Any]:
    """The hyperparameters in a state."""
    return OrderedDict((name, state[name]) for name in settable(hparams))


def write(hparams: Mapping[str, Hparam], state: Any, new: Any) -> OrderedDict[str, Any]:
    """The state with these hyperparameters; ends the computation where one is out of its range."""
    found = OrderedDict(state.items() if isinstance(state, Mapping) else state._asdict())
    checked = settable(hparams)
    found.update((name, new[name]) for name in checked)
    return _checked(checked, found, "found")


def check_schedules(hparams: Mapping[str, Hparam], state: Any) -> OrderedDict[str, Any]:
    """The state as it is; ends the round where a schedule has left the range of its number."""
    found = OrderedDict(state.items() if isinstance(state, Mapping) else state._asdict())
    scheduled = OrderedDict((name, one) for name, one in hparams.items() if one.is_scheduled)
    return _checked(scheduled, found, "its schedule gives")


def _checked(
    hparams: Mapping[str, Hparam], state: OrderedDict[str, Any], verb: str
) -> OrderedDict[str, Any]:
    if not hparams:
        return state
    holds, message = tf.constant(True), []
    for name, one in hparams.items():
        holds &= one.holds(state[name])
        message += [f"`{name}` must be {one.range}; {verb}", state[name]]
    return only_if(holds, message, state)
