"""A client's update and its measurements, as a rule sees them: checked once."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core.types import Measurements, Structure, Tensors


class ClientUpdate(NamedTuple):
    """A client's update and what its rule needs besides; None for what the rule does not ask for.

    Attributes:
      delta: The weights it started from minus those it trained, a flat tuple of tensors.
      weight: The client's weight (number of examples), float64: 0 if the client must not count.
      non_finite: bool: whether delta, weight, loss, an error or what is sent was not finite. All of
        them are zeros then.
      scores: How far each layer moved, float32 of shape `[num_layers]`.
      loss: The client's mean loss, float32, where `Needs.loss` says.
      steps: Its optimizer steps, int32.
      candidate_errors: Of the candidate models, float32 of shape `[number]`.
      errors_are_losses: bool: whether the client fell back to the loss for these errors.
      sent: Flat tensors that a client with a state sends; see `StatefulClient`.

    Example:
      >>> bad = client_update([tf.constant([1.0, float("nan")])], tf.constant(5.0), steps=tf.constant(3))
      >>> bad.delta[0].numpy(), bool(bad.non_finite), float(bad.weight), int(bad.steps), bad.loss
      (array([0., 0.], dtype=float32), True, 0.0, 0, None)
    """

    delta: Tensors
    weight: tf.Tensor
    non_finite: tf.Tensor
    scores: tf.Tensor | None = None
    loss: tf.Tensor | None = None
    steps: tf.Tensor | None = None
    candidate_errors: tf.Tensor | None = None
    errors_are_losses: tf.Tensor | None = None
    sent: Structure = None


class MeasuredUpdate(NamedTuple):
    """A client's update on its way from a client work to a `RuleFactory`, its weight beside it.

    Attributes:
      delta: The weights it started from minus those it trained, in their structure.
      measured: Mapping from `rule.needs.names` to what was measured.
      non_finite: As in `ClientUpdate`.

    Example:
      >>> measured = OrderedDict(steps=tf.constant(3))
      >>> int(MeasuredUpdate([tf.zeros([2])], measured, tf.constant(False)).measured["steps"])
      3
    """

    delta: Structure
    measured: Measurements
    non_finite: tf.Tensor


def client_update(
    delta: Tensors,
    weight: tf.Tensor,
    *,
    also: Tensors = (),
    **measured: Structure,
) -> ClientUpdate:
    """Checks a client's update and measurements, once for all that follows.

    A delta is finite if the sum of its squares is, in float32: up to a norm of 2.6e19.

    Args:
      delta: Flat floating tensors, initial weights minus trained ones.
      weight: The client's weight, a number.
      also: Further tensors that must be finite: the state that a client keeps.
      **measured: What was measured, by its name in `ClientUpdate`. Scores may be anything, and are
        judged by the rule; steps are whole numbers; all else must be finite.

    Returns:
      The update, its weight at least 0: zeros all through if something is not finite.
    """
    delta = tuple(tf.convert_to_tensor(tensor) for tensor in delta)
    weight = tf.cast(weight, tf.float64)
    is_valid = finite_tensors(delta) & tf.math.is_finite(weight)
    for name in ("loss", "candidate_errors"):
        if measured.get(name) is not None:
            is_valid &= tf.reduce_all(tf.math.is_finite(measured[name]))
    more = [*also, *tf.nest.flatten(measured.get("sent", ()))]
    more = [x for x in more if x is not None and x.dtype.is_floating]
    if more:
        is_valid &= finite_tensors(more)
    given = OrderedDict((name, x) for name, x in measured.items() if x is not None)
    whole = OrderedDict(delta=delta, weight=tf.maximum(weight, 0.0), **given)
    # A branch passes tensors on where a product with 0 or 1 would write them once more.
    found = tf.cond(
        is_valid,
        lambda: tf.nest.map_structure(tf.identity, whole),
        lambda: tf.nest.map_structure(tf.zeros_like, whole),
    )
    return ClientUpdate(non_finite=~is_valid, **found)


def finite_tensors(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """Whether the sum of all squares is a number in float32, so the norm below 2.6e19: one bool."""
    # One pass over memory, a third of what a look at each element takes.
    return tf.math.is_finite(length(tensors))


def length(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """The norm of all tensors as one vector, taken in float32: infinite from 2.6e19 on."""
    squares = [tf.nn.l2_loss(tf.cast(x, tf.float32) if x.dtype.size < 4 else x) for x in tensors]
    # Half of a sum of squares each, which is finite up to a norm of the root of twice as much.
    return tf.sqrt(2.0) * tf.sqrt(tf.add_n([tf.cast(square, tf.float32) for square in squares]))


def is_measured_update(value_type: tff.Type) -> bool:
    """Whether this TFF type is a `MeasuredUpdate`."""
    return (
        isinstance(value_type, tff.types.StructWithPythonType)
        and value_type.python_container is MeasuredUpdate
    )
