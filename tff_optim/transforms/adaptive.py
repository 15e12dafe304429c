"""Transforms that divide gradients by their size over past steps."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import tensorflow as tf

from tff_optim import hyperparameters, leaves
from tff_optim.transforms.interface import GradientTransform


@attrs.frozen
class Adagrad(GradientTransform):
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

    epsilon: Any = hyperparameters.positive(1e-7)

    def initialize(self, specs: Any) -> Any:
        """See base class."""
        state = hyperparameters.initialize(self)
        state["square_sum"] = leaves.zeros(specs)
        return state

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """See base class."""
        del weights  # The rule looks at gradients alone.
        hyperparameters.check_state(self, state, slots=("square_sum",))
        values = hyperparameters.current(self, state)

        def step(g: tf.Tensor, square_sum: tf.Tensor) -> tuple[tf.Tensor, ...]:
            square_sum += tf.square(g)
            epsilon = leaves.number(values["epsilon"], g.dtype)
            return g / (tf.sqrt(square_sum) + epsilon), square_sum

        gradients, slots = leaves.map_leaves(step, gradients, {"square_sum": state["square_sum"]})
        return hyperparameters.advance(self, state) | slots, gradients


@attrs.frozen
class RMSProp(GradientTransform):
    """Divides gradients by the root of the moving average of their squares.

    `s = beta s + (1 - beta) g^2`; the result is `g / (sqrt(s) + epsilon)`. `g` is the gradient,
    `s` the average (0 at first, not corrected for that), kept in the state under `square_average`
    with the gradients' dtypes.

    Attributes:
      beta: What stays of the average each step; a number in [0, 1) or a Keras schedule.
      epsilon: A number greater than 0, or a Keras schedule, that keeps the division finite.

    Example:
      >>> rms_prop = RMSProp(beta=0.75)
      >>> state = rms_prop.initialize(tf.TensorSpec([]))
      >>> round(float(rms_prop.next(state, tf.zeros([]), tf.constant(-7.0))[1]), 5)
      -2.0

    Tieleman and Hinton, "Lecture 6.5: RMSProp", 2012.
    """

    beta: Any = hyperparameters.fraction(0.9)
    epsilon: Any = hyperparameters.positive(1e-7)

    def initialize(self, specs: Any) -> Any:
        """See base class."""
        state = hyperparameters.initialize(self)
        state["square_average"] = leaves.zeros(specs)
        return state

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """See base class."""
        del weights  # The rule looks at gradients alone.
        hyperparameters.check_state(self, state, slots=("square_average",))
        values = hyperparameters.current(self, state)

        def step(g: tf.Tensor, average: tf.Tensor) -> tuple[tf.Tensor, ...]:
            average += (1 - leaves.number(values["beta"], g.dtype)) * (tf.square(g) - average)
            return g / (tf.sqrt(average) + leaves.number(values["epsilon"], g.dtype)), average

        slots = {"square_average": state["square_average"]}
        gradients, new_slots = leaves.map_leaves(step, gradients, slots)
        return hyperparameters.advance(self, state) | new_slots, gradients


@attrs.frozen
class Adam(GradientTransform):
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
      beta_1: What stays of `m` each step; a number in [0, 1) or a Keras schedule.
      beta_2: What stays of `v` each step; likewise.
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

    beta_1: Any = hyperparameters.fraction(0.9)
    beta_2: Any = hyperparameters.fraction(0.99)
    epsilon: Any = hyperparameters.positive(1e-7)
    amsgrad: bool = hyperparameters.flag(False)

    def initialize(self, specs: Any) -> Any:
        """See base class."""
        return _initialize_moments(self, specs)

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """See base class."""
        del weights  # The rule looks at gradients alone.

        def average(v: tf.Tensor, square: tf.Tensor, move: tf.Tensor) -> tf.Tensor:
            return v + move * (square - v)

        return _next_moments(self, state, gradients, average)


@attrs.frozen
class Yogi(GradientTransform):
    """Adam, with a second moment that moves by the size of the squared gradient.

    As `Adam`, but `v = v - sign(v - g^2) (1 - beta_2) g^2`.

    Attributes:
      beta_1: What stays of `m` each step; a number in [0, 1) or a Keras schedule.
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

    beta_1: Any = hyperparameters.fraction(0.9)
    beta_2: Any = hyperparameters.fraction(0.99)
    epsilon: Any = hyperparameters.positive(1e-7)
    amsgrad: bool = hyperparameters.flag(False)

    def initialize(self, specs: Any) -> Any:
        """See base class."""
        return _initialize_moments(self, specs)

    def next(self, state: Any, weights: Any, gradients: Any) -> tuple[Any, Any]:
        """See base class."""
        del weights  # The rule looks at gradients alone.

        def average(v: tf.Tensor, square: tf.Tensor, move: tf.Tensor) -> tf.Tensor:
            return v - tf.sign(v - square) * move * square

        return _next_moments(self, state, gradients, average)


def _initialize_moments(part: Adam | Yogi, specs: Any) -> Any:
    state = hyperparameters.initialize(part, counts_steps=True)
    state["average"] = leaves.zeros(specs)
    state["square_average"] = leaves.zeros(specs)
    if part.amsgrad:
        state["square_maximum"] = leaves.zeros(specs)
    return state


def _next_moments(
    part: Adam | Yogi,
    state: Mapping[str, Any],
    gradients: Any,
    average_squares: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor],
) -> tuple[Any, Any]:
    names = ("average", "square_average") + ("square_maximum",) * part.amsgrad
    hyperparameters.check_state(part, state, slots=names, counts_steps=True)
    values = hyperparameters.current(part, state)
    carried = hyperparameters.advance(part, state)
    t = tf.cast(carried[hyperparameters.STEP], tf.float64)

    @functools.cache  # once per dtype, not per leaf
    def factors(dtype: tf.DType) -> list[tf.Tensor]:
        # In float64: `1 - beta^t` loses its digits to cancellation when beta is close to 1. As
        # factors: two divisions less for each element.
        betas = [values["beta_1"], values["beta_2"]]
        corrections = [1 / (1 - tf.pow(leaves.number(beta, tf.float64), t)) for beta in betas]
        moves = [1 - leaves.number(beta, dtype) for beta in betas]
        return [*moves, *(leaves.number(x, dtype) for x in (*corrections, values["epsilon"]))]

    def step(
        g: tf.Tensor, m: tf.Tensor, v: tf.Tensor, *maximum: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        move_1, move_2, correction_1, correction_2, epsilon = factors(g.dtype)
        m += move_1 * (g - m)
        v = average_squares(v, tf.square(g), move_2)
        corrected = v * correction_2
        if maximum:
            corrected = tf.maximum(corrected, maximum[0])
            maximum = (corrected,)
        return m * correction_1 / (tf.sqrt(corrected) + epsilon), m, v, *maximum

    slots = {name: state[name] for name in names}
    gradients, new_slots = leaves.map_leaves(step, gradients, slots)
    return carried | new_slots, gradients
