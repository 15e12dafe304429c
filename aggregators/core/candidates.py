"""Models that a rule has its clients score on their own data."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import attrs
import tensorflow as tf

from aggregators.core import checks
from aggregators.core.autograph import with_autograph
from aggregators.core.types import Batch, Labels, Predictions, State, Tensors, Weights

Models = Sequence[Weights]
Error = Callable[[Predictions, Labels], tf.Tensor | tuple[tf.Tensor, tf.Tensor]]


@attrs.frozen
class Candidates:
    """Models that clients score, and the error that scores them.

    Each client scores every model on all of its data, with one forward pass per model, not in training
    mode. Scoring comes after training, so training sees the same batches as under plain averaging.

    Attributes:
      models: `(weights, state) -> models`: maps the flat trainable weights of the server's model and
        the rule's state to `number` sequences of tensors with the same shapes and dtypes.
      number: How many models there are.
      error: `(predictions, labels) -> errors`: one number per example, or their mean over a batch. Or
        `(predictions, labels) -> (errors, weights)`, where a weight of 0 or False leaves an error
        out. None takes `1 - p(true label)` of a classifier, and the loss of any other model.

    A classifier has integer labels of shape `[..., 1]` or `[...]`, and floating predictions of shape
    `[..., classes]`. Predictions are logits if some lie outside of 0 to 1. They are probabilities if
    they lie in 0 to 1 and add up to 1, in all of a client's data and for all candidates. A client with
    neither falls back to the loss, and `errors_are_losses` says so. Labels that are no class, such as
    -1 or 255 of ten classes, do not count. If the loss ignores one of the classes, give
    `class_error(from_logits=..., ignore_class=...)`, which also reads one-hot labels.

    `1 - p` is a symmetric loss: its mean over labels drawn at random is the same for every model.

    Example:
      >>> def without_last_step(weights, state):
      ...     return [weights, [w + step for w, step in zip(weights, state["step"])]]
      >>> Candidates(without_last_step, 2).number
      2
    """

    models: Callable[[Weights, State], Models] = attrs.field(
        validator=checks.validated(checks.function, "(weights, state)")
    )
    number: int = attrs.field(validator=checks.validated(checks.whole, 1))
    error: Error | None = attrs.field(
        default=None,
        validator=checks.validated(checks.function, "(predictions, labels)", optional=True),
    )

    def of(self, weights: Weights, state: State) -> Models:
        """The checked models of this round."""
        models = tuple(tuple(model) for model in self.models(weights, state))
        specs = [[(w.shape, w.dtype) for w in model] for model in (weights, *models)]
        if len(models) != self.number or any(found != specs[0] for found in specs[1:]):
            raise ValueError(
                f"`models` must return {self.number} models of the shapes and dtypes of the server's, "
                f"{specs[0]}; found {specs[1:]}."
            )
        return models


class ErrorSums(NamedTuple):
    """Sums of one model's errors over the batches of one client; they merge by addition.

    Attributes:
      errors: float64 of shape `[3]`: errors times weights, with predictions read as logits, as
        probabilities, and not at all (the loss). All are equal if there is one reading only.
      weights: float64 of shape `[3]`: the summed weights.
      rows: float64 of shape `[3]`: rows of predictions that can only be logits, rows that are
        probabilities, and rows that are undecided.
    """

    errors: tf.Tensor
    weights: tf.Tensor
    rows: tf.Tensor


# Values, and the weight of each.
_Weighted: TypeAlias = tuple[tf.Tensor, tf.Tensor]

_AS_MANY = "`labels` must have one entry for each prediction of a classifier"
_NOT_READ: Tensors = (0.0, 0.0, 0.0)
_IS_LOSS: Tensors = (0.0, 0.0, 1.0)


def no_errors() -> ErrorSums:
    """The sums over no batch."""
    return ErrorSums(*(tf.zeros([3], tf.float64),) * 3)


def errors_of_batch(
    error: Error | None,
    loss: tf.Tensor,
    predictions: Predictions,
    labels: Labels,
    examples: tf.Tensor,
) -> ErrorSums:
    """The errors of a batch by the user's function, or by default; see `Candidates`.

    Args:
      error: The function, or None.
      loss: The batch's loss, of any shape.
      predictions: The model's predictions, in any structure.
      labels: The batch's labels; None if unknown.
      examples: How many examples the batch has.

    Raises:
      TypeError: If there are no labels for the function, or it returns anything but errors.
    """
    if error is not None:
        ways, rows = [_by_function(error, predictions, labels, examples)] * 3, _NOT_READ
    elif _are_classes(predictions, labels):
        outputs = tf.cast(predictions, tf.float32)
        logits = tf.nn.softmax(outputs)
        total = tf.reduce_sum(outputs, -1, keepdims=True)
        shares = tf.where(tf.equal(total, 0.0), logits, tf.math.divide_no_nan(outputs, total))
        ways = [_of_labels(p, labels) for p in (logits, shares)]
        ways.append(_mean(loss, examples))
        rows = _rows(outputs, predictions.dtype)
    else:
        ways, rows = [_mean(loss, examples)] * 3, _IS_LOSS
    sums = []
    for errors, weights in ways:
        errors, weights = tf.cast(errors, tf.float64), tf.cast(weights, tf.float64)
        # An error of weight 0 may be NaN, as is the mean of a batch without examples.
        sums.append(
            (tf.reduce_sum(tf.math.multiply_no_nan(errors, weights)), tf.reduce_sum(weights))
        )
    totals, weights = zip(*sums, strict=True)
    return ErrorSums(tf.stack(totals), tf.stack(weights), tf.cast(rows, tf.float64))


def mean_errors(sums: Sequence[ErrorSums]) -> tuple[tf.Tensor, tf.Tensor]:
    """The mean error of each model, and whether it is the loss. All models are read in one way.

    Returns:
      float32 of shape `[models]`, 0 where nothing counted, and a bool.
    """
    as_logits, as_probabilities, unclear = tf.unstack(tf.add_n([one.rows for one in sums]))
    within = tf.equal(as_logits, 0.0)
    is_loss = within & (unclear > 0.0)
    way = tf.where(is_loss, 2, tf.where(within & (as_probabilities > 0.0), 1, 0))
    found = [tf.math.divide_no_nan(one.errors, one.weights)[way] for one in sums]
    return tf.cast(tf.stack(found), tf.float32), is_loss


def class_error(*, from_logits: bool, ignore_class: int | None = None) -> Error:
    """`1 - p(true label)` of a classifier whose predictions you describe.

    ```
    error = 1 - sum_c y_c p_c
    ```

    with `p` the probabilities and `y` the labels. For `Candidates(error=...)` and
    `rules.jury_mean(votes=...)`. Predictions are `[..., classes]`, or `[..., 1]` for the second of two
    classes. Labels are class indices, `[...]` or `[..., 1]`, or rows `[..., classes]` as for
    `tf.keras.losses.CategoricalCrossentropy`.

    Indices that are no class, such as -1 or 255 of ten classes, and rows of zeros do not count.

    Args:
      from_logits: As in Keras: whether predictions are logits rather than probabilities.
      ignore_class: As in Keras: a class index that does not count either; None for none.

    Returns:
      A function `(predictions, labels) -> (errors, counts)`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If `ignore_class` is no whole number.

    Example:
      >>> error = class_error(from_logits=True, ignore_class=0)
      >>> errors, counts = error(tf.constant([[9.0, 0.0], [0.0, 0.0]]), tf.constant([0, 1]))
      >>> errors.numpy().round(3)[counts]
      array([0.5], dtype=float32)

    Source: Ghosh, Kumar, Sastry, Robust Loss Functions under Label Noise for Deep Neural Networks, 2017.
    """
    checks.flag("from_logits", from_logits)
    if ignore_class is not None:
        ignore_class = checks.whole("ignore_class", ignore_class, -(2**31))

    @tf.autograph.experimental.do_not_convert
    def error(predictions: Predictions, labels: Labels) -> tuple[tf.Tensor, tf.Tensor]:
        if not all(tf.is_tensor(x) and x.shape.rank for x in (predictions, labels)):
            raise TypeError(
                "`predictions` and `labels` must be one tensor each, of known rank, for `class_error`; "
                f"found {predictions!r} and {labels!r}. Write your own function."
            )
        outputs = tf.cast(predictions, tf.float32)
        if outputs.shape[-1] == 1:
            second = tf.sigmoid(outputs) if from_logits else outputs
            shares = tf.concat([1.0 - second, second], -1)
        else:
            shares = tf.nn.softmax(outputs) if from_logits else outputs
        rank, of_labels = predictions.shape.rank, labels.shape.rank
        if of_labels == rank - 1 or (of_labels == rank and labels.shape[-1] == 1):
            return _of_labels(shares, labels, ignore_class)
        if of_labels != rank or labels.shape[-1] != shares.shape[-1]:
            raise TypeError(
                "`labels` must be positions of classes, or rows of as many numbers as there are "
                f"classes; found shape {labels.shape} for predictions of shape {predictions.shape}."
            )
        rows = _of_shape(_AS_MANY, tf.shape(shares), tf.cast(labels, tf.float32))
        counts = tf.reduce_any(tf.not_equal(rows, 0.0), -1)
        if ignore_class is not None:
            counts &= tf.not_equal(tf.argmax(rows, -1), ignore_class)
        return 1.0 - tf.reduce_sum(rows * shares, -1), counts

    return error


def _by_function(
    error: Error, predictions: Predictions, labels: Labels, examples: tf.Tensor
) -> _Weighted:
    """Errors and their weights by the user's function."""
    if labels is None:
        raise TypeError(
            "`error` must be given labels, so a batch must be a mapping with `x` and `y`, or a pair; "
            "found neither. Use None for the model's own loss."
        )
    returned = with_autograph(error)(predictions, labels)
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    found, weights = returned if is_pair else (returned, None)
    found = tf.convert_to_tensor(found)
    if not found.dtype.is_floating:
        raise TypeError(f"`error` must return floating numbers; found {found.dtype.name}.")
    if weights is None:
        return _mean(found, examples)
    weights = tf.convert_to_tensor(weights)
    if found.shape.rank != weights.shape.rank or not found.shape.is_compatible_with(weights.shape):
        raise TypeError(
            f"`error` must return weights of the errors' shape, {found.shape}; found {weights.shape}."
        )
    rule = "`error` must return weights of the errors' shape"
    return found, _of_shape(rule, tf.shape(found), weights)


