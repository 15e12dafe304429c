"""A client's training, with its loss and steps kept: TFF's own loops report neither per client."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import tensorflow as tf
import tensorflow_federated as tff

from aggregators import client_memory
from aggregators.candidates import Error, error_of_batch, labels_of
from aggregators.client_memory import ClientMemory, Context, Finished
from aggregators.example_clipping import ExampleClipping, clip_examples, no_counts
from aggregators.rule import LossAt

Loop: TypeAlias = tff.learning.LoopImplementation


class Trained(NamedTuple):
    """What one client's training gives.

    Attributes:
      initial: Tuple of trainable weights before.
      trained: The same after.
      loss: float32: mean loss per example; 0 without examples. None if not asked for. Of a loss that
        is no scalar, the mean over its elements stands for the batch.
      steps: int32: optimizer steps.
      examples: int64: examples seen while training; with clipping, those that counted.
      metrics: The model's unfinalized metrics.
      fresh_metrics: The same, of no example at all.
      counts: Of clipping, see `example_clipping.Clipped`; empty without.
      errors: Of each model scored before training, float32: its mean error per example.
      remembered: What `ClientMemory.finish` gives; empty without one.
    """

    initial: Any
    trained: Any
    loss: Any
    steps: Any
    examples: Any
    metrics: Any
    fresh_metrics: Any
    counts: Any
    errors: Any
    remembered: Any


Training = Callable[[Any, Any, Any, Any, Any], Trained]


def build_training(
    model_fn: Any,
    optimizer: tff.learning.optimizers.Optimizer,
    loss_at: LossAt | None,
    loop: Loop,
    clipping: ExampleClipping | None = None,
    error: Error | None = None,
    memory: ClientMemory | None = None,
) -> Training:
    """Builds the training of one client: `(weights, dataset, hparams, models, context) -> Trained`.

    `models` are candidates for the trainable weights, which are scored before training; `context` is
    what the client has of its own.

    One optimizer step per batch, as `tff.learning.templates.build_model_delta_client_work` takes.

    Args:
      model_fn: Function of nothing that makes a `tff.learning.models.VariableModel`, or a
        `tff.learning.models.FunctionalModel`.
      optimizer: The client's optimizer.
      loss_at: `"training"`: the loss of each batch before its own step, free of cost.
        `"initial"`: the loss of the weights that training starts from, one more pass over data.
        None: no loss.
      loop: `dataset.reduce` or a loop over the dataset's iterator.
      clipping: How each example's gradient is clipped; None takes the batch's as it is.
      error: What candidates are scored by; see `aggregators.candidates.Candidates`.
      memory: What the client does with its state, which is in `context`; None for no state.

    Returns:
      A function to be called while a graph is built.
    """
    if isinstance(model_fn, tff.learning.models.FunctionalModel):
        return _functional_training(model_fn, optimizer, loss_at, loop, clipping, error, memory)
    return _variable_training(model_fn, optimizer, loss_at, loop, clipping, error, memory)


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
    loss_at: LossAt | None,
    loop: Loop,
    clipping: ExampleClipping | None,
    error: Error | None,
    memory: ClientMemory | None,
) -> Training:
    model = model_fn()
    variables = tff.learning.models.ModelWeights.from_model(model)
    trainable = tuple(tf.nest.flatten(variables.trainable))

    def examples_in(output: Any) -> tf.Tensor:
        examples = output.num_examples
        if examples is None:
            examples = count(output.predictions)
        return tf.cast(examples, tf.int64)

    def evaluate(sums: Any, batch: Any) -> Any:
        output = model.forward_pass(batch, training=False)
        return add_loss(sums, output.loss, examples_in(output))

    def judge(sums: Any, batch: Any) -> Any:
        output = model.forward_pass(batch, training=False)
        found = error_of_batch(error, output.loss, output.predictions, labels_of(batch))
        return add_loss(sums, found, examples_in(output))

    def assign(weights: Any) -> None:
        for variable, value in zip(trainable, weights, strict=True):
            variable.assign(value)

    def differentiate(batch: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            output = model.forward_pass(batch, training=True)
        return tape.gradient(output.loss, trainable), output

    def one(carried: Any, example: Any) -> Any:
        gradients, output = differentiate(example)
        return carried, gradients, output.loss

    def gradient(batch: Any, counts: Any) -> Any:
        if clipping is None:
            gradients, output = differentiate(batch)
            return gradients, output.loss, examples_in(output), counts
        found = clip_examples(clipping, batch, trainable, one)
        return found.gradients, found.loss, found.examples, add_counts(counts, found.counts)

    def slope(sums: Any, batch: Any) -> Any:
        with tf.GradientTape() as tape:
            output = model.forward_pass(batch, training=False)
        gradients = tape.gradient(output.loss, trainable)
        return add_slope(sums, gradients, trainable, examples_in(output))

    def step(context: Any, state: Any, batch: Any) -> Any:
        optimizer_state, sums, counts, seen, steps = state
        gradients, loss, examples, counts = gradient(batch, counts)
        seen = add_gradients(seen, gradients, trainable)
        gradients = client_memory.correct(memory, gradients, trainable, context)
        optimizer_state, updated = optimizer.next(optimizer_state, trainable, gradients)
        assign(updated)
        sums = add_loss(sums, loss if loss_at == "training" else None, examples)
        return optimizer_state, sums, counts, seen, steps + 1

    @tf.function
    def train(
        weights: Any, dataset: tf.data.Dataset, hparams: Any, models: Any, context: Any
    ) -> Trained:
        tf.nest.map_structure(lambda variable, value: variable.assign(value), variables, weights)
        fresh = model.report_local_unfinalized_metrics()
        before, errors = None, []
        for candidate in models:
            assign(candidate)
            errors.append(_mean(_fold(loop, dataset, _no_loss(), judge)))
        if models:
            assign(tf.nest.flatten(weights.trainable))
            model.reset_metrics()
        if loss_at == "initial":
            before = _fold(loop, dataset, _no_loss(), evaluate)
            model.reset_metrics()
        initial_gradient = ()
        if memory is not None and memory.initial_gradient:
            initial_gradient = _mean_slope(_fold(loop, dataset, _no_slope(trainable), slope))
            model.reset_metrics()
        start = _start(optimizer, trainable, hparams, memory, context)
        seen = _no_gradients(memory, trainable)
        state = (start, _no_loss(), _no_counts(clipping), seen, tf.constant(0))
        end, sums, counts, seen, steps = _fold(loop, dataset, state, _with_context(step, context))
        trained = tuple(variable.read_value() for variable in trainable)
        return Trained(
            initial=tuple(tf.nest.flatten(weights.trainable)),
            trained=trained,
            loss=_mean(before or sums) if loss_at else None,
            steps=steps,
            examples=sums[1],
            metrics=model.report_local_unfinalized_metrics(),
            fresh_metrics=fresh,
            counts=counts,
            errors=errors,
            remembered=_finish(memory, context, trained, steps, seen, initial_gradient, end),
        )

    return train


def _functional_training(
    model: tff.learning.models.FunctionalModel,
    optimizer: tff.learning.optimizers.Optimizer,
    loss_at: LossAt | None,
    loop: Loop,
    clipping: ExampleClipping | None,
    error: Error | None,
    memory: ClientMemory | None,
) -> Training:
    def split(batch: Any) -> tuple[Any, Any]:
        return (batch["x"], batch["y"]) if isinstance(batch, Mapping) else tuple(batch)

    @tf.function
    def train(
        weights: Any, dataset: tf.data.Dataset, hparams: Any, models: Any, context: Any
    ) -> Trained:
        initial, fixed = tuple(weights.trainable), tuple(weights.non_trainable)

        def evaluate(sums: Any, batch: Any) -> Any:
            x, y = split(batch)
            output = model.predict_on_batch((initial, fixed), x, training=False)
            return add_loss(sums, model.loss(output=output, label=y), count(output))

        def judge(sums: Any, batch: Any) -> Any:
            x, y = split(batch)
            judged = []
            for one, candidate in zip(sums, models, strict=True):
                output = model.predict_on_batch((candidate, fixed), x, training=False)
                loss = model.loss(output=output, label=y)
                judged.append(add_loss(one, error_of_batch(error, loss, output, y), count(output)))
            return tuple(judged)

        def differentiate(trainable: Any, metrics: Any, batch: Any) -> Any:
            x, y = split(batch)
            with tf.GradientTape() as tape:
                tape.watch(trainable)
                output = model.predict_on_batch((trainable, fixed), x, training=True)
                loss = model.loss(output=output, label=y)
            gradients = tape.gradient(loss, trainable)
            metrics = model.update_metrics_state(
                metrics,
                labels=y,
                batch_output=tff.learning.models.BatchOutput(
                    loss=loss, predictions=output, num_examples=count(output)
                ),
            )
            return metrics, gradients, loss, count(output)

        def gradient(trainable: Any, metrics: Any, batch: Any, counts: Any) -> Any:
            if clipping is None:
                return *differentiate(trainable, metrics, batch), counts

            def one(metrics: Any, example: Any) -> Any:
                return differentiate(trainable, metrics, example)[:3]

            found = clip_examples(clipping, batch, trainable, one, metrics)
            counts = add_counts(counts, found.counts)
            return found.carried, found.gradients, found.loss, found.examples, counts

        def slope(sums: Any, batch: Any) -> Any:
            x, y = split(batch)
            with tf.GradientTape() as tape:
                tape.watch(initial)
                output = model.predict_on_batch((initial, fixed), x, training=False)
                loss = model.loss(output=output, label=y)
            return add_slope(sums, tape.gradient(loss, initial), initial, count(output))

        def step(state: Any, batch: Any) -> Any:
            trainable, optimizer_state, metrics, sums, counts, seen, steps = state
            metrics, gradients, loss, examples, counts = gradient(trainable, metrics, batch, counts)
            seen = add_gradients(seen, gradients, trainable)
            gradients = client_memory.correct(memory, gradients, trainable, context)
            optimizer_state, trainable = optimizer.next(optimizer_state, trainable, gradients)
            sums = add_loss(sums, loss if loss_at == "training" else None, examples)
            return trainable, optimizer_state, metrics, sums, counts, seen, steps + 1

        fresh = model.initialize_metrics_state()
        state = (
            initial,
            _start(optimizer, initial, hparams, memory, context),
            fresh,
            _no_loss(),
            _no_counts(clipping),
            _no_gradients(memory, initial),
            tf.constant(0),
        )
        trained, end, metrics, sums, counts, seen, steps = _fold(loop, dataset, state, step)
        initial_gradient = ()
        if memory is not None and memory.initial_gradient:
            initial_gradient = _mean_slope(_fold(loop, dataset, _no_slope(initial), slope))
        before = _fold(loop, dataset, _no_loss(), evaluate) if loss_at == "initial" else sums
        loss = _mean(before) if loss_at else None
        judged = _fold(loop, dataset, (_no_loss(),) * len(models), judge) if models else ()
        errors = [_mean(one) for one in judged]
        remembered = _finish(memory, context, trained, steps, seen, initial_gradient, end)
        return Trained(
            initial, trained, loss, steps, sums[1], metrics, fresh, counts, errors, remembered
        )

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


# A function made while AutoGraph looks on is not converted once more in a dataset's reduction, and
# then Python's own control flow in a model would not be either.
@tf.autograph.experimental.do_not_convert
def _with_context(step: Callable[[Any, Any, Any], Any], context: Any) -> Callable[[Any, Any], Any]:
    return lambda state, batch: step(context, state, batch)


def count(predictions: Any) -> tf.Tensor:
    """The examples in a batch, of a model's predictions or any structure of them."""
    return tf.shape(tf.nest.flatten(predictions)[0])[0]


