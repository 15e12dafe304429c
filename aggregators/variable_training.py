"""The training of one client on a model that keeps its weights in variables."""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.candidates import error_of_batch, labels_of
from aggregators.client_memory import Finished
from aggregators.client_task import Given, Task, Trained, Training, fold
from aggregators.example_clipping import add_counts, clip_examples, no_counts
from aggregators.training_sums import (
    add_gradients,
    add_loss,
    add_slope,
    count,
    mean_gradient,
    mean_loss,
    mean_slope,
    no_gradients,
    no_loss,
    no_slope,
)
from aggregators.user_code import as_written


def build_variable_training(
    model_fn: Callable[[], tff.learning.models.VariableModel], task: Task
) -> Training:
    """See `training.build_training`; the model is made here, once."""
    model = model_fn()
    variables = tff.learning.models.ModelWeights.from_model(model)
    trainable = tuple(tf.nest.flatten(variables.trainable))
    memory = task.memory

    def examples_in(output: Any) -> tf.Tensor:
        examples = output.num_examples
        if examples is None:
            examples = count(output.predictions)
        return tf.cast(examples, tf.int64)

    def evaluate(sums: Any, batch: Any) -> Any:
        output = as_written(model.forward_pass)(batch, training=False)
        return add_loss(sums, output.loss, examples_in(output))

    def judge(sums: Any, batch: Any) -> Any:
        output = as_written(model.forward_pass)(batch, training=False)
        found = error_of_batch(task.error, output.loss, output.predictions, labels_of(batch))
        return add_loss(sums, found, examples_in(output))

    def assign(weights: Any) -> None:
        for variable, value in zip(trainable, weights, strict=True):
            variable.assign(value)

    def differentiate(batch: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            output = as_written(model.forward_pass)(batch, training=True)
        return tape.gradient(output.loss, trainable), output

    def one(carried: Any, example: Any) -> Any:
        gradients, output = differentiate(example)
        return carried, gradients, output.loss

    def gradient(batch: Any, counts: Any, moment: Any) -> Any:
        if task.clipping is None:
            gradients, output = differentiate(batch)
            return gradients, output.loss, examples_in(output), counts
        found = clip_examples(task.clipping, batch, trainable, one, moment=moment)
        return found.gradients, found.loss, found.examples, add_counts(counts, found.counts)

    def slope(sums: Any, batch: Any) -> Any:
        with tf.GradientTape() as tape:
            output = as_written(model.forward_pass)(batch, training=False)
        gradients = tape.gradient(output.loss, trainable)
        return add_slope(sums, gradients, trainable, examples_in(output))

    def step(given: Given, correct: Any, state: Any, batch: Any) -> Any:
        optimizer_state, sums, counts, seen, steps = state
        gradients, loss, examples, counts = gradient(batch, counts, (*given.moment, steps))
        seen = add_gradients(seen, gradients, trainable)
        gradients = correct(gradients, trainable)
        optimizer_state, updated = task.next(optimizer_state, trainable, gradients)
        assign(updated)
        sums = add_loss(sums, loss if task.loss_at == "training" else None, examples)
        return optimizer_state, sums, counts, seen, steps + 1

    @tf.function(autograph=False)
    def train(given: Given) -> Trained:
        weights, dataset, context = given.weights, given.dataset, given.context
        tf.nest.map_structure(lambda variable, value: variable.assign(value), variables, weights)
        fresh = as_written(model.report_local_unfinalized_metrics)()
        before: Any = ()
        errors: list[tf.Tensor] = []
        for candidate in given.models:
            assign(candidate)
            errors.append(mean_loss(fold(task.loop, dataset, no_loss(), judge, after=errors)))
        if given.models:
            assign(tf.nest.flatten(weights.trainable))
            as_written(model.reset_metrics)()
        if task.loss_at == "initial":
            before = fold(task.loop, dataset, no_loss(), evaluate, after=errors)
            as_written(model.reset_metrics)()
        initial_gradient = ()
        if memory is not None and memory.initial_gradient:
            slopes = fold(task.loop, dataset, no_slope(trainable), slope, after=(errors, before))
            initial_gradient = mean_slope(slopes)
            as_written(model.reset_metrics)()
        start = task.start(trainable, given.hparams, context)
        wanted = memory is not None and memory.mean_gradient
        seen = no_gradients(trainable) if wanted else ()
        state = (start, no_loss(), no_counts(task.clipping), seen, tf.constant(0))
        training = functools.partial(step, given, task.correction(context))
        after = (errors, before, initial_gradient)
        state = fold(task.loop, dataset, state, training, after=after)
        end, sums, counts, seen, steps = state
        trained = tuple(variable.read_value() for variable in trainable)
        done = Finished(trained, steps, mean_gradient(seen, steps), initial_gradient, end)
        return Trained(
            initial=tuple(tf.nest.flatten(weights.trainable)),
            trained=trained,
            loss=mean_loss(before or sums) if task.loss_at else None,
            steps=steps,
            examples=sums[1],
            metrics=as_written(model.report_local_unfinalized_metrics)(),
            fresh_metrics=fresh,
            counts=counts,
            errors=errors,
            remembered=task.finish(context, done),
        )

    return train
