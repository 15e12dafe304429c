"""Regularizers: what is added to the gradients before any transform sees them."""

import attrs
import tensorflow as tf

from tff_optim import hyperparameters
from tff_optim.core import comparison, entries, leaves
from tff_optim.core.messages import shown
from tff_optim.core.tracing import converted
from tff_optim.core.types import (
    Declared,
    Gradients,
    Rate,
    Specs,
    State,
    Transformed,
    Weights,
)
from tff_optim.keras_objects import arguments as keras_arguments
from tff_optim.keras_objects import as_json as keras_objects
from tff_optim.transforms.interface import GradientTransform

__all__ = ["FedProx", "Penalty"]


_STARTED = "started"
_REFERENCE = "reference"


@attrs.frozen
class FedProx(GradientTransform):
    """Pulls weights back to where the round began.

    `g + alpha (w - w_ref)`, the gradient of `alpha / 2 |w - w_ref|^2`, with `g` the gradient, `w`
    the weights and `w_ref` the weights at the first step. The state holds `w_ref` under
    `reference`, in the weights' dtypes, and `started`. On clients the state is made anew each
    round, so the reference is the model of the round, and the training loop passes nothing. An
    optimizer whose state lives on keeps the weights of its very first step.

    `tff.learning.algorithms.build_weighted_fed_prox` of TFF 0.87 adds the term with the opposite
    sign, which pushes clients away from the model; this one pulls, as in the paper.

    Attributes:
      alpha: How hard it pulls; a number of at least 0 or a Keras schedule.

    Example:
      >>> fed_prox = FedProx(alpha=0.5)
      >>> state = fed_prox.initialize(tf.TensorSpec([]))
      >>> state, gradient = fed_prox.next(state, tf.constant(1.0), tf.constant(0.0))
      >>> fed_prox.next(state, tf.constant(3.0), tf.constant(0.0))[1].numpy()
      1.0

    Li et al., "Federated optimization in heterogeneous networks", 2020.
    """

    alpha: Rate = hyperparameters.non_negative(0.01)

    def initialize(self, specs: Specs) -> State:
        """See base class."""
        state = hyperparameters.initialize(self)
        state[_STARTED] = False
        state[_REFERENCE] = leaves.zeros(specs)
        return state

    def next(self, state: State, weights: Weights, gradients: Gradients) -> Transformed:
        """See base class."""
        hyperparameters.check_state(self, state, slots=(_STARTED, _REFERENCE))
        leaves.check_like(state[_REFERENCE], weights, "reference` of `state", "`weights`")
        old, now = tf.nest.flatten(state[_REFERENCE]), tf.nest.flatten(weights)
        # A branch, not `tf.where`: it hands tensors on instead of writing them once more.
        taken = tf.cond(tf.convert_to_tensor(state[_STARTED]), lambda: old, lambda: now)
        reference = tf.nest.pack_sequence_as(weights, taken)
        alpha = hyperparameters.current(self, state)["alpha"]

        def pull(g: tf.Tensor | None, w: tf.Tensor, w_ref: tf.Tensor) -> tf.Tensor | None:
            return None if g is None else g + leaves.number(alpha, g.dtype) * (w - w_ref)

        pulled = tf.nest.map_structure(pull, gradients, weights, reference)
        new_state = hyperparameters.advance(self, state)
        new_state[_STARTED] = tf.constant(True)
        new_state[_REFERENCE] = reference
        return new_state, pulled


@attrs.frozen
class Penalty(GradientTransform):
    """Adds the gradient of a Keras regularizer's penalty on each tensor of weights.

    `g + d r(w) / d w`, with `g` the gradient, `w` the weights and `r` the regularizer. Declearn's
    Lasso of strength alpha is `tf.keras.regularizers.L1(alpha)`, its Ridge is `L2(alpha)`.
    `tff_optim.build_optimizer` wraps Keras regularizers in this by itself.

    Attributes:
      regularizer: A `tf.keras.regularizers.Regularizer`.

    Example:
      >>> ridge = Penalty(tf.keras.regularizers.L2(0.5))
      >>> ridge.next((), tf.constant(3.0), tf.constant(1.0))[1].numpy()
      4.0
    """

    regularizer: Declared = attrs.field(
        eq=comparison.key, metadata={entries.READER: keras_objects.regularizer_from_json}
    )

    @regularizer.validator
    def _check_regularizer(self, attribute: attrs.Attribute, value: object) -> None:
        del attribute  # There is only one.
        if not isinstance(value, tf.keras.regularizers.Regularizer):
            raise TypeError(
                "`regularizer` of `Penalty` must be a tf.keras.regularizers.Regularizer; "
                f"found {shown(value)}."
            )
        keras_arguments.check_object(value)

    def initialize(self, specs: Specs) -> State:
        """See base class."""
        del specs  # Nothing is carried from step to step.
        return ()

    def next(self, state: State, weights: Weights, gradients: Gradients) -> Transformed:
        """See base class."""

        def add(g: tf.Tensor | None, w: tf.Tensor) -> tf.Tensor | None:
            return None if g is None else g + self._penalty_gradient(w)

        return state, tf.nest.map_structure(add, gradients, weights)

    def _penalty_gradient(self, w: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(w)
            penalty = converted(self.regularizer)(w)
        if not tf.is_tensor(penalty):
            return tf.zeros_like(w)  # Keras' base class gives the plain number 0.0.
        if penalty.shape.rank != 0:
            raise ValueError(
                f"`regularizer` {type(self.regularizer).__name__} must return one number for a "
                f"tensor of weights; found shape {penalty.shape} for weights of shape {w.shape}."
            )
        # L1L2(0, 0) is a constant: it has no path to the weights.
        return tape.gradient(penalty, w, unconnected_gradients=tf.UnconnectedGradients.ZERO)
