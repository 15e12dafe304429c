"""Learning-rate schedules that Keras does not have.

Each is a `tf.keras.optimizers.schedules.LearningRateSchedule`: a learning rate, a weight decay or a
hyper-parameter of a pipeline, or the learning rate of a Keras optimizer. `t` is the number of steps
taken before: 0 in the first step.
"""

import math

import attrs
import tensorflow as tf

from tff_optim.core import comparison, numbers
from tff_optim.core.messages import refusal, shown
from tff_optim.core.numbers import NON_NEGATIVE, POSITIVE, constant
from tff_optim.core.tracing import converted
from tff_optim.core.types import Named, Number

__all__ = ["CosineRestarts", "InverseScaling", "Triangular", "Warmup"]


class _Schedule(tf.keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that computes in float32, of arguments that are its fields."""

    def get_config(self) -> Named:
        """The arguments."""
        return attrs.asdict(self, recurse=False)


@attrs.frozen
class InverseScaling(_Schedule):
    """`rate / (t + 1)^power`.

    Attributes:
      rate: The first rate; a number of at least 0.
      power: A number of at least 0.

    Example:
      >>> InverseScaling(1.0, 0.5)(3).numpy()
      0.5
    """

    rate: float = constant(NON_NEGATIVE)
    power: float = constant(NON_NEGATIVE)

    def __call__(self, step: Number) -> tf.Tensor:
        """The rate after `step` steps."""
        return self.rate / tf.pow(tf.cast(step, tf.float32) + 1.0, self.power)


@attrs.frozen
class CosineRestarts(_Schedule):
    """`lowest + (highest factor^c - lowest) (1 + cos(pi u / period)) / 2`, a decay that starts again.

    `c` and `u` are quotient and remainder of `t / period`. Unlike Keras' `CosineDecayRestarts`,
    all periods have one length, and `lowest` does not change.

    Attributes:
      lowest: The rate that every period decays to; a number of at least 0.
      highest: The first rate; likewise.
      period: The steps of a period; a number greater than 0.
      factor: The factor of the highest rate in each restart; a number of at least 0.

    Example:
      >>> [round(float(CosineRestarts(0.0, 1.0, 2, 0.5)(t)), 3) for t in range(4)]
      [1.0, 0.5, 0.5, 0.25]

    Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2016.
    """

    lowest: float = constant(NON_NEGATIVE)
    highest: float = constant(NON_NEGATIVE)
    period: float = constant(POSITIVE)
    factor: float = constant(NON_NEGATIVE, 1.0)

    def __call__(self, step: Number) -> tf.Tensor:
        """The rate after `step` steps."""
        step = tf.cast(step, tf.float32)
        cycle = tf.floor(step / self.period)
        phase = (step - cycle * self.period) / self.period
        highest = self.highest * tf.pow(self.factor, cycle)
        return self.lowest + 0.5 * (highest - self.lowest) * (1.0 + tf.cos(math.pi * phase))


@attrs.frozen
class Triangular(_Schedule):
    """`d^t (lowest + s f^c (highest - lowest))`: up and down in straight lines.

    `c` and `u` are quotient and remainder of `t / (2 half)`, and `s = 1 - |u / half - 1|`.

    Attributes:
      lowest: The rate at the ends of a cycle; a number of at least 0.
      highest: The rate in its middle; likewise.
      half: The steps of half a cycle; a number greater than 0.
      cycle_factor: `f`, by which the height shrinks in each cycle; a number of at least 0.
      step_factor: `d`, by which the rate shrinks in each step; likewise.

    Example:
      >>> [float(Triangular(0.0, 1.0, 2)(t)) for t in range(5)]
      [0.0, 0.5, 1.0, 0.5, 0.0]

    Smith, "Cyclical learning rates for training neural networks", 2017.
    """

    lowest: float = constant(NON_NEGATIVE)
    highest: float = constant(NON_NEGATIVE)
    half: float = constant(POSITIVE)
    cycle_factor: float = constant(NON_NEGATIVE, 1.0)
    step_factor: float = constant(NON_NEGATIVE, 1.0)

    def __call__(self, step: Number) -> tf.Tensor:
        """The rate after `step` steps."""
        step = tf.cast(step, tf.float32)
        cycle = tf.floor(step / (2 * self.half))
        position = step - cycle * 2 * self.half
        height = (1.0 - tf.abs(position / self.half - 1.0)) * tf.pow(self.cycle_factor, cycle)
        rate = self.lowest + height * (self.highest - self.lowest)
        return rate * tf.pow(self.step_factor, step)


@attrs.frozen
class Warmup(_Schedule):
    """`first (t + 1) / steps` for the first steps, then another schedule from its beginning.

    Attributes:
      first: The rate that the warm-up leads to; a number of at least 0.
      steps: The steps of the warm-up; a whole number greater than 0.
      then: The schedule that follows, of `t - steps`; None to stay at `first`.

    Example:
      >>> [float(Warmup(1.0, 2)(t)) for t in range(4)]
      [0.5, 1.0, 1.0, 1.0]
    """

    first: float = constant(NON_NEGATIVE)
    steps: int = constant(POSITIVE)
    then: tf.keras.optimizers.schedules.LearningRateSchedule | None = attrs.field(
        default=None, eq=comparison.key
    )

    def __attrs_post_init__(self) -> None:
        if self.steps != int(self.steps):
            raise refusal("`steps` of `Warmup`", "be a whole number", shown(self.steps))
        object.__setattr__(self, "steps", int(self.steps))
        if self.then is not None and not isinstance(self.then, numbers.Schedule):
            raise refusal(
                "`then` of `Warmup`", "be a schedule or None", shown(self.then), error=TypeError
            )

    def __call__(self, step: Number) -> tf.Tensor:
        """The rate after `step` steps."""
        step = tf.convert_to_tensor(step)
        warm = self.first * (tf.cast(step, tf.float32) + 1.0) / self.steps
        # A warm-up may be longer than the steps that their dtype can count.
        steps = tf.constant(min(self.steps, step.dtype.max), step.dtype)
        later = tf.maximum(step - steps, tf.zeros([], step.dtype))
        after = (
            self.first if self.then is None else tf.cast(converted(self.then)(later), tf.float32)
        )
        return tf.where(tf.cast(step, tf.float32) < self.steps, warm, after)
