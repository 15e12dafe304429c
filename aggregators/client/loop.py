"""A client's training loop, which reports loss and steps per client; TFF's own loops do not."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.client import sums as sums_of
from aggregators.client.batch_rows import take_rows
from aggregators.client.example_clipping import (
    ExampleClipping,
    add_counts,
    clip_examples,
    no_counts,
)
from aggregators.client.model_adapters import Held, Output, adapter_of
from aggregators.core.autograph import with_autograph
from aggregators.core.candidates import Models, errors_of_batch, mean_errors, no_errors
from aggregators.core.needs import Needs
from aggregators.core.stateful_client import (
    Context,
    GradientCorrection,
    Trained,
    correction,
    densify,
)
from aggregators.core.types import (
    Batch,
    Gradients,
    Hyperparameters,
    Metrics,
    ModelFn,
    ModelWeights,
    Optimizer,
    OptimizerState,
    Structure,
    Tensors,
    Weights,
)

Loop: TypeAlias = tff.learning.LoopImplementation
_Step: TypeAlias = Callable[[Structure, Batch], Structure]


def build_loop(
    model_fn: ModelFn,
    optimizer: Optimizer,
    needs: Needs,
    loop: Loop,
    clipping: ExampleClipping | None,
) -> Callable[..., Trained]:
    """Builds the training of one client.

    It takes one optimizer step per batch, as `tff.learning.templates.build_model_delta_client_work`
    does. Training takes the first pass over the data set, since each pass over a shuffled data set has
    another order. A second pass takes the measurements that training does not: the loss and gradient
    at the initial weights, and the errors of candidates.

    Args:
      model_fn: A function of no arguments that makes a `tff.learning.models.VariableModel`, or a
        `tff.learning.models.FunctionalModel`.
      optimizer: The client's optimizer.
      needs: The measurements, and how the client uses a state of its own.
      loop: `dataset.reduce` or a loop over the dataset's iterator.
      clipping: How each example's gradient is clipped; None uses the batch's gradient as it is.

    Returns:
      A function `(weights, dataset, hparams, models, context, noise_position) -> Trained`, to be called
      while a graph is built. Its arguments are the model's weights, the client's data, the optimizer's
      hyperparameters, flat candidates to score, a `Context` (None for a client that keeps nothing), and
      whole numbers that locate this training in a run, for seeded noise.
    """
    model = adapter_of(model_fn)
    stateful, candidates = needs.stateful_client, needs.candidates
    sums_gradients = stateful is not None and stateful.mean_gradient
    wants_gradient = stateful is not None and stateful.initial_gradient
    wants_loss = needs.loss == "initial"
    next_step = with_autograph(optimizer.next)

    def differentiate(held: Held, batch: Batch, *, training: bool) -> tuple[Gradients, Output]:
        weights = model.trainable(held)
        with tf.GradientTape() as tape:
            tape.watch([w for w in weights if not isinstance(w, tf.Variable)])
            output = model.forward(held, batch, training=training)
        return tape.gradient(output.loss, weights), output

    def gradient(held: Held, metrics: Metrics, batch: Batch, noise_position: Tensors) -> Structure:
        """A batch's gradient, loss and number of examples, the metrics, and the counts of clipping."""
        if clipping is None:
            gradients, output = differentiate(held, batch, training=True)
            metrics = model.update_metrics(metrics, output)
            return gradients, output.loss, output.examples, metrics, no_counts(None)

        def one(example: Batch) -> tuple[Gradients, tf.Tensor]:
            gradients, output = differentiate(held, example, training=True)
            return gradients, output.loss

        weights = model.trainable(held)
        found = model.without_metrics(
            lambda: clip_examples(clipping, batch, weights, one, noise_position=noise_position)
        )

        # Branches and loops must return something, even if the model keeps its own metrics.
        seen = found.examples, metrics

        def see(rows: Batch) -> tuple[tf.Tensor, Metrics]:
            output = model.forward(held, rows, training=True)
            return found.examples, model.update_metrics(metrics, output)

        def see_kept() -> tuple[tf.Tensor, Metrics]:
            # A mask has another shape for each client, and could not be vectorised. So a loop goes
            # through the numbers of rows that might be kept.
            size, count = tf.size(found.kept), tf.cast(found.kept, tf.int32)
            order = tf.math.unsorted_segment_sum(
                count * tf.range(size), tf.maximum(tf.cumsum(count) - 1, 0), size
            )
            kept_first = take_rows(batch, clipping.shared_parts, lambda x: tf.gather(x, order))

            def turn(number: tf.Tensor, seen: Structure) -> Structure:
                rows = take_rows(kept_first, clipping.shared_parts, lambda x: x[:number])
                return number + 1, tf.cond(
                    tf.equal(number, found.examples), lambda: see(rows), lambda: seen
                )

            start = (tf.constant(1), seen)
            return tf.while_loop(lambda number, seen: number < size, turn, start)[1]

        all_kept = (found.examples > 0) & tf.reduce_all(found.kept)
        examples, metrics = tf.cond(all_kept, lambda: see(batch), see_kept)
        return found.gradients, found.loss, examples, metrics, found.counts

    def step(
        noise_position: Tensors, correct: GradientCorrection, state: Structure, batch: Batch
    ) -> Structure:
        held, optimizer_state, metrics, sums, counts, seen, steps = state
        gradients, loss, examples, metrics, found = gradient(
            held, metrics, batch, (*noise_position, steps)
        )
        trainable = model.trainable(held)
        if sums_gradients:
            seen = sums_of.add_step(seen, tuple(densify(gradients, trainable)))
        gradients = correct(gradients, trainable)
        optimizer_state, updated = next_step(optimizer_state, trainable, gradients)
        held = model.assign(held, updated)
        losses = sums_of.loss_of_batch(loss) if needs.loss == "training" else ()
        sums = sums_of.add_batch(sums, losses, examples)
        return held, optimizer_state, metrics, sums, add_counts(counts, found), seen, steps + 1

    def measure(
        initial: Weights, models: Models, held: Held, sums: Structure, batch: Batch
    ) -> Structure:
        """One batch of the second pass."""
        means, errors = sums
        found: OrderedDict[str, Structure] = OrderedDict(loss=(), gradient=())
        judged = []
        examples: tf.Tensor | None = None
        if wants_gradient or wants_loss:
            if models:  # scoring the candidates has assigned theirs
                held = model.assign(held, initial)
            if wants_gradient:
                gradients, output = differentiate(held, batch, training=False)
                found["gradient"] = tuple(densify(gradients, initial))
            else:
                output = model.forward(held, batch, training=False)
            if wants_loss:
                found["loss"] = sums_of.loss_of_batch(output.loss)
            examples = output.examples
        for candidate in models:
            output = model.forward(model.assign(held, candidate), batch, training=False)
            judged.append(errors_of_batch(candidates.error, *output))  # type: ignore[union-attr]
            examples = output.examples
        errors = tf.nest.map_structure(tf.add, errors, tuple(judged))
        return sums_of.add_batch(means, found, examples), errors

    @tf.function(autograph=False)
    def train(
        weights: ModelWeights,
        dataset: tf.data.Dataset,
        hparams: Hyperparameters,
        models: Models,
        context: Context | None,
        noise_position: Tensors,
    ) -> Trained:
        initial = tuple(tf.nest.flatten(weights.trainable))
        held = model.start(weights)
        metrics = model.start_metrics()
        fresh = model.report_metrics(metrics)
        optimizer_state = initial_state(optimizer, model.trainable(held), hparams)
        if stateful is not None:
            kept = with_autograph(stateful.start)(optimizer_state, context)
            optimizer_state = optimizer.set_hparams(kept, hparams)
        state = (
            held,
            optimizer_state,
            metrics,
            sums_of.no_sum(sums_of.SCALAR if needs.loss == "training" else ()),
            no_counts(clipping),
            sums_of.no_sum(initial) if sums_gradients else (),
            tf.constant(0),
        )
        one = functools.partial(step, noise_position, correction(stateful, context))
        state = fold(loop, dataset, state, one)
        held, end, metrics, sums, counts, seen, steps = state
        trained = tuple(tf.identity(w) for w in model.trainable(held))
        metrics = model.report_metrics(metrics)
        losses, examples = sums_of.mean(sums), sums[1]

        found = OrderedDict(
            loss=sums_of.SCALAR if wants_loss else (),
            gradient=initial if wants_gradient else (),
        )
        errors: Structure = (no_errors(),) * len(models)
        if tf.nest.flatten((found, errors)):
            look = functools.partial(measure, initial, models, model.start(weights))
            nothing = (sums_of.no_sum(found), errors)
            looked, errors = fold(loop, dataset, nothing, look, after=steps)
            found = sums_of.mean(looked)
        return Trained(
            weights=trained,
            steps=steps,
            mean_gradient=sums_of.mean(seen) if sums_gradients else (),
            initial_gradient=found["gradient"],
            optimizer_state=() if stateful is None else end,
            examples=examples,
            loss={"training": losses, "initial": found["loss"], None: None}[needs.loss],
            errors=mean_errors(errors) if models else None,
            metrics=metrics,
            fresh_metrics=fresh,
            counts=counts,
        )

    return train


