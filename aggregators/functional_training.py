"""The training of one client on a functional model: weights and metrics go from step to step."""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.candidates import error_of_batch
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


def build_functional_training(model: tff.learning.models.FunctionalModel, task: Task) -> Training:
    """See `training.build_training`."""
    memory = task.memory
    # TFF takes nothing but a `tf.function` as the two others of a functional model.
    update_metrics = as_written(model.update_metrics_state)

    def split(batch: Any) -> tuple[Any, Any]:
        return (batch["x"], batch["y"]) if isinstance(batch, Mapping) else tuple(batch)

    @tf.function(autograph=False)
    def train(given: Given) -> Trained:
        dataset, context = given.dataset, given.context
        initial, fixed = tuple(given.weights.trainable), tuple(given.weights.non_trainable)

        def evaluate(sums: Any, batch: Any) -> Any:
            x, y = split(batch)
            output = model.predict_on_batch((initial, fixed), x, training=False)
            return add_loss(sums, model.loss(output=output, label=y), count(output))

        def judge(sums: Any, batch: Any) -> Any:
            x, y = split(batch)
            judged = []
            for one, candidate in zip(sums, given.models, strict=True):
                output = model.predict_on_batch((candidate, fixed), x, training=False)
                loss = model.loss(output=output, label=y)
                found = error_of_batch(task.error, loss, output, y)
                judged.append(add_loss(one, found, count(output)))
            return tuple(judged)

        def differentiate(trainable: Any, metrics: Any, batch: Any) -> Any:
            x, y = split(batch)
            with tf.GradientTape() as tape:
                tape.watch(trainable)
                output = model.predict_on_batch((trainable, fixed), x, training=True)
                loss = model.loss(output=output, label=y)
            gradients = tape.gradient(loss, trainable)
            metrics = update_metrics(
                metrics,
                labels=y,
                batch_output=tff.learning.models.BatchOutput(
                    loss=loss, predictions=output, num_examples=count(output)
                ),
            )
            return metrics, gradients, loss, count(output)

        def gradient(trainable: Any, metrics: Any, batch: Any, counts: Any, moment: Any) -> Any:
            if task.clipping is None:
                return *differentiate(trainable, metrics, batch), counts

            def one(metrics: Any, example: Any) -> Any:
                return differentiate(trainable, metrics, example)[:3]

            found = clip_examples(task.clipping, batch, trainable, one, metrics, moment=moment)
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
            metrics, gradients, loss, examples, counts = gradient(
                trainable, metrics, batch, counts, (*given.moment, steps)
            )
            seen = add_gradients(seen, gradients, trainable)
            gradients = correct(gradients, trainable)
            optimizer_state, trainable = task.next(optimizer_state, trainable, gradients)
            sums = add_loss(sums, loss if task.loss_at == "training" else None, examples)
            return trainable, optimizer_state, metrics, sums, counts, seen, steps + 1

        fresh = as_written(model.initialize_metrics_state)()
        correct = task.correction(context)
        wanted = memory is not None and memory.mean_gradient
        state = (
            initial,
            task.start(initial, given.hparams, context),
            fresh,
            no_loss(),
            no_counts(task.clipping),
            no_gradients(initial) if wanted else (),
            tf.constant(0),
        )
        state = fold(task.loop, dataset, state, step)
        trained, end, metrics, sums, counts, seen, steps = state
        initial_gradient = ()
        if memory is not None and memory.initial_gradient:
            slopes = fold(task.loop, dataset, no_slope(initial), slope, after=steps)
            initial_gradient = mean_slope(slopes)
        before = sums
        if task.loss_at == "initial":
            before = fold(task.loop, dataset, no_loss(), evaluate, after=(steps, initial_gradient))
        judged: Any = ()
        if given.models:
            none = (no_loss(),) * len(given.models)
            judged = fold(task.loop, dataset, none, judge, after=(steps, initial_gradient, before))
        done = Finished(trained, steps, mean_gradient(seen, steps), initial_gradient, end)
        return Trained(
            initial=initial,
            trained=trained,
            loss=mean_loss(before) if task.loss_at else None,
            steps=steps,
            examples=sums[1],
            metrics=metrics,
            fresh_metrics=fresh,
            counts=counts,
            errors=[mean_loss(one) for one in judged],
            remembered=task.finish(context, done),
        )

    return train
