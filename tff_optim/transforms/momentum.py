"""Transforms that average gradients over steps."""

import attrs
import tensorflow as tf

from tff_optim import hyperparameters
from tff_optim.core.types import Rate
from tff_optim.transforms.elementwise import ElementwiseTransform, Scalars, Tensors


@attrs.frozen
class Momentum(ElementwiseTransform):
    """Adds up gradients with weights that fall with their age.

    `v = beta v + g`; the result is `v`, or `beta v + g` with `nesterov`. `g` is the gradient, `v`
    the velocity (0 at first), kept in the state under `velocity` with the gradients' dtypes. As
    in declearn and PyTorch, `g` is not scaled by `1 - beta`.

    Attributes:
      beta: The share of the velocity that each step keeps; a number in [0, 1) or a Keras schedule.
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

    beta: Rate = hyperparameters.fraction(0.9)
    nesterov: bool = hyperparameters.flag(False)

    slots = ("velocity",)

    def rule(self, scalars: Scalars, gradient: tf.Tensor, *slots: tf.Tensor) -> Tensors:
        """See base class."""
        velocity = scalars["beta"] * slots[0] + gradient
        return (scalars["beta"] * velocity + gradient if self.nesterov else velocity), velocity


@attrs.frozen
class EWMA(ElementwiseTransform):
    """Replaces gradients by their exponentially weighted moving average.

    `s = beta s + (1 - beta) g`; the result is `s`. `g` is the gradient, `s` the average (0 at
    first, not corrected for that), kept in the state under `average` with the gradients' dtypes.

    Attributes:
      beta: The share of the average that each step keeps; a number in [0, 1) or a Keras schedule.

    Example:
      >>> ewma = EWMA(beta=0.75)
      >>> state = ewma.initialize(tf.TensorSpec([]))
      >>> ewma.next(state, tf.zeros([]), tf.ones([]))[1].numpy()
      0.25
    """

    beta: Rate = hyperparameters.fraction(0.9)

    slots = ("average",)

    def rule(self, scalars: Scalars, gradient: tf.Tensor, *slots: tf.Tensor) -> Tensors:
        """See base class."""
        average = slots[0] + (1 - scalars["beta"]) * (gradient - slots[0])
        return average, average


@attrs.frozen
class YogiMomentum(ElementwiseTransform):
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

    beta: Rate = hyperparameters.fraction(0.9)

    slots = ("average",)

    def rule(self, scalars: Scalars, gradient: tf.Tensor, *slots: tf.Tensor) -> Tensors:
        """See base class."""
        average = slots[0] - tf.sign(slots[0] - gradient) * (1 - scalars["beta"]) * gradient
        return average, average