def initial_state(
    optimizer: Optimizer, trainable: Weights, hparams: Hyperparameters
) -> OptimizerState:
    """The state of an optimizer before its first step."""
    specs = tuple(tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in trainable)
    return optimizer.set_hparams(optimizer.initialize(specs), hparams)


def fold(
    loop: Loop, dataset: tf.data.Dataset, state: Structure, step: _Step, after: Structure = ()
) -> Structure:
    """Folds a dataset's batches into a state: `step(state, batch) -> state`.

    Args:
      loop: `dataset.reduce` or a loop over the dataset's iterator.
      dataset: The batches.
      state: The state before the first batch.
      step: The function of one batch.
      after: Tensors of earlier folds of the dataset. A shuffled dataset draws an order whenever an
        iterator is made, so iterators must be made in a fixed order for runs to be repeatable.
    """
    with tf.control_dependencies(tf.nest.flatten(after)):
        if loop is Loop.DATASET_REDUCE:
            return dataset.reduce(state, tf.autograph.experimental.do_not_convert(step))
        iterator = iter(dataset)
        _, state = tf.while_loop(
            lambda batch, state: batch.has_value(),
            lambda batch, state: (iterator.get_next_as_optional(), step(state, batch.get_value())),
            (iterator.get_next_as_optional(), state),
        )
        return state
