"""Client work that trains as TFF's does, and measures what a rule needs."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.client.example_clipping import (
    ExampleClipping,
    check_clipping,
    check_examples_are_apart,
)
from aggregators.client.task import Given, Loop, Task, initial_state
from aggregators.client.training import build_training, check_model_fn, check_optimizer
from aggregators.core.client_memory import Context
from aggregators.core.layers import ModelLayers, layers_of_type, names_of_variables
from aggregators.core.needs import Needs
from aggregators.core.score import score_layers
from aggregators.core.update import ClientUpdate, MeasuredUpdate, client_update


class ClientOutput(NamedTuple):
    """What one client's work gives.

    Attributes:
      update: Its `ClientUpdate`.
      metrics: The model's unfinalized metrics; those of no example at all if the update is not
        finite.
      counts: Of clipping; empty without.
      state: What the client keeps for its next round; empty if the rule has it keep nothing.
    """

    update: ClientUpdate
    metrics: Any
    counts: Any
    state: Any


@attrs.frozen
class ClientTraining:
    """The clients' side of a round for one model, optimizer and `Needs`, checked.

    Attributes:
      model_fn: A functional model, or a function that makes a variable model.
      optimizer: The clients' optimizer.
      needs: What is measured.
      client_weighting: By number of examples, or uniform.
      metrics_aggregator: From the model's metric finalizers to a computation over clients.
      loop_implementation: `dataset.reduce` or a loop over the dataset's iterator.
      example_clipping: How each example's gradient is clipped; None for not at all.
    """

    model_fn: Any
    optimizer: tff.learning.optimizers.Optimizer
    needs: Needs
    client_weighting: tff.learning.ClientWeighting
    metrics_aggregator: Any
    loop_implementation: tff.learning.LoopImplementation
    example_clipping: ExampleClipping | None = None

    def __attrs_post_init__(self) -> None:
        check_model_fn(self.model_fn)
        for argument, kind in (
            ("client_weighting", tff.learning.ClientWeighting),
            ("loop_implementation", tff.learning.LoopImplementation),
        ):
            found = getattr(self, argument)
            if not isinstance(found, kind):
                raise TypeError(
                    f"`{argument}` must be a member of tff.learning.{kind.__name__}; found {found!r}."
                )

        check_clipping(self.example_clipping)
        if self.example_clipping is not None:
            check_examples_are_apart(self.model_fn, self.example_clipping)

    def hparams(self) -> Any:
        """The optimizer's hyperparameters, Python or NumPy numbers."""
        return self.optimizer.get_hparams(self.optimizer.initialize(tf.TensorSpec((), tf.float32)))

    def types(self) -> "ModelTypes":
        """The model's types, the names of its weights, and the aggregation of its metrics."""
        return _model_types(
            self.model_fn, self.metrics_aggregator or tff.learning.metrics.sum_then_finalize
        )

    def work(self, layers: ModelLayers) -> Callable[..., ClientOutput]:
        """The work of one client: `(weights, dataset, hparams, rule_state, load, moment) -> ...`.

        `load` gives the client's state, from one that it would have had at its first round; `moment`
        is where in the run it trains, see `client_task.Given`. The result is a `ClientOutput`.

        To be called where the graph is built that trains: the model is made there.
        """
        needs = self.needs
        candidates = needs.candidates
        task = Task(
            self.optimizer,
            needs.loss,
            self.loop_implementation,
            self.example_clipping,
            None if candidates is None else candidates.error,
            needs.memory,
        )
        train = build_training(self.model_fn, task)

        def run(
            weights: Any,
            dataset: Any,
            hparams: Any,
            rule_state: Any = None,
            load: Any = None,
            moment: Any = (),
        ) -> ClientOutput:
            trainable = tuple(tf.nest.flatten(weights.trainable))
            models: Any = ()
            if candidates is not None:
                models = candidates.of(trainable, rule_state)
            context = None
            if needs.memory is not None:
                start = initial_state(self.optimizer, trainable, hparams)
                fresh = needs.memory.initial_state(trainable, start)
                context = Context(load(fresh), rule_state, trainable)
            done = train(Given(weights, dataset, hparams, models, context, moment))
            measured: dict[str, Any] = {"loss": done.loss}
            if needs.score is not None:
                measured["scores"] = score_layers(
                    needs.score, done.initial, done.trained, layers.groups
                )
            if needs.steps:
                measured["steps"] = done.steps
            if candidates is not None:
                measured["candidate_errors"], measured["errors_are_losses"] = done.errors
            if self.client_weighting is tff.learning.ClientWeighting.NUM_EXAMPLES:
                weight = tf.cast(done.examples, tf.float64)
            else:
                # Without examples there is neither score nor loss, and zeros look like the best.
                weight = tf.cast(done.examples > 0, tf.float64)
            delta = [old - new for old, new in zip(done.initial, done.trained, strict=True)]
            kept: Any = OrderedDict()
            if context is not None:
                kept, measured["sent"] = done.remembered
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


