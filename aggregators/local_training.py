"""A client's training, with its loss and steps kept: TFF's own loops report neither per client."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import tensorflow as tf
import tensorflow_federated as tff

LossAt = Literal["training", "initial"]
Loop: TypeAlias = tff.learning.LoopImplementation


class Trained(NamedTuple):
    """What one client's training gives.

    Attributes:
      initial: Tuple of trainable weights before.
      trained: The same after.
      loss: float32: mean loss per example; 0 without examples.
      steps: int32: optimizer steps.
      examples: int64: examples seen while training.
      metrics: The model's unfinalized metrics.
      fresh_metrics: The same, of no example at all.
    """

    initial: Any
    trained: Any
    loss: Any
    steps: Any
    examples: Any
    metrics: Any
    fresh_metrics: Any


Training = Callable[[Any, Any, Any], Trained]


def build_training(
    model_fn: Any, optimizer: tff.learning.optimizers.Optimizer, loss_at: LossAt, loop: Loop
) -> Training:
    """Builds the local training of one client: `(weights, dataset, hparams) -> Trained`.

    One optimizer step per batch, as `tff.learning.templates.build_model_delta_client_work` takes.

    Args:
      model_fn: Function of nothing that makes a `tff.learning.models.VariableModel`, or a
        `tff.learning.models.FunctionalModel`.
      optimizer: The client's optimizer.
      loss_at: `"training"`: the loss of each batch before its own step, free of cost.
        `"initial"`: the loss of the weights that training starts from, one more pass over data.
      loop: `dataset.reduce` or a loop over the dataset's iterator.

    Returns:
      A function to be called while a graph is built.
    """
    if isinstance(model_fn, tff.learning.models.FunctionalModel):
        return _functional_training(model_fn, optimizer, loss_at, loop)
    return _variable_training(model_fn, optimizer, loss_at, loop)


def check_model_fn(model_fn: Any) -> None:
    """Raises `TypeError` for what is neither a functional model nor may make a variable model."""
    if isinstance(model_fn, tff.learning.models.FunctionalModel):
        return
    if not callable(model_fn) or isinstance(model_fn, tf.keras.Model):
        raise TypeError(
            "`model_fn` must be a function that makes a tff.learning.models.VariableModel, or a "
            f"tff.learning.models.FunctionalModel; found {model_fn!r}. Make the one of a Keras model "
            "with `tff.learning.models.from_keras_model`, in a function of no arguments, or the other "
            "with `tff.learning.models.functional_model_from_keras`."
        )


def check_optimizer(argument: str, optimizer: Any) -> None:
    """Raises `TypeError` for anything that is not TFF's kind of optimizer."""
    if not isinstance(optimizer, tff.learning.optimizers.Optimizer):
        raise TypeError(
            f"`{argument}` must be a tff.learning.optimizers.Optimizer; found {optimizer!r}. "
            "Make one of a Keras optimizer with `tff_optim.build_keras_optimizer`."
        )


def _variable_training(
    model_fn: Callable[[], tff.learning.models.VariableModel],
    optimizer: tff.learning.optimizers.Optimizer,
    loss_at: LossAt,
    loop: Loop,
) -> Training:
    model = model_fn()
    variables = tff.learning.models.ModelWeights.from_model(model)
    trainable = tuple(tf.nest.flatten(variables.trainable))

    def loss_and_examples(output: Any) -> tuple[tf.Tensor, tf.Tensor]:
        examples = output.num_examples
        if examples is None:
            examples = tf.shape(output.predictions)[0]
        examples = tf.cast(examples, tf.int64)
        return tf.cast(output.loss, tf.float32) * tf.cast(examples, tf.float32), examples

    def evaluate(sums: Any, batch: Any) -> Any:
        loss, examples = loss_and_examples(model.forward_pass(batch, training=False))
        return sums[0] + loss, sums[1] + examples

    def step(state: Any, batch: Any) -> Any:
        optimizer_state, sums, steps = state
        with tf.GradientTape() as tape:
            output = model.forward_pass(batch, training=True)
        gradients = tape.gradient(output.loss, trainable)
        optimizer_state, updated = optimizer.next(optimizer_state, trainable, gradients)
        for variable, new in zip(trainable, updated, strict=True):
            variable.assign(new)
        loss, examples = loss_and_examples(output)
        return optimizer_state, (sums[0] + loss, sums[1] + examples), steps + 1

    @tf.function
    def train(weights: Any, dataset: tf.data.Dataset, hparams: Any) -> Trained:
        tf.nest.map_structure(lambda variable, value: variable.assign(value), variables, weights)
        fresh = model.report_local_unfinalized_metrics()
        initial_loss = None
        if loss_at == "initial":
            initial_loss = _mean(*_fold(loop, dataset, _no_loss(), evaluate))
            model.reset_metrics()
        state = (_initial_state(optimizer, trainable, hparams), _no_loss(), tf.constant(0))
        _, (loss_sum, examples), steps = _fold(loop, dataset, state, step)
        return Trained(
            initial=tuple(tf.nest.flatten(weights.trainable)),
            trained=tuple(variable.read_value() for variable in trainable),
            loss=_mean(loss_sum, examples) if initial_loss is None else initial_loss,
            steps=steps,
            examples=examples,
            metrics=model.report_local_unfinalized_metrics(),
            fresh_metrics=fresh,
        )

    return train


