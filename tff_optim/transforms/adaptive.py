"""Transforms that divide gradients by their size over past steps."""

import abc
from collections.abc import Mapping

import attrs
import tensorflow as tf

from tff_optim import hyperparameters
from tff_optim.core import leaves
from tff_optim.core.types import Number, Rate
from tff_optim.transforms.elementwise import ElementwiseTransform, Scalars, Tensors


@attrs.frozen
class Adagrad(ElementwiseTransform):
    """Divides gradients by the root of their summed squares.

    `s = s + g^2`; the result is `g / (sqrt(s) + epsilon)`. `g` is the gradient, `s` the sum (0 at
    first, unlike Keras' 0.1), kept in the state under `square_sum` with the gradients' dtypes.

    Attributes:
      epsilon: A number greater than 0, or a Keras schedule, that keeps the division finite.

    Example:
      >>> adagrad = Adagrad()
      >>> state = adagrad.initialize(tf.TensorSpec([]))
      >>> round(float(adagrad.next(state, tf.zeros([]), tf.constant(-7.0))[1]), 5)
      -1.0

    Duchi et al., "Adaptive subgradient methods", 2011.
    """

    epsilon: Rate = hyperparameters.positive(1e-7)

    slots = ("square_sum",)

    def rule(self, scalars: Scalars, gradient: tf.Tensor, *slots: tf.Tensor) -> Tensors:
        """See base class."""
        square_sum = slots[0] + tf.square(gradient)
        return gradient / (tf.sqrt(square_sum) + scalars["epsilon"]), square_sum


@attrs.frozen
class RMSProp(ElementwiseTransform):
    """Divides gradients by the root of the moving average of their squares.

    `s = beta s + (1 - beta) g^2`; the result is `g / (sqrt(s) + epsilon)`. `g` is the gradient,
    `s` the average (0 at first, not corrected for that), kept in the state under `square_average`
    with the gradients' dtypes.

    Attributes:
      beta: The share of the average that each step keeps; a number in [0, 1) or a Keras schedule.
      epsilon: A number greater than 0, or a Keras schedule, that keeps the division finite.

    Example:
      >>> rms_prop = RMSProp(beta=0.75)
      >>> state = rms_prop.initialize(tf.TensorSpec([]))
      >>> round(float(rms_prop.next(state, tf.zeros([]), tf.constant(-7.0))[1]), 5)
      -2.0

    Tieleman and Hinton, "Lecture 6.5: RMSProp", 2012.
    """

    beta: Rate = hyperparameters.fraction(0.9)
    epsilon: Rate = hyperparameters.positive(1e-7)

    slots = ("square_average",)

    def rule(self, scalars: Scalars, gradient: tf.Tensor, *slots: tf.Tensor) -> Tensors:
        """See base class."""
        average = slots[0] + (1 - scalars["beta"]) * (tf.square(gradient) - slots[0])
        return gradient / (tf.sqrt(average) + scalars["epsilon"]), average


