"""Transforms that average gradients over steps."""

from typing import Any

import attrs
import tensorflow as tf

from tff_optim import hyperparameters, leaves
from tff_optim.transforms.interface import GradientTransform


@attrs.frozen
class Momentum(GradientTransform):
    """Adds up gradients, the older the less.

    `v = beta v + g`; the result is `v`, or `beta v + g` with `nesterov`. `g` is the gradient, `v`
    the velocity (0 at first), kept in the state under `velocity` with the gradients' dtypes. As
    in declearn and PyTorch, `g` is not scaled by `1 - beta`.

    Attributes:
      beta: What stays of the velocity each step; a number in [0, 1) or a Keras schedule.
      nesterov: Whether to look ahead by one more step.

    Example:
      >>> momentum = Momentum(beta=0.5)
      >>> state = momentum.initialize(tf.TensorSpec([]))
      >>> for _ in range(2):
      ...     state, gradient = momentum.next(state, tf.zeros([]), tf.ones([]))
      >>> gradient.numpy()
      1.5

    Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
    """

    beta: Any = hyperparameters.fraction(0.9)
    nesterov: bool = hyperparameters.flag(False)

    def initialize(self, specs: Any) -> Any:
        """See base class."""
        state = hyperparameters.initialize(self)
        state["velocity"] = leaves.zeros(specs)
        return state

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """See base class."""
        del weights  # The rule looks at gradients alone.
        hyperparameters.check_state(self, state, slots=("velocity",))
        values = hyperparameters.current(self, state)

        def step(g: tf.Tensor, velocity: tf.Tensor) -> tuple[tf.Tensor, ...]:
            beta = leaves.number(values["beta"], g.dtype)
            velocity = beta * velocity + g
            return (beta * velocity + g if self.nesterov else velocity), velocity

        gradients, slots = leaves.map_leaves(step, gradients, {"velocity": state["velocity"]})
        return hyperparameters.advance(self, state) | slots, gradients


@attrs.frozen
class EWMA(GradientTransform):
    """Replaces gradients by their exponentially weighted moving average.

    `s = beta s + (1 - beta) g`; the result is `s`. `g` is the gradient, `s` the average (0 at
    first, not corrected for that), kept in the state under `average` with the gradients' dtypes.

    Attributes:
      beta: What stays of the average each step; a number in [0, 1) or a Keras schedule.

    Example:
      >>> ewma = EWMA(beta=0.75)
      >>> state = ewma.initialize(tf.TensorSpec([]))
      >>> ewma.next(state, tf.zeros([]), tf.ones([]))[1].numpy()
      0.25
    """

    beta: Any = hyperparameters.fraction(0.9)

    def initialize(self, specs: Any) -> Any:
        """See base class."""
        state = hyperparameters.initialize(self)
        state["average"] = leaves.zeros(specs)
        return state

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """See base class."""
        del weights  # The rule looks at gradients alone.
        hyperparameters.check_state(self, state, slots=("average",))
        values = hyperparameters.current(self, state)

        def step(g: tf.Tensor, average: tf.Tensor) -> tuple[tf.Tensor, ...]:
            beta = leaves.number(values["beta"], g.dtype)
            average += (1 - beta) * (g - average)
            return average, average

        gradients, slots = leaves.map_leaves(step, gradients, {"average": state["average"]})
        return hyperparameters.advance(self, state) | slots, gradients


@attrs.frozen
class YogiMomentum(GradientTransform):
    """An average of gradients that moves by the size of the gradient, not of the difference.

    `s = s - sign(s - g) (1 - beta) g`; the result is `s`. `g` is the gradient, `s` the average
    (0 at first), kept in the state under `average` with the gradients' dtypes. It was made for
    squared gradients (see `Yogi`); for gradients of both signs it follows the equation literally.

    Attributes:
      beta: A number in [0, 1) or a Keras schedule; `1 - beta` is the size of a move.

    Example:
      >>> yogi = YogiMomentum(beta=0.75)
      >>> state = yogi.initialize(tf.TensorSpec([]))
      >>> yogi.next(state, tf.zeros([]), tf.ones([]))[1].numpy()
      0.25

    Zaheer et al., "Adaptive methods for nonconvex optimization", 2018.
    """

    beta: Any = hyperparameters.fraction(0.9)

    def initialize(self, specs: Any) -> Any:
        """See base class."""
        state = hyperparameters.initialize(self)
        state["average"] = leaves.zeros(specs)
        return state

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """See base class."""
        del weights  # The rule looks at gradients alone.
        hyperparameters.check_state(self, state, slots=("average",))
        values = hyperparameters.current(self, state)

        def step(g: tf.Tensor, average: tf.Tensor) -> tuple[tf.Tensor, ...]:
            beta = leaves.number(values["beta"], g.dtype)
            average -= tf.sign(average - g) * (1 - beta) * g
            return average, average

        gradients, slots = leaves.map_leaves(step, gradients, {"average": state["average"]})
        return hyperparameters.advance(self, state) | slots, gradients
