"""A client's update and measurements, checked once before a rule gets them."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core.types import Measurements, Structure, Tensors


class ClientUpdate(NamedTuple):
    """A client's update and measurements; those that the rule's `needs` leave out are None.

    Attributes:
      delta: The initial weights minus the trained ones, a flat tuple of tensors.
      weight: The client's weight (number of examples), float64; 0 if the client must not count.
      non_finite: bool: whether `delta`, `weight`, `loss`, `candidate_errors` or `sent` was not finite.
        All tensors are zeros then.
      scores: How far each layer moved, float32 of shape `[num_layers]`.
      loss: The client's mean loss, float32; see `Needs.loss`.
      steps: The client's optimizer steps, int32.
      candidate_errors: Errors of the candidate models, float32 of shape `[number]`.
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
    """A client's update on its way from a client work to a `RuleFactory`, apart from its weight.

    Attributes:
      delta: The initial weights minus the trained ones, in their structure.
      measured: The measurements, by the names in `rule.needs.names`.
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

    A delta is finite if the sum of its squares is finite in float32, so up to a norm of 2.6e19.

    Args:
      delta: Flat floating tensors, initial weights minus trained ones.
      weight: The client's weight, a number.
      also: Further tensors that must be finite: the state that a client keeps.
      **measured: The measurements, by their names in `ClientUpdate`. Scores may be anything, since the
        rule judges them. Steps are whole numbers. All others must be finite.

    Returns:
      The update, with a weight of at least 0. Everything is zeros if something is not finite.
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
    # A branch passes tensors on; a product with 0 or 1 would write them once more.
    found = tf.cond(
        is_valid,
        lambda: tf.nest.map_structure(tf.identity, whole),
        lambda: tf.nest.map_structure(tf.zeros_like, whole),
    )
    return ClientUpdate(non_finite=~is_valid, **found)


def finite_tensors(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """Whether the sum of all squares is finite in float32, that is, the norm is below 2.6e19."""
    # One pass over memory takes a third of the time of a check of each element.
    return tf.math.is_finite(length(tensors))


def length(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """The norm of all tensors as one vector, in float32; infinite above 2.6e19."""
    squares = [tf.nn.l2_loss(tf.cast(x, tf.float32) if x.dtype.size < 4 else x) for x in tensors]
    # Each is half a sum of squares, so the sum stays finite up to a norm of sqrt(2 * float32.max).
    return tf.sqrt(2.0) * tf.sqrt(tf.add_n([tf.cast(square, tf.float32) for square in squares]))


def is_measured_update(value_type: tff.Type) -> bool:
    """Whether this TFF type is a `MeasuredUpdate`."""
    return (
        isinstance(value_type, tff.types.StructWithPythonType)
        and value_type.python_container is MeasuredUpdate
    )
