"""What a client sends to a rule: its update and what was measured with it, checked once."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
import tensorflow_federated as tff


class ClientUpdate(NamedTuple):
    """A client's update and what its rule needs besides.

    Attributes:
      delta: The weights it started from minus those it trained: in their structure on its way from a
        client work to a factory, a flat tuple of tensors where a rule sees it.
      measured: Mapping from names to what was measured: scores of shape `[num_layers]` under the
        score's name, `training_loss` or `initial_loss`, `steps`, `candidate_errors`,
        `errors_are_losses`; see `Needs`.
      non_finite: bool: whether delta, weight or loss was not finite. All of it is zeros then.

    Example:
      >>> bad, weight = client_update([tf.constant([1.0, float("nan")])], tf.constant(5.0), {})
      >>> bad.delta[0].numpy(), bool(bad.non_finite), float(weight)
      (array([0., 0.], dtype=float32), True, 0.0)
    """

    delta: Any
    measured: Any
    non_finite: Any


def client_update(
    tensors: Sequence[tf.Tensor],
    weight: tf.Tensor,
    measured: Mapping[str, Any],
    *,
    also: Sequence[tf.Tensor] = (),
) -> tuple[ClientUpdate, tf.Tensor]:
    """Checks what a client found, once and for all that follows.

    A delta is finite if the sum of its squares is, in float32: up to a norm of 2.6e19.

    Args:
      tensors: The delta, flat: floating tensors, initial weights minus trained ones.
      weight: The client's weight, a number.
      measured: What was measured, by name. Every `*_loss` and all `*_errors` must be finite; scores
        may be anything, and are judged by the rule. `sent`, by a client that keeps a state, must
        be finite.
      also: Further tensors that must be finite: the state that a client keeps.

    Returns:
      The update, its delta a flat tuple, and the weight (float64, at least 0): zeros all through if
      something is not finite.
    """
    tensors = tuple(tf.convert_to_tensor(tensor) for tensor in tensors)
    weight = tf.cast(weight, tf.float64)
    sound = finite_tensors(tensors) & tf.math.is_finite(weight)
    for name, value in measured.items():
        if name.endswith(("_loss", "_errors")):
            sound &= tf.reduce_all(tf.math.is_finite(value))
    more = [x for x in (*also, *tf.nest.flatten(measured.get("sent", ()))) if x.dtype.is_floating]
    if more:
        sound &= finite_tensors(more)
    whole = (tensors, tf.maximum(weight, 0.0), list(measured.values()))
    # A branch passes tensors on where a product with 0 or 1 would write them once more.
    tensors, weight, values = tf.cond(
        sound,
        lambda: tf.nest.map_structure(tf.identity, whole),
        lambda: tf.nest.map_structure(tf.zeros_like, whole),
    )
    found = OrderedDict(zip(measured, values, strict=True))
    return ClientUpdate(tensors, found, ~sound), weight


def finite_tensors(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """Whether the sum of all squares is a number in float32, so the norm below 2.6e19: one bool."""
    # One pass over memory, a third of what a look at each element takes.
    return tf.math.is_finite(length(tensors))


def length(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """The norm of all tensors as one vector, taken in float32: infinite from 2.6e19 on."""
    squares = [tf.nn.l2_loss(tf.cast(x, tf.float32) if x.dtype.size < 4 else x) for x in tensors]
    # Half of a sum of squares each, which is finite up to a norm of the root of twice as much.
    return tf.sqrt(2.0) * tf.sqrt(tf.add_n([tf.cast(square, tf.float32) for square in squares]))


def is_client_update(value_type: Any) -> bool:
    """Whether this TFF type is a `ClientUpdate`."""
    return (
        isinstance(value_type, tff.types.StructWithPythonType)
        and value_type.python_container is ClientUpdate
    )
