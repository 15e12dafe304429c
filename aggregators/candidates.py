"""Models that a rule has its clients score on their own data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import tensorflow as tf

from aggregators import checks
from aggregators.user_code import as_written

Models = Sequence[Sequence[tf.Tensor]]
Error = Callable[[Any, Any], tf.Tensor]


def _number(value: Any) -> int:
    return checks.whole("number", value, 1)


def _check_error(instance: Any, attribute: Any, value: Any) -> None:
    del instance, attribute
    if value is not None and not callable(value):
        raise TypeError(
            "`error` must be a function of predictions and labels, or None for 1 - p(true label) "
            f"of a classifier and the loss of any other model; found {value!r}."
        )


@attrs.frozen
class Candidates:
    """Models that clients score, and by what.

    Each client scores every one of them on all of its data, with the model's own forward pass, not
    in training mode: one such pass for each. It does so after it has trained, so that its training sees
    the batches that plain averaging would have seen.

    Attributes:
      models: `(weights, state) -> models`: from the flat trainable weights of the server's model and
        the rule's state to `number` sequences of tensors of the same shapes and dtypes.
      number: How many there are.
      error: `(predictions, labels) -> errors`, one number per example, or their mean over a batch. None
        takes `default_error`.

    Example:
      >>> def without_last_step(weights, state):
      ...     return [weights, [w + step for w, step in zip(weights, state["step"])]]
      >>> Candidates(without_last_step, 2).number
      2
    """

    models: Callable[[Sequence[tf.Tensor], Mapping[str, Any]], Models] = attrs.field(
        validator=checks.validated(checks.function, "(weights, state)")
    )
    number: int = attrs.field(converter=_number)
    error: Error | None = attrs.field(default=None, validator=_check_error)

    def of(self, weights: Sequence[tf.Tensor], state: Mapping[str, Any]) -> Models:
        """The models of this round, checked."""
        models = tuple(tuple(model) for model in self.models(weights, state))
        specs = [[(w.shape, w.dtype) for w in model] for model in (weights, *models)]
        if len(models) != self.number or any(found != specs[0] for found in specs[1:]):
            raise ValueError(
                f"`models` must return {self.number} models of the shapes and dtypes of the server's, "
                f"{specs[0]}; found {specs[1:]}."
            )
        return models


def error_of_batch(
    error: Error | None, loss: tf.Tensor, predictions: Any, labels: Any
) -> tf.Tensor:
    """A batch's errors by a function of yours, or by default.

    Raises:
      TypeError: If there is a function, but there are no labels for it.
    """
    if error is None:
        return default_error(loss, predictions, labels)
    if labels is None:
        raise TypeError(
            "`error` must have labels to look at: a batch must be a mapping with `x` and `y`, or a "
            "pair; found neither. Take None for the model's own loss."
        )
    found = tf.convert_to_tensor(as_written(error)(predictions, labels))
    if not found.dtype.is_floating:
        raise TypeError(f"`error` must return floating numbers; found {found.dtype.name}.")
    return found


def labels_of(batch: Any) -> Any:
    """What a batch holds as its labels; None if it is of no form that tells."""
    if isinstance(batch, Mapping):
        return batch.get("y")
    return batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None


def default_error(loss: tf.Tensor, predictions: Any, labels: Any) -> tf.Tensor:
    """1 - p(true label) for a classifier, else the loss.

    A classifier is a model with whole numbers for labels, of shape `[..., 1]` or `[...]`, and floating
    predictions `[..., classes]`, logits or probabilities: the one whose cross entropy is nearer to the
    model's own loss. `1 - p` is a symmetric loss: its mean over labels drawn at random is the same for
    every model.

    Args:
      loss: The batch's loss.
      predictions: The model's predictions, or any structure of them.
      labels: The batch's labels; None if not known.

    Returns:
      Errors of shape `[...]`, or the loss as it is.

    Example: a batch of two, by its logits

      >>> z, y = tf.constant([[0.0, 0.0], [9.0, 0.0]]), tf.constant([0, 0])
      >>> loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y, z)
      >>> default_error(loss, z, y).numpy().round(3)
      array([0.5, 0. ], dtype=float32)

    Source: Ghosh, Kumar, Sastry, Robust Loss Functions under Label Noise for Deep Neural Networks, 2017.
    """
    if not _are_classes(predictions, labels):
        return loss
    rank = predictions.shape.rank
    labels = labels[..., 0] if labels.shape.rank == rank else labels
    labels = tf.cast(labels, tf.int64)
    outputs = tf.cast(predictions, tf.float32)

    def of_label(log_probabilities: tf.Tensor) -> tf.Tensor:
        return tf.gather(log_probabilities, labels, axis=rank - 1, batch_dims=rank - 1)

    shares = tf.math.divide_no_nan(outputs, tf.reduce_sum(outputs, -1, keepdims=True))
    as_shares = of_label(tf.math.log(tf.maximum(shares, 1e-30)))
    as_logits = of_label(tf.nn.log_softmax(outputs))
    batch_loss = tf.reduce_mean(tf.cast(loss, tf.float32))
    # A model may call the sum over a batch its loss.
    mean_loss = tf.math.divide_no_nan(batch_loss, tf.cast(tf.size(labels), tf.float32))

    def distance(logs: tf.Tensor) -> tf.Tensor:
        entropy = -tf.reduce_mean(logs)
        return tf.minimum(tf.abs(batch_loss - entropy), tf.abs(mean_loss - entropy))

    are_shares = distance(as_shares) < distance(as_logits)
    return 1.0 - tf.exp(tf.where(are_shares, as_shares, as_logits))


def _are_classes(predictions: Any, labels: Any) -> bool:
    if not all(tf.is_tensor(value) for value in (predictions, labels)):
        return False
    if not predictions.dtype.is_floating or not labels.dtype.is_integer:
        return False
    rank, of_labels = predictions.shape.rank, labels.shape.rank
    if rank is None or rank < 2 or (predictions.shape[-1] or 2) < 2:
        return False
    return of_labels == rank - 1 or (of_labels == rank and labels.shape[-1] == 1)
