"""A client's training, with its loss and steps kept: TFF's own loops report neither per client."""

import functools
from collections import OrderedDict
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.client import sums as sums_of
from aggregators.client.batch_rows import take_rows
from aggregators.client.example_clipping import add_counts, clip_examples, no_counts
from aggregators.client.model_adapters import Output, adapter_of
from aggregators.client.task import Given, Task, Trained, Training, fold
from aggregators.core.candidates import errors_of_batch, mean_errors, no_errors
from aggregators.core.client_memory import Finished, densify


def build_training(model_fn: Any, task: Task) -> Training:
    """Builds the training of one client: `Given -> Trained`.

    One optimizer step per batch, as `tff.learning.templates.build_model_delta_client_work` takes. The
    data set's first pass is the training's: a data set that shuffles gives each pass another order. A
    second pass measures all that is not measured while the client trains: the loss and the gradient of
    the weights that training started from, and the errors of candidates.

    Args:
      model_fn: Function of nothing that makes a `tff.learning.models.VariableModel`, or a
        `tff.learning.models.FunctionalModel`.
      task: How the client trains, and what is measured.

    Returns:
      A function to be called while a graph is built.
    """
    model = adapter_of(model_fn)
    clipping, memory = task.clipping, task.memory
    sums_gradients = memory is not None and memory.mean_gradient
    wants_gradient = memory is not None and memory.initial_gradient
    wants_loss = task.loss_at == "initial"

    def differentiate(held: Any, batch: Any, *, training: bool) -> tuple[Any, Output]:
        weights = model.trainable(held)
        with tf.GradientTape() as tape:
            tape.watch([w for w in weights if not isinstance(w, tf.Variable)])
            output = model.forward(held, batch, training=training)
        return tape.gradient(output.loss, weights), output

    def gradient(held: Any, metrics: Any, batch: Any, moment: Any) -> Any:
        """The gradient of a batch, its loss and examples, the metrics, and what clipping counted."""
        if clipping is None:
            gradients, output = differentiate(held, batch, training=True)
            metrics = model.update_metrics(metrics, output)
            return gradients, output.loss, output.examples, metrics, no_counts(None)

        def one(example: Any) -> Any:
            gradients, output = differentiate(held, example, training=True)
            return gradients, output.loss

        weights = model.trainable(held)
        found = model.without_metrics(
            lambda: clip_examples(clipping, batch, weights, one, moment=moment)
        )

        def see_batch() -> Any:
            rows = take_rows(batch, clipping.shared_parts, lambda x: tf.boolean_mask(x, found.kept))
            output = model.forward(held, rows, training=True)
            return found.examples, model.update_metrics(metrics, output)

        # A branch has to give something, also where the metrics are the model's own.
        examples, metrics = tf.cond(
            found.examples > 0, see_batch, lambda: (found.examples, metrics)
        )
        return found.gradients, found.loss, examples, metrics, found.counts

    def step(given: Given, correct: Any, state: Any, batch: Any) -> Any:
        held, optimizer_state, metrics, sums, counts, seen, steps = state
        moment = (*given.moment, steps)
        gradients, loss, examples, metrics, found = gradient(held, metrics, batch, moment)
        trainable = model.trainable(held)
        if sums_gradients:
            seen = sums_of.add_step(seen, tuple(densify(gradients, trainable)))
        gradients = correct(gradients, trainable)
        optimizer_state, updated = task.next(optimizer_state, trainable, gradients)
        held = model.assign(held, updated)
        losses = sums_of.loss_of_batch(loss) if task.loss_at == "training" else ()
        sums = sums_of.add_batch(sums, losses, examples)
        return held, optimizer_state, metrics, sums, add_counts(counts, found), seen, steps + 1

    def measure(given: Given, held: Any, sums: Any, batch: Any) -> Any:
        """One batch of the second pass."""
        means, errors = sums
        found: OrderedDict[str, Any] = OrderedDict(loss=(), gradient=())
        judged = []
        examples: Any = None
        initial = tuple(tf.nest.flatten(given.weights.trainable))
        if wants_gradient or wants_loss:
            if given.models:  # else no other weights have been there
                held = model.assign(held, initial)
            if wants_gradient:
                gradients, output = differentiate(held, batch, training=False)
                found["gradient"] = tuple(densify(gradients, initial))
            else:
                output = model.forward(held, batch, training=False)
            if wants_loss:
                found["loss"] = sums_of.loss_of_batch(output.loss)
            examples = output.examples
        for candidate in given.models:
            output = model.forward(model.assign(held, candidate), batch, training=False)
            judged.append(errors_of_batch(task.error, *output))
            examples = output.examples
        errors = tf.nest.map_structure(tf.add, errors, tuple(judged))
        return sums_of.add_batch(means, found, examples), errors

    @tf.function(autograph=False)
    def train(given: Given) -> Trained:
        initial = tuple(tf.nest.flatten(given.weights.trainable))
        held = model.start(given.weights)
        metrics = model.start_metrics()
        fresh = model.report_metrics(metrics)
        state = (
            held,
            task.start(model.trainable(held), given.hparams, given.context),
            metrics,
            sums_of.no_sum(sums_of.SCALAR if task.loss_at == "training" else ()),
            no_counts(clipping),
            sums_of.no_sum(initial) if sums_gradients else (),
            tf.constant(0),
        )
        one = functools.partial(step, given, task.correction(given.context))
        state = fold(task.loop, given.dataset, state, one)
        held, end, metrics, sums, counts, seen, steps = state
        trained = tuple(tf.identity(w) for w in model.trainable(held))
        metrics = model.report_metrics(metrics)
        losses, examples = sums_of.mean(sums), sums[1]

        found = OrderedDict(
            loss=sums_of.SCALAR if wants_loss else (),
            gradient=initial if wants_gradient else (),
        )
        errors: Any = (no_errors(),) * len(given.models)
        if tf.nest.flatten((found, errors)):
            look = functools.partial(measure, given, model.start(given.weights))
            nothing = (sums_of.no_sum(found), errors)
            looked, errors = fold(task.loop, given.dataset, nothing, look, after=steps)
            found = sums_of.mean(looked)

        mean_gradient = sums_of.mean(seen) if sums_gradients else ()
        done = Finished(trained, steps, mean_gradient, found["gradient"], end)
        return Trained(
            initial=initial,
            trained=trained,
            loss={"training": losses, "initial": found["loss"], None: None}[task.loss_at],
            steps=steps,
            examples=examples,
            metrics=metrics,
            fresh_metrics=fresh,
            counts=counts,
            errors=mean_errors(errors) if given.models else None,
            remembered=task.finish(given.context, done),
        )

    return train


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


# By the package that an optimizer, or what makes it, is from.
_ADVICE = {
    "keras": "Make one of it with `tff_optim.build_keras_optimizer`.",
    "optax": "Make one of it with `tff_optim.build_optax_optimizer`.",
    "torch": "Make one of it with `tff_optim.build_torch_optimizer`.",
    "tensorflow_federated": "Call it: what it returns is one.",
}


def check_optimizer(argument: str, optimizer: Any) -> None:
    """Raises `TypeError` for anything that is not TFF's kind of optimizer."""
    if isinstance(optimizer, tff.learning.optimizers.Optimizer):
        return
    made_by = getattr(optimizer, "func", optimizer)  # of a partial
    advice = _ADVICE.get(
        str(getattr(made_by, "__module__", None)).partition(".")[0],
        "TFF's own are made by `tff.learning.optimizers`, and those of Keras, optax or torch by "
        "`tff_optim.build_keras_optimizer`, `build_optax_optimizer` or `build_torch_optimizer`.",
    )
    raise TypeError(
        f"`{argument}` must be a tff.learning.optimizers.Optimizer; found {optimizer!r}. {advice}"
    )