def add_loss(sums: Any, loss: Any, examples: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Adds a batch's loss, whatever its shape, times its examples; and its examples."""
    total, seen = sums
    if loss is not None:
        loss = tf.cast(loss, tf.float32)
        if loss.shape.rank != 0:
            loss = tf.reduce_mean(loss)
        # A batch without examples has a mean that is no number, and no part in the sum.
        total += tf.math.multiply_no_nan(loss, tf.cast(examples, tf.float32))
    return total, seen + tf.cast(examples, tf.int64)


def _no_counts(clipping: ExampleClipping | None) -> Any:
    return OrderedDict() if clipping is None else no_counts()


def add_counts(total: Any, found: Any) -> Any:
    """Adds a batch's counts of clipping."""
    return tf.nest.map_structure(tf.add, total, found)


def _no_loss() -> tuple[tf.Tensor, tf.Tensor]:
    return tf.constant(0.0), tf.constant(0, tf.int64)


def _mean(sums: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
    return tf.math.divide_no_nan(sums[0], tf.cast(sums[1], tf.float32))


def add_gradients(total: Any, gradients: Any, weights: Any) -> Any:
    """Adds a step's gradients, where they are summed."""
    if not total:
        return total
    dense = client_memory.densify(gradients, weights)
    return tuple(old + new for old, new in zip(total, dense, strict=True))


def _no_gradients(memory: ClientMemory | None, weights: Any) -> Any:
    if memory is None or not memory.mean_gradient:
        return ()
    return tuple(tf.zeros(w.shape, w.dtype) for w in weights)


def _no_slope(weights: Any) -> Any:
    return tuple(tf.zeros(w.shape, w.dtype) for w in weights), tf.constant(0, tf.int64)


def add_slope(sums: Any, gradients: Any, weights: Any, examples: tf.Tensor) -> Any:
    """Adds a batch's gradient times its examples, and its examples."""
    total, seen = sums
    dense = client_memory.densify(gradients, weights)
    weighted = tuple(
        old + tf.math.multiply_no_nan(g, tf.cast(examples, g.dtype))
        for old, g in zip(total, dense, strict=True)
    )
    return weighted, seen + tf.cast(examples, tf.int64)


def _mean_slope(sums: Any) -> Any:
    return tuple(tf.math.divide_no_nan(x, tf.cast(sums[1], x.dtype)) for x in sums[0])


def _start(
    optimizer: tff.learning.optimizers.Optimizer,
    trainable: tuple[Any, ...],
    hparams: Any,
    memory: ClientMemory | None,
    context: Context,
) -> Any:
    fresh = initial_state(optimizer, trainable, hparams)
    if memory is None:
        return fresh
    return optimizer.set_hparams(memory.start(fresh, context), hparams)


def _finish(
    memory: ClientMemory | None,
    context: Context,
    trained: Any,
    steps: tf.Tensor,
    seen: Any,
    initial_gradient: Any,
    optimizer_state: Any,
) -> Any:
    if memory is None:
        return ()
    mean = tuple(tf.math.divide_no_nan(x, tf.cast(steps, x.dtype)) for x in seen)
    done = Finished(trained, steps, mean, initial_gradient, optimizer_state)
    return memory.finish(context, done)


def initial_state(
    optimizer: tff.learning.optimizers.Optimizer, trainable: tuple[Any, ...], hparams: Any
) -> Any:
    """The optimizer's state at the start of a client's training."""
    specs = tuple(tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in trainable)
    return optimizer.set_hparams(optimizer.initialize(specs), hparams)
