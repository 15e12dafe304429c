"""The clients' part of a round: they train, measure and send."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.client.example_clipping import ExampleClipping, check_examples_are_apart
from aggregators.client.loop import Loop, build_loop, initial_state
from aggregators.core import checks
from aggregators.core.autograph import with_autograph
from aggregators.core.candidates import Models
from aggregators.core.layers import ModelLayers, names_of_variables
from aggregators.core.needs import Needs
from aggregators.core.score import score_layers
from aggregators.core.stateful_client import Context
from aggregators.core.types import (
    Hyperparameters,
    Metrics,
    MetricsAggregator,
    ModelFn,
    ModelWeights,
    Optimizer,
    State,
    Structure,
    Tensors,
)
from aggregators.core.update import ClientUpdate, client_update

ClientWeighting: TypeAlias = tff.learning.ClientWeighting


class ClientOutput(NamedTuple):
    """The result of one client's work.

    Attributes:
      update: Its `ClientUpdate`.
      metrics: The model's unfinalized metrics; those of no example if the update is not finite.
      counts: Counts of clipping; empty without clipping.
      state: The client's state for its next round; empty if it keeps none.
    """

    update: ClientUpdate
    metrics: Metrics
    counts: Structure
    state: State


@attrs.frozen
class ClientTraining:
    """The clients' part of a round for one model, optimizer and `Needs`, checked.

    Attributes:
      model_fn: A functional model, or a function that makes a variable model.
      optimizer: The clients' optimizer.
      needs: The measurements.
      client_weighting: By number of examples, or uniform.
      metrics_aggregator: From the model's metric finalizers to a computation over clients.
      loop_implementation: `dataset.reduce` or a loop over the dataset's iterator.
      example_clipping: How each example's gradient is clipped; None for not at all.
    """

    model_fn: ModelFn
    optimizer: Optimizer
    needs: Needs
    client_weighting: ClientWeighting
    metrics_aggregator: MetricsAggregator | None
    loop_implementation: Loop
    example_clipping: ExampleClipping | None = None

    def __attrs_post_init__(self) -> None:
        check_model_fn(self.model_fn)
        checks.instance("client_weighting", self.client_weighting, ClientWeighting)
        checks.instance("loop_implementation", self.loop_implementation, Loop)
        if self.example_clipping is not None:
            checks.instance("example_clipping", self.example_clipping, ExampleClipping)
            check_examples_are_apart(self.model_fn, self.example_clipping)

    def hparams(self) -> Hyperparameters:
        """The optimizer's hyperparameters, Python or NumPy numbers."""
        return self.optimizer.get_hparams(self.optimizer.initialize(tf.TensorSpec((), tf.float32)))

    def types(self) -> "ModelTypes":
        """The model's types, the names of its weights, and the aggregation of its metrics."""
        model_fn, names = self.model_fn, None
        metrics_aggregator = self.metrics_aggregator or tff.learning.metrics.sum_then_finalize
        if isinstance(model_fn, tff.learning.models.FunctionalModel):
            model = model_fn
            weights = tff.learning.models.ModelWeights(
                *(
                    tuple(tf.TensorSpec(w.shape, tf.as_dtype(w.dtype)) for w in part)
                    for part in model.initial_weights
                )
            )
            weights_type = tff.types.tensorflow_to_type(weights)
            finalizers = model.finalize_metrics
        else:
            with tf.Graph().as_default():  # the model's variables must not outlive this
                model = model_fn()
                if not isinstance(model, tff.learning.models.VariableModel):
                    raise TypeError(
                        "`model_fn` must make a tff.learning.models.VariableModel; "
                        f"found {type(model)}."
                    )
                finalizers = model.metric_finalizers()
                weights_type = tff.learning.models.weights_type_from_model(model)
                names = names_of_variables(tf.nest.flatten(model.trainable_variables))
        with tf.Graph().as_default():
            aggregate = metrics_aggregator(finalizers)
        data_type = tff.types.SequenceType(tff.types.tensorflow_to_type(model.input_spec))
        return ModelTypes(weights_type, data_type, names, aggregate)

    def work(self, layers: ModelLayers) -> Callable[..., ClientOutput]:
        """The work of one client: `(weights, dataset, hparams, rule_state, load, noise_position)`.

        `load` returns the client's state, given that of a new client. `noise_position` is whole numbers
        such as round and client; see `loop.build_loop`.

        Call it while the training graph is built: it makes the model there.
        """
        needs = self.needs
        candidates = needs.candidates
        train = build_loop(
            self.model_fn, self.optimizer, needs, self.loop_implementation, self.example_clipping
        )

        def run(
            weights: ModelWeights,
            dataset: tf.data.Dataset,
            hparams: Hyperparameters,
            rule_state: State,
            load: Callable[[State], State] = lambda fresh: fresh,
            noise_position: Tensors = (),
        ) -> ClientOutput:
            trainable = tuple(tf.nest.flatten(weights.trainable))
            models: Models = ()
            if candidates is not None:
                models = candidates.of(trainable, rule_state)
            context = None
            if needs.stateful_client is not None:
                start = initial_state(self.optimizer, trainable, hparams)
                fresh = needs.stateful_client.initial_state(trainable, start)
                context = Context(load(fresh), rule_state, trainable)
            done = train(weights, dataset, hparams, models, context, noise_position)
            measured: dict[str, Structure] = {"loss": done.loss}
            if needs.score is not None:
                measured["scores"] = score_layers(
                    needs.score, trainable, done.weights, layers.groups
                )
            if needs.steps:
                measured["steps"] = done.steps
            if done.errors is not None:
                measured["candidate_errors"], measured["errors_are_losses"] = done.errors
            if self.client_weighting is ClientWeighting.NUM_EXAMPLES:
                weight = tf.cast(done.examples, tf.float64)
            else:
                # Without examples, score and loss are 0 and look like the best.
                weight = tf.cast(done.examples > 0, tf.float64)
            delta = [old - new for old, new in zip(trainable, done.weights, strict=True)]
            kept: State = OrderedDict()
            if context is not None:
                kept, measured["sent"] = with_autograph(needs.stateful_client.finish)(context, done)  # type: ignore[union-attr]
            update = client_update(delta, weight, also=tf.nest.flatten(kept), **measured)
            if context is not None:
                counts = update.weight > 0
                kept = tf.nest.map_structure(
                    lambda new, old: tf.where(counts, new, old), kept, context.state
                )
            metrics = tf.nest.map_structure(
                lambda fresh, new: tf.where(update.non_finite, fresh, new),
                done.fresh_metrics,
                done.metrics,
            )
            return ClientOutput(update, metrics, done.counts, kept)

        return run