@attrs.frozen
class _Moments(ElementwiseTransform):
    """The base of `Adam` and `Yogi`, which differ in the update of the second moment."""

    beta_1: Rate = hyperparameters.fraction(0.9)
    beta_2: Rate = hyperparameters.fraction(0.99)
    epsilon: Rate = hyperparameters.positive(1e-7)
    amsgrad: bool = hyperparameters.flag(False)

    counts_steps = True

    @property
    def slots(self) -> tuple[str, ...]:
        """See base class."""
        return ("average", "square_average") + ("square_maximum",) * self.amsgrad

    @abc.abstractmethod
    def average_squares(self, v: tf.Tensor, square: tf.Tensor, move: tf.Tensor) -> tf.Tensor:
        """The next second moment, from `v`, the squared gradient and `1 - beta_2`."""

    def scalars(
        self, values: Mapping[str, Number], step: tf.Tensor | None, dtype: tf.DType
    ) -> dict[str, tf.Tensor]:
        """See base class."""
        # In float64: `1 - beta^t` loses its digits to cancellation when beta is close to 1. As
        # factors: two divisions less for each element.
        found = {"epsilon": leaves.number(values["epsilon"], dtype)}
        for i in (1, 2):
            beta = values[f"beta_{i}"]
            correction = 1 / (1 - tf.pow(leaves.number(beta, tf.float64), step))
            found[f"move_{i}"] = 1 - leaves.number(beta, dtype)
            found[f"correction_{i}"] = leaves.number(correction, dtype)
        return found

    def rule(self, scalars: Scalars, gradient: tf.Tensor, *slots: tf.Tensor) -> Tensors:
        """See base class."""
        m, v, *maximum = slots
        m += scalars["move_1"] * (gradient - m)
        v = self.average_squares(v, tf.square(gradient), scalars["move_2"])
        corrected = v * scalars["correction_2"]
        if maximum:
            corrected = tf.maximum(corrected, maximum[0])
            maximum = [corrected]
        result = m * scalars["correction_1"] / (tf.sqrt(corrected) + scalars["epsilon"])
        return result, m, v, *maximum


@attrs.frozen
class Adam(_Moments):
    """Divides the average of gradients by the root of the average of their squares.

    With `g` the gradient, `t` the number of this step (from 1), `m` and `v` 0 at first:

        m = beta_1 m + (1 - beta_1) g;    v = beta_2 v + (1 - beta_2) g^2
        mh = m / (1 - beta_1^t);          vh = v / (1 - beta_2^t)
        amsgrad: vh = max(vh, vmax);      vmax = vh
        result = mh / (sqrt(vh) + epsilon)

    The state holds them under `average`, `square_average` and, with `amsgrad`, `square_maximum`,
    in the gradients' dtypes, and `step`. Keras scales epsilon by the bias correction of `v`, and
    its `beta_2` is 0.999 by default, not declearn's 0.99, which is taken here.

    Attributes:
      beta_1: The share of `m` that each step keeps; a number in [0, 1) or a Keras schedule.
      beta_2: The share of `v` that each step keeps; likewise.
      epsilon: A number greater than 0, or a Keras schedule, that keeps the division finite.
      amsgrad: Whether the divisor may only grow.

    Example:
      >>> adam = Adam()
      >>> state = adam.initialize(tf.TensorSpec([]))
      >>> round(float(adam.next(state, tf.zeros([]), tf.constant(-7.0))[1]), 5)
      -1.0

    Kingma and Ba, "Adam: a method for stochastic optimization", 2014; Reddi et al., "On the
    convergence of Adam and beyond", 2018 (AMSGrad).
    """

    def average_squares(self, v: tf.Tensor, square: tf.Tensor, move: tf.Tensor) -> tf.Tensor:
        """See base class."""
        return v + move * (square - v)


@attrs.frozen
class Yogi(_Moments):
    """Adam, with a second moment that moves by the size of the squared gradient.

    As `Adam`, but `v = v - sign(v - g^2) (1 - beta_2) g^2`.

    Attributes:
      beta_1: The share of `m` that each step keeps; a number in [0, 1) or a Keras schedule.
      beta_2: `1 - beta_2` is the size of a move of `v`; likewise.
      epsilon: A number greater than 0, or a Keras schedule, that keeps the division finite.
      amsgrad: Whether the divisor may only grow.

    Example:
      >>> yogi = Yogi()
      >>> state = yogi.initialize(tf.TensorSpec([]))
      >>> round(float(yogi.next(state, tf.zeros([]), tf.constant(-7.0))[1]), 5)
      -1.0

    Zaheer et al., "Adaptive methods for nonconvex optimization", 2018.
    """

    def average_squares(self, v: tf.Tensor, square: tf.Tensor, move: tf.Tensor) -> tf.Tensor:
        """See base class."""
        return v - tf.sign(v - square) * move * square
