"""Learning-rate schedules that Keras does not have.

Each is a `tf.keras.optimizers.schedules.LearningRateSchedule`: a learning rate, a weight decay or a
hyper-parameter of a pipeline, or the learning rate of a Keras optimizer. `t` is the number of steps
taken before: 0 in the first step.
"""

import math
from typing import Any

import tensorflow as tf

from tff_optim.core.messages import shown
from tff_optim.core.numbers import NON_NEGATIVE, POSITIVE, Interval, checked_number
from tff_optim.core.tracing import as_written

__all__ = ["CosineRestarts", "InverseScaling", "Triangular", "Warmup"]


class _Schedule(tf.keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that holds its arguments and computes in float32."""

    def __init__(self, **arguments: Any):
        self._arguments = arguments

    def _check(self, name: str, allowed: Interval) -> float:
        value = checked_number(type(self).__name__, name, self._arguments[name], allowed)
        self._arguments[name] = value
        return value

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return dict(self._arguments)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments.items())
        return f"{type(self).__name__}({arguments})"


class InverseScaling(_Schedule):
    """`rate / (t + 1)^power`.

    Args:
      rate: The first rate; a number of at least 0.
      power: A number of at least 0.

    Example:
      >>> InverseScaling(1.0, 0.5)(3).numpy()
      0.5
    """

    def __init__(self, rate: float, power: float):
        super().__init__(rate=rate, power=power)
        self._rate = self._check("rate", NON_NEGATIVE)
        self._power = self._check("power", NON_NEGATIVE)

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate after `step` steps."""
        return self._rate / tf.pow(tf.cast(step, tf.float32) + 1.0, self._power)


class CosineRestarts(_Schedule):
    """`lowest + (highest factor^c - lowest) (1 + cos(pi u / period)) / 2`, a decay that starts again.

    `c` and `u` are quotient and remainder of `t / period`. Unlike Keras' `CosineDecayRestarts`,
    periods are of one length, and `lowest` stays what it is.

    Args:
      lowest: The rate that every period decays to; a number of at least 0.
      highest: The first rate; likewise.
      period: The steps of a period; a number greater than 0.
      factor: What the highest rate is multiplied by in each restart; a number of at least 0.

    Example:
      >>> [round(float(CosineRestarts(0.0, 1.0, 2, 0.5)(t)), 3) for t in range(4)]
      [1.0, 0.5, 0.5, 0.25]

    Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2016.
    """

    def __init__(self, lowest: float, highest: float, period: float, factor: float = 1.0):
        super().__init__(lowest=lowest, highest=highest, period=period, factor=factor)
        self._lowest = self._check("lowest", NON_NEGATIVE)
        self._highest = self._check("highest", NON_NEGATIVE)
        self._period = self._check("period", POSITIVE)
        self._factor = self._check("factor", NON_NEGATIVE)

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate after `step` steps."""
        step = tf.cast(step, tf.float32)
        cycle = tf.floor(step / self._period)
        phase = (step - cycle * self._period) / self._period
        highest = self._highest * tf.pow(self._factor, cycle)
        return self._lowest + 0.5 * (highest - self._lowest) * (1.0 + tf.cos(math.pi * phase))


class Triangular(_Schedule):
    """`d^t (lowest + s f^c (highest - lowest))`: up and down in straight lines.

    `c` and `u` are quotient and remainder of `t / (2 half)`, and `s = 1 - |u / half - 1|`.

    Args:
      lowest: The rate at the ends of a cycle; a number of at least 0.
      highest: The rate in its middle; likewise.
      half: The steps of half a cycle; a number greater than 0.
      cycle_factor: `f`, by which the height shrinks in each cycle; a number of at least 0.
      step_factor: `d`, by which all shrinks in each step; likewise.

    Example:
      >>> [float(Triangular(0.0, 1.0, 2)(t)) for t in range(5)]
      [0.0, 0.5, 1.0, 0.5, 0.0]

    Smith, "Cyclical learning rates for training neural networks", 2017.
    """

    def __init__(
        self,
        lowest: float,
        highest: float,
        half: float,
        cycle_factor: float = 1.0,
        step_factor: float = 1.0,
    ):
        super().__init__(
            lowest=lowest,
            highest=highest,
            half=half,
            cycle_factor=cycle_factor,
            step_factor=step_factor,
        )
        self._lowest = self._check("lowest", NON_NEGATIVE)
        self._highest = self._check("highest", NON_NEGATIVE)
        self._half = self._check("half", POSITIVE)
        self._cycle_factor = self._check("cycle_factor", NON_NEGATIVE)
        self._step_factor = self._check("step_factor", NON_NEGATIVE)

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate after `step` steps."""
        step = tf.cast(step, tf.float32)
        cycle = tf.floor(step / (2 * self._half))
        position = step - cycle * 2 * self._half
        height = (1.0 - tf.abs(position / self._half - 1.0)) * tf.pow(self._cycle_factor, cycle)
        rate = self._lowest + height * (self._highest - self._lowest)
        return rate * tf.pow(self._step_factor, step)


class Warmup(_Schedule):
    """`first (t + 1) / steps` for the first steps, then another schedule from its beginning.

    Args:
      first: The rate that the warm-up leads to; a number of at least 0.
      steps: The steps of the warm-up; a whole number greater than 0.
      then: The schedule that follows, of `t - steps`; None to stay at `first`.

    Example:
      >>> [float(Warmup(1.0, 2)(t)) for t in range(4)]
      [0.5, 1.0, 1.0, 1.0]
    """

    def __init__(self, first: float, steps: int, then: Any = None):
        super().__init__(first=first, steps=steps, then=then)
        self._first = self._check("first", NON_NEGATIVE)
        self._steps = self._check("steps", POSITIVE)
        self._arguments["steps"] = int(self._steps)
        if self._steps != int(self._steps):
            raise ValueError(f"`steps` of `Warmup` must be a whole number; found {shown(steps)}.")
        schedule = tf.keras.optimizers.schedules.LearningRateSchedule
        if then is not None and not isinstance(then, schedule):
            raise TypeError(f"`then` of `Warmup` must be a schedule or None; found {shown(then)}.")
        self._then = then

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate after `step` steps."""
        step = tf.convert_to_tensor(step)
        warm = self._first * (tf.cast(step, tf.float32) + 1.0) / self._steps
        # A warm-up may be longer than the steps that their dtype can count.
        steps = tf.constant(min(int(self._steps), step.dtype.max), step.dtype)
        later = tf.maximum(step - steps, tf.zeros([], step.dtype))
        after = (
            self._first
            if self._then is None
            else tf.cast(as_written(self._then)(later), tf.float32)
        )
        return tf.where(tf.cast(step, tf.float32) < self._steps, warm, after)
