"""Clients that keep a state between rounds and use it in training."""

from collections.abc import Callable
from typing import NamedTuple

import attrs
import tensorflow as tf

from aggregators.core import checks
from aggregators.core.autograph import with_autograph
from aggregators.core.types import (
    Gradients,
    Metrics,
    OptimizerState,
    State,
    Structure,
    Tensors,
    Weights,
)


class Context(NamedTuple):
    """The inputs of a client's training.

    Attributes:
      state: The client's own state.
      shared: The rule's state, broadcast with the model.
      weights: The flat trainable weights that training starts from.
    """

    state: State
    shared: State
    weights: Weights


class Trained(NamedTuple):
    """The results of a client's training.

    Attributes:
      weights: The flat trained weights.
      steps: int32: optimizer steps.
      mean_gradient: Mean over steps of the gradients before any correction; empty unless requested.
      initial_gradient: Gradient of the mean loss over the client's examples at the initial weights, not
        in training mode; empty unless requested.
      optimizer_state: State of the client's optimizer; empty if clients keep nothing.
      examples: int64: examples seen in training; with clipping, those that counted.
      loss: float32: mean loss per example, 0 without examples; None unless requested. A loss that is
        no scalar counts as the mean of its elements.
      errors: Mean errors of the candidates, float32 of shape `[number]`, and a bool that says whether
        they are losses. None without candidates.
      metrics: The model's unfinalized metrics.
      fresh_metrics: The unfinalized metrics of no example.
      counts: Counts of clipping, see `example_clipping.Clipped`; empty without.
    """

    weights: Weights
    steps: tf.Tensor
    mean_gradient: Tensors
    initial_gradient: Tensors
    optimizer_state: OptimizerState
    examples: tf.Tensor
    loss: tf.Tensor | None
    errors: tuple[tf.Tensor, tf.Tensor] | None
    metrics: Metrics
    fresh_metrics: Metrics
    counts: Structure


Correction = Callable[[Tensors, Weights], Tensors]
# The same, for gradients that may be None.
GradientCorrection = Callable[[Gradients, Weights], Gradients]


def _same(context: Context) -> Correction:
    del context
    return lambda gradients, weights: gradients


def _fresh(optimizer_state: OptimizerState, context: Context) -> OptimizerState:
    del context
    return optimizer_state


@attrs.frozen
class StatefulClient:
    """How clients keep a state between rounds, as part of a rule's `Needs`.

    All are functions of TensorFlow operations. A client whose update is not finite, or that has no
    data, keeps its old state.

    Attributes:
      initial_state: `(weights, optimizer state) -> state`: the state of a client that never took part,
        an `OrderedDict` of tensors or of flat sequences of tensors.
      finish: `(context, trained) -> (state, sent)`: the client's state for its next round, and flat
        tensors for the rule, in `sent` of `ClientUpdate`.
      correction: `context -> (gradients, weights) -> gradients`: called once, before training; the
        function that it returns is called in every step, before the optimizer.
      start: `(optimizer state, context) -> optimizer state`. Hyperparameters stay those of the process.
      mean_gradient: Whether `finish` uses `mean_gradient`, which costs an addition per step.
      initial_gradient: Whether `finish` uses `initial_gradient`, which costs one more pass over the
        client's data.
      num_clients: The number of clients that the rule assumes; clients of a `ClientStates` with more or
        fewer refuse to train. None if it does not matter.

    Example: a client that counts its rounds

      >>> counting = StatefulClient(
      ...     lambda weights, optimizer_state: OrderedDict(rounds=tf.constant(0)),
      ...     lambda context, done: (OrderedDict(rounds=context.state["rounds"] + 1), ()),
      ... )
      >>> counting.mean_gradient
      False
    """

    initial_state: Callable[[Weights, OptimizerState], State] = attrs.field(
        validator=checks.validated(checks.function, "(weights, optimizer_state)")
    )
    finish: Callable[[Context, Trained], tuple[State, Tensors]] = attrs.field(
        validator=checks.validated(checks.function, "(context, trained)")
    )
    correction: Callable[[Context], Correction] = attrs.field(
        default=_same, validator=checks.validated(checks.function, "(context)")
    )
    start: Callable[[OptimizerState, Context], OptimizerState] = attrs.field(
        default=_fresh, validator=checks.validated(checks.function, "(optimizer_state, context)")
    )
    mean_gradient: bool = attrs.field(default=False, validator=checks.validated(checks.flag))
    initial_gradient: bool = attrs.field(default=False, validator=checks.validated(checks.flag))
    num_clients: int | None = attrs.field(
        default=None, validator=checks.validated(checks.whole, 1, optional=True)
    )


def correction(client: StatefulClient | None, context: Context | None) -> GradientCorrection:
    """The function that corrects gradients; None stays None, for a weight that the loss ignores."""
    if client is None:
        return lambda gradients, weights: gradients
    given = with_autograph(with_autograph(client.correction)(context))

    def correct(gradients: Gradients, weights: Weights) -> Gradients:
        dense = densify(gradients, weights)
        corrected = given(dense, [tf.convert_to_tensor(w) for w in weights])
        return tuple(
            None if before is None else after
            for before, after in zip(gradients, corrected, strict=True)
        )

    return correct


def densify(gradients: Gradients, weights: Weights) -> list[tf.Tensor]:
    """Gradients as tensors, zeros for None."""
    return [
        tf.zeros(w.shape, w.dtype) if g is None else tf.convert_to_tensor(g)
        for g, w in zip(gradients, weights, strict=True)
    ]