def _functional_training(
    model: tff.learning.models.FunctionalModel,
    optimizer: tff.learning.optimizers.Optimizer,
    loss_at: LossAt,
    loop: Loop,
) -> Training:
    def split(batch: Any) -> tuple[Any, Any]:
        return (batch["x"], batch["y"]) if isinstance(batch, Mapping) else tuple(batch)

    def count(output: Any) -> tf.Tensor:
        return tf.shape(tf.nest.flatten(output)[0])[0]

    def weighted(loss: tf.Tensor, examples: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        loss = tf.cast(loss, tf.float32) * tf.cast(examples, tf.float32)
        return loss, tf.cast(examples, tf.int64)

    @tf.function
    def train(weights: Any, dataset: tf.data.Dataset, hparams: Any) -> Trained:
        initial, fixed = tuple(weights.trainable), tuple(weights.non_trainable)

        def evaluate(sums: Any, batch: Any) -> Any:
            x, y = split(batch)
            output = model.predict_on_batch((initial, fixed), x, training=False)
            loss, examples = weighted(model.loss(output=output, label=y), count(output))
            return sums[0] + loss, sums[1] + examples

        def step(state: Any, batch: Any) -> Any:
            trainable, optimizer_state, metrics, sums, steps = state
            x, y = split(batch)
            with tf.GradientTape() as tape:
                tape.watch(trainable)
                output = model.predict_on_batch((trainable, fixed), x, training=True)
                loss = model.loss(output=output, label=y)
            gradients = tape.gradient(loss, trainable)
            optimizer_state, trainable = optimizer.next(optimizer_state, trainable, gradients)
            metrics = model.update_metrics_state(
                metrics,
                labels=y,
                batch_output=tff.learning.models.BatchOutput(
                    loss=loss, predictions=output, num_examples=count(output)
                ),
            )
            loss, examples = weighted(loss, count(output))
            return (
                trainable,
                optimizer_state,
                metrics,
                (sums[0] + loss, sums[1] + examples),
                steps + 1,
            )

        fresh = model.initialize_metrics_state()
        state = (
            initial,
            _initial_state(optimizer, initial, hparams),
            fresh,
            _no_loss(),
            tf.constant(0),
        )
        trained, _, metrics, (loss_sum, examples), steps = _fold(loop, dataset, state, step)
        if loss_at == "initial":
            loss = _mean(*_fold(loop, dataset, _no_loss(), evaluate))
        else:
            loss = _mean(loss_sum, examples)
        return Trained(initial, trained, loss, steps, examples, metrics, fresh)

    return train


def _fold(loop: Loop, dataset: tf.data.Dataset, state: Any, step: Callable[[Any, Any], Any]) -> Any:
    if loop is Loop.DATASET_REDUCE:
        return dataset.reduce(state, step)
    # AutoGraph would make a `scan` and a `reduce` of a loop over the dataset itself, and have one over
    # its iterator ask in every step, once more, whether there is a batch.
    iterator = iter(dataset)
    _, state = tf.while_loop(
        lambda batch, state: batch.has_value(),
        lambda batch, state: (iterator.get_next_as_optional(), step(state, batch.get_value())),
        (iterator.get_next_as_optional(), state),
    )
    return state


def _no_loss() -> tuple[tf.Tensor, tf.Tensor]:
    return tf.constant(0.0), tf.constant(0, tf.int64)


def _mean(loss_sum: tf.Tensor, examples: tf.Tensor) -> tf.Tensor:
    return tf.math.divide_no_nan(loss_sum, tf.cast(examples, tf.float32))


def _initial_state(
    optimizer: tff.learning.optimizers.Optimizer, trainable: tuple[Any, ...], hparams: Any
) -> Any:
    specs = tuple(tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in trainable)
    return optimizer.set_hparams(optimizer.initialize(specs), hparams)
