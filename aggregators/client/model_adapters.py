"""One interface for both of TFF's kinds of model, for the training loop."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias, TypeVar

import attrs
import tensorflow as tf
import tensorflow_federated as tff
import tree

from aggregators.client.batch_rows import common_rows
from aggregators.core.autograph import with_autograph
from aggregators.core.candidates import labels_of
from aggregators.core.types import (
    Batch,
    Labels,
    Metrics,
    ModelFn,
    ModelWeights,
    Predictions,
    Structure,
    Weights,
)

_T = TypeVar("_T")
# The part of a model that is loop state.
Held: TypeAlias = Structure


class Output(NamedTuple):
    """A model's output for a batch.

    Attributes:
      loss: The loss, of any shape that TFF trains.
      predictions: A structure of tensors.
      labels: The batch's labels; None if its form does not tell.
      examples: int64: the number of examples, as TFF counts them.
    """

    loss: tf.Tensor
    predictions: Predictions
    labels: Labels
    examples: tf.Tensor


def _rows(predictions: Predictions) -> tf.Tensor:
    """The number of examples as TFF counts them: the first dimension that all predictions share."""
    several = tree.flatten_with_path(predictions)
    if len(several) == 1:
        return tf.shape(several[0][1], tf.int64)[0]
    rows, _ = common_rows(
        "`predictions` must have a row for each example, in each of their parts",
        [("/".join(map(str, path)), part) for path, part in several],
        "Let the model predict what examples have, or a `VariableModel` say its `num_examples`.",
        (),
    )
    return tf.cast(rows, tf.int64)


@attrs.frozen
class _FunctionalAdapter:
    """A functional model, whose weights and metrics are loop state."""

    model: tff.learning.models.FunctionalModel

    def start(self, weights: ModelWeights) -> Held:
        """The loop state for these weights, trainable and others."""
        return tuple(weights.trainable), tuple(weights.non_trainable)

    def trainable(self, held: Held) -> Weights:
        """The trainable weights, flat: tensors or variables."""
        return held[0]

    def assign(self, held: Held, trainable: Weights) -> Held:
        """The loop state with these trainable weights."""
        return tuple(trainable), held[1]

    def forward(self, held: Held, batch: Batch, *, training: bool) -> Output:
        """One forward pass. That of a variable model also updates its metrics."""
        x, y = (batch["x"], batch["y"]) if isinstance(batch, Mapping) else tuple(batch)
        # TFF accepts only `tf.function`s for these two, so AutoGraph has already converted them.
        predictions = self.model.predict_on_batch(held, x, training=training)
        loss = self.model.loss(output=predictions, label=y)
        return Output(loss, predictions, y, _rows(predictions))

    def start_metrics(self) -> Metrics:
        """The metrics of no batch."""
        return with_autograph(self.model.initialize_metrics_state)()

    def update_metrics(self, metrics: Metrics, output: Output) -> Metrics:
        """The metrics including a batch's output, which must be that of the last forward pass."""
        batch_output = tff.learning.models.BatchOutput(
            loss=output.loss,
            predictions=output.predictions,
            num_examples=tf.cast(output.examples, tf.int32),
        )
        update = with_autograph(self.model.update_metrics_state)
        return update(metrics, labels=output.labels, batch_output=batch_output)

    def without_metrics(self, compute: Callable[[], _T]) -> _T:
        """The result of a computation; its forward passes do not change the metrics."""
        return compute()

    def report_metrics(self, metrics: Metrics) -> Metrics:
        """The unfinalized metrics, as tensors that later passes do not change."""
        return metrics


@attrs.frozen
class _VariableAdapter:
    """A variable model, which keeps weights and metrics itself; their loop state is empty."""

    model: tff.learning.models.VariableModel
    weights: tff.learning.models.ModelWeights

    def start(self, weights: ModelWeights) -> Held:
        tf.nest.map_structure(lambda variable, x: variable.assign(x), self.weights, weights)
        return ()

    def trainable(self, held: Held) -> Weights:
        return tuple(tf.nest.flatten(self.weights.trainable))

    def assign(self, held: Held, trainable: Weights) -> Held:
        for variable, value in zip(self.trainable(held), trainable, strict=True):
            variable.assign(value)
        return held

    def forward(self, held: Held, batch: Batch, *, training: bool) -> Output:
        output = with_autograph(self.model.forward_pass)(batch, training=training)
        examples = output.num_examples
        if examples is None:
            examples = _rows(output.predictions)
        examples = tf.cast(examples, tf.int64)
        return Output(output.loss, output.predictions, labels_of(batch), examples)

    def start_metrics(self) -> Metrics:
        return ()

    def update_metrics(self, metrics: Metrics, output: Output) -> Metrics:
        del output  # the forward pass has updated them
        return metrics

    def without_metrics(self, compute: Callable[[], _T]) -> _T:
        variables = list(self.model.local_variables)
        before = [variable.read_value() for variable in variables]
        result = compute()
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        return result

    def report_metrics(self, metrics: Metrics) -> Metrics:
        found = with_autograph(self.model.report_local_unfinalized_metrics)()
        # A model may return its variables, which later forward passes change.
        return tf.nest.map_structure(tf.identity, found)


def adapter_of(model_fn: ModelFn) -> _FunctionalAdapter | _VariableAdapter:
    """Adapts a functional model, or the variable model that a function makes."""
    if isinstance(model_fn, tff.learning.models.FunctionalModel):
        return _FunctionalAdapter(model_fn)
    model = model_fn()
    return _VariableAdapter(model, tff.learning.models.ModelWeights.from_model(model))