def _of_shape(rule: str, shape: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    """The tensor itself; one of another shape, which would be broadcast, ends the computation."""
    found = tf.shape(tensor)
    same = tf.equal(tf.size(found), tf.size(shape)) & tf.reduce_all(
        tf.raw_ops.Equal(x=found, y=shape, incompatible_shape_error=False)
    )
    return checks.asserted(same, [f"{rule},", shape, "; found", found], tensor)


def _mean(values: tf.Tensor, examples: tf.Tensor) -> _Weighted:
    """A mean over a batch, weighted by its examples."""
    return tf.reduce_mean(tf.cast(values, tf.float32)), examples


def _of_labels(shares: tf.Tensor, labels: tf.Tensor, ignored: int | None = None) -> _Weighted:
    """`1 - p(label)` of shape `[...]`, and whether the label counts because it is a class."""
    rank = shares.shape.rank
    labels = tf.cast(labels[..., 0] if labels.shape.rank == rank else labels, tf.int64)
    labels = _of_shape(_AS_MANY, tf.shape(shares)[:-1], labels)
    counts = (labels >= 0) & (labels < tf.shape(shares, tf.int64)[-1])
    if ignored is not None:
        counts &= tf.not_equal(labels, ignored)
    # A label that does not count reads the first class: a GPU would read past the end silently.
    found = tf.gather(shares, tf.where(counts, labels, 0), axis=rank - 1, batch_dims=rank - 1)
    return 1.0 - found, counts


def _rows(outputs: tf.Tensor, dtype: tf.DType) -> Tensors:
    """The `rows` of `ErrorSums`, for predictions computed in `dtype`."""
    # A softmax in bfloat16 adds up to 1 within 0.011, one in half precision within 0.002.
    room = 2.0**-5 if dtype == tf.bfloat16 else 2.0**-8
    within = tf.reduce_all((outputs >= -room) & (outputs <= 1.0 + room), -1)
    whole = within & (tf.abs(tf.reduce_sum(outputs, -1) - 1.0) <= room)
    blank = tf.reduce_all(tf.equal(outputs, 0.0), -1)  # both readings give the same
    kinds = (~within, whole, within & ~whole & ~blank)
    return [tf.math.count_nonzero(kind, dtype=tf.float64) for kind in kinds]


def labels_of(batch: Batch) -> Labels:
    """The labels of a batch; None if its form does not tell."""
    if isinstance(batch, Mapping):
        return batch.get("y")
    return batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None


def _are_classes(predictions: Predictions, labels: Labels) -> bool:
    if not all(tf.is_tensor(value) for value in (predictions, labels)):
        return False
    if not predictions.dtype.is_floating or not labels.dtype.is_integer:
        return False
    rank, of_labels = predictions.shape.rank, labels.shape.rank
    if rank is None or rank < 2 or (predictions.shape[-1] or 2) < 2:
        return False
    return of_labels == rank - 1 or (of_labels == rank and labels.shape[-1] == 1)