def build_client_work(
    model_fn: Any,
    optimizer: tff.learning.optimizers.Optimizer,
    needs: Needs,
    *,
    client_weighting: tff.learning.ClientWeighting = tff.learning.ClientWeighting.NUM_EXAMPLES,
    metrics_aggregator: Any = None,
    loop_implementation: tff.learning.LoopImplementation = Loop.DATASET_ITERATOR,
) -> tff.learning.templates.ClientWorkProcess:
    """Trains as TFF's client work does, and sends what a rule needs with the update.

    Training, metrics and weights are those of
    `tff.learning.templates.build_model_delta_client_work` (or of its functional twin), number for
    number, but for one: a client without examples has weight 0 under uniform weighting too, since
    its score and its loss would be 0, the best of all. Scores are taken in the same computation,
    from the weights at hand.

    The update is a `MeasuredUpdate`, for `RuleFactory`. A client whose update or loss is not finite
    sends zeros with weight 0, and says so in `non_finite`. An update counts as finite up to a norm of
    2.6e19. `build_fed_avg` does all of this by itself.

    Args:
      model_fn: Function of nothing that makes a `tff.learning.models.VariableModel`, or a
        `tff.learning.models.FunctionalModel`.
      optimizer: The client's optimizer.
      needs: What to measure: `rule.needs`.
      client_weighting: By number of examples, or uniform.
      metrics_aggregator: As for `tff.learning.algorithms.build_weighted_fed_avg`.
      loop_implementation: How a client goes over its data. A loop over the dataset's iterator if not
        given: for a `dataset.reduce`, TFF's default, TensorFlow prepares the step anew for every
        client, which takes longer than the training of a small model.

    Returns:
      A `tff.learning.templates.ClientWorkProcess`. Its state is the optimizer's hyperparameters,
      for both kinds of model, and is what `get_hparams` gives; its measurements are `train`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If the layers do not fit the model.

    Example:
      >>> from aggregators import rules
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> sgd = tff.learning.optimizers.build_sgdm(0.1)
      >>> work = build_client_work(model, sgd, rules.fed_nova().needs)
      >>> str(work.next.type_signature.result.result.member.update.measured)
      '<steps=int32>'
    """
    if not isinstance(needs, Needs):
        raise TypeError(f"`needs` must be the `needs` of a `Rule`; found {needs!r}.")
    if needs.candidates is not None:
        raise ValueError(
            "`needs` must not ask for models scored before training, which are made of the rule's "
            f"state, and a client work does not see that; found {needs.candidates!r}. Build the whole "
            'process with `build_fed_avg(..., rule=rule)`; `jury_mean(votes="direction")` has no such '
            "need."
        )
    if needs.memory is not None:
        raise ValueError(
            "`needs` must not have clients keep a state, which a client work has no place for; found "
            f"{needs.memory!r}. Build the whole process with `build_fed_avg(..., rule=rule)`."
        )
    check_optimizer("optimizer", optimizer)
    training = ClientTraining(
        model_fn, optimizer, needs, client_weighting, metrics_aggregator, loop_implementation
    )
    types = training.types()
    layers = layers_of_type(needs.layers, types.weights.trainable, types.names)
    hparams = training.hparams()

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_value(hparams, tff.SERVER)

    state_type = initialize.type_signature.result.member

    @tff.tensorflow.computation(state_type, types.weights, types.data)
    def work(state: Any, weights: Any, dataset: Any) -> Any:
        output = training.work(layers)(weights, dataset, state, None)
        found = output.update
        measured = OrderedDict(
            (name, getattr(found, field)) for field, name in needs.fields.items()
        )
        result = tff.learning.templates.ClientResult(
            update=MeasuredUpdate(layers.pack(found.delta), measured, found.non_finite),
            update_weight=tf.cast(found.weight, tf.float32),
        )
        return result, output.metrics

    @tff.federated_computation(
        initialize.type_signature.result,
        tff.FederatedType(types.weights, tff.CLIENTS),
        tff.FederatedType(types.data, tff.CLIENTS),
    )
    def next_fn(state: Any, weights: Any, data: Any) -> Any:
        result, metrics = tff.federated_map(work, (tff.federated_broadcast(state), weights, data))
        measured = tff.federated_zip(OrderedDict(train=types.aggregate_metrics(metrics)))
        return tff.templates.MeasuredProcessOutput(state, result, measured)

    @tff.tensorflow.computation(state_type)
    def get_hparams(state: Any) -> Any:
        return state

    @tff.tensorflow.computation(state_type, state_type)
    def set_hparams(state: Any, new: Any) -> Any:
        del state  # it is nothing but the hyperparameters
        return new

    return tff.learning.templates.ClientWorkProcess(
        initialize, next_fn, get_hparams_fn=get_hparams, set_hparams_fn=set_hparams
    )


class ModelTypes(NamedTuple):
    """What a process has to know of a model.

    Attributes:
      weights: TFF type of the model's weights.
      data: TFF type of a client's dataset.
      names: Names of the trainable weights; None for a functional model, which has none.
      aggregate_metrics: Computation from the clients' unfinalized metrics to the server's metrics.
    """

    weights: Any
    data: Any
    names: Sequence[str] | None
    aggregate_metrics: Any


def _model_types(model_fn: Any, metrics_aggregator: Any) -> ModelTypes:
    names = None
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
        with tf.Graph().as_default():  # its variables must not outlive this look at it
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