class ModelTypes(NamedTuple):
    """A model's types and names.

    Attributes:
      weights: TFF type of the model's weights.
      data: TFF type of a client's dataset.
      names: Names of the trainable weights; None for a functional model, which has no names.
      aggregate_metrics: Computation from the clients' unfinalized metrics to the server's metrics.
    """

    weights: tff.Type
    data: tff.Type
    names: Sequence[str] | None
    aggregate_metrics: tff.Computation


def check_model_fn(model_fn: object) -> None:
    """Raises `TypeError` unless this is a functional model, or may make a variable model."""
    if isinstance(model_fn, tff.learning.models.FunctionalModel):
        return
    if not callable(model_fn) or isinstance(model_fn, tf.keras.Model):
        raise TypeError(
            "`model_fn` must be a function that makes a tff.learning.models.VariableModel, or a "
            f"tff.learning.models.FunctionalModel; found {model_fn!r}. For a Keras model, return "
            "`tff.learning.models.from_keras_model(...)` from a function of no arguments, or call "
            "`tff.learning.models.functional_model_from_keras`."
        )


# By the package that an optimizer, or its factory, is from.
_ADVICE = {
    "keras": "Wrap it with `tff_optim.build_keras_optimizer`.",
    "optax": "Wrap it with `tff_optim.build_optax_optimizer`.",
    "torch": "Wrap it with `tff_optim.build_torch_optimizer`.",
    "tensorflow_federated": "Call it, and give what it returns.",
}


def check_optimizer(argument: str, optimizer: object) -> None:
    """Raises `TypeError` for anything but a TFF optimizer."""
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
