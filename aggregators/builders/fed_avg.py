"""Federated averaging by any rule, and around any client work, as whole learning processes."""

from collections import OrderedDict
from typing import TypeAlias

import tensorflow as tf
import tensorflow_federated as tff

from aggregators import rules
from aggregators.client import state_io
from aggregators.client.example_clipping import ExampleClipping
from aggregators.client.example_clipping import measurements as clipping_measurements
from aggregators.client.loop import Loop
from aggregators.client.training import ClientTraining, check_model_fn, check_optimizer
from aggregators.core import hyperparameters
from aggregators.core.bound_rule import BoundRule
from aggregators.core.rule import Rule, check_rule
from aggregators.core.types import (
    Hyperparameters,
    MetricsAggregator,
    ModelFn,
    ModelWeights,
    Optimizer,
    State,
    Structure,
)

LearningProcess: TypeAlias = tff.learning.templates.LearningProcess
_Distributor: TypeAlias = tff.learning.templates.DistributionProcess
_State: TypeAlias = tff.learning.templates.LearningAlgorithmState


def build_fed_avg(
    model_fn: ModelFn,
    client_optimizer_fn: Optimizer,
    server_optimizer_fn: Optimizer | None = None,
    *,
    rule: Rule | None = None,
    client_weighting: tff.learning.ClientWeighting = tff.learning.ClientWeighting.NUM_EXAMPLES,
    model_distributor: _Distributor | None = None,
    metrics_aggregator: MetricsAggregator | None = None,
    loop_implementation: tff.learning.LoopImplementation = Loop.DATASET_ITERATOR,
    example_clipping: ExampleClipping | None = None,
    sample_size: int = 0,
) -> LearningProcess:
    """Builds federated averaging by any rule.

    ```
    w <- server optimizer(w, rule(w - w_k over clients k))
    ```

    `<S@SERVER, {D*}@CLIENTS> -> <S@SERVER, M@SERVER>`. Arguments and the layout of the process are
    those of `tff.learning.algorithms.build_weighted_fed_avg`, with the rule in place of
    `model_aggregator`. Clients measure what the rule needs (scores, loss, steps) in the computation
    that trains them. It takes one pass over clients, so it spreads over workers and sub-rounds. A
    secure sum cannot compute it: for that see `build_self_weighting_client_work`.

    Args:
      model_fn: A function of no arguments that makes a `tff.learning.models.VariableModel`, or a
        `tff.learning.models.FunctionalModel`.
      client_optimizer_fn: The clients' optimizer.
      server_optimizer_fn: The server's; SGD with learning rate 1 if None.
      rule: From `aggregators.rules`, or your own. None is the mean by weights, with the results of
        `build_weighted_fed_avg`.
      client_weighting: The clients' weight: their number of examples, or 1. A client without
        examples has weight 0 either way.
      model_distributor: How the model is sent to clients; a broadcast if None.
      metrics_aggregator: How the clients' metrics are aggregated, as for `build_weighted_fed_avg`:
        `tff.learning.metrics.sum_then_finalize` if None.
      loop_implementation: How a client loops over its data: by default over the dataset's iterator.
        TFF's default, `dataset.reduce`, prepares the step again for each client.
      example_clipping: Clips each example's gradient, with or without noise; None uses the
        batch's gradient as it is. See `ExampleClipping`.
      sample_size: How many clients the measurements of the rule list one by one.

    Returns:
      A `LearningProcess`. If the rule has a stateful client, its data come from `ClientStates.cohort`.
      `state.aggregator` is the rule's state. Hyperparameters are `client_work` (the client
      optimizer's), `aggregator` (the rule's) and `finalizer`. `metrics` are `distributor`,
      `client_work` (`train`, and `clipping` with `example_clipping`), `aggregator` (see
      `aggregators.weighted_mean.statistics.measure`) and `finalizer`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of range.

    Example:
      >>> from aggregators import scores, weighting
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> sgd = tff.learning.optimizers.build_sgdm(0.1)
      >>> rule = rules.adaptive_mean(scores.kl_divergence, weighting.softmax(temperature=0.5))
      >>> process = build_fed_avg(model, sgd, rule=rule)
      >>> state = process.initialize()
      >>> hparams = process.get_hparams(state)
      >>> hparams["aggregator"]["temperature"] = 0.25
      >>> state = process.set_hparams(state, hparams)
    """
    if rule is None:
        rule = rules.plain_mean()
    check_rule(rule)
    check_optimizer("client_optimizer_fn", client_optimizer_fn)
    training = ClientTraining(
        model_fn,
        client_optimizer_fn,
        rule.needs,
        client_weighting,
        metrics_aggregator,
        loop_implementation,
        example_clipping,
    )
    initial_weights, distributor, finalizer = _server_parts(
        model_fn, server_optimizer_fn, model_distributor
    )
    types = training.types()
    bound = BoundRule(rule, types.weights.trainable, types.names, sample_size)
    hparams = training.hparams()

    @tff.federated_computation
    def initialize() -> tff.Value:
        return tff.federated_zip(
            _State(
                tff.federated_eval(initial_weights, tff.SERVER),
                distributor.initialize(),
                tff.federated_value(hparams, tff.SERVER),
                tff.federated_eval(bound.initial_state, tff.SERVER),
                finalizer.initialize(),
            )
        )

    state_type = initialize.type_signature.result.member

    stateful = rule.needs.stateful_client
    data_type = types.data if stateful is None else state_io.input_type(types.data)

    @tff.tensorflow.computation(state_type.client_work, bound.state_type, types.weights, data_type)
    def on_client(
        hparams: Hyperparameters, rule_state: State, weights: ModelWeights, data: Structure
    ) -> Structure:
        work = training.work(bound.layers)
        round_number = rule_state["round"]
        if stateful is None:
            output = work(weights, data, hparams, rule_state, noise_position=(round_number,))
            part = bound.client(output.update, rule_state)
            return part, output.metrics, output.counts
        files = state_io.ClientStateFiles(data["client"], round_number, stateful.num_clients)
        position = (round_number, data["client"]["number"])
        output = work(weights, data["data"], hparams, rule_state, files.load, position)
        # The client sends its weight only after its state has been written.
        with tf.control_dependencies([files.save(output.state)]):
            weight = tf.identity(output.update.weight)
        part = bound.client(output.update._replace(weight=weight), rule_state)
        return part, output.metrics, output.counts

    @tff.federated_computation(
        tff.FederatedType(state_type, tff.SERVER), tff.FederatedType(data_type, tff.CLIENTS)
    )
    def next_fn(state: tff.Value, data: tff.Value) -> tff.Value:
        sent = distributor.next(state.distributor, state.global_model_weights)
        parts, metrics, counts = tff.federated_map(
            on_client,
            (
                tff.federated_broadcast(state.client_work),
                tff.federated_broadcast(state.aggregator),
                sent.result,
                data,
            ),
        )
        rule_state, update, measured = bound.federated_server(state.aggregator, parts)
        ended = finalizer.next(state.finalizer, state.global_model_weights, update)
        new_state = _State(ended.result, sent.state, state.client_work, rule_state, ended.state)
        from_clients = OrderedDict(train=types.aggregate_metrics(metrics))
        if example_clipping is not None:
            from_clients["clipping"] = clipping_measurements(counts)
        all_metrics = OrderedDict(
            distributor=sent.measurements,
            client_work=tff.federated_zip(from_clients),
            aggregator=measured,
            finalizer=ended.measurements,
        )
        return tff.learning.templates.LearningProcessOutput(
            tff.federated_zip(new_state), tff.federated_zip(all_metrics)
        )

    @tff.tensorflow.computation(state_type)
    def get_model_weights(state: _State) -> ModelWeights:
        return state.global_model_weights

    @tff.tensorflow.computation(state_type, state_type.global_model_weights)
    def set_model_weights(state: _State, weights: ModelWeights) -> _State:
        return state._replace(global_model_weights=weights)

    @tff.tensorflow.computation(state_type)
    def get_hparams(state: _State) -> Hyperparameters:
        return OrderedDict(
            client_work=state.client_work,
            aggregator=hyperparameters.read(rule.hparams, state.aggregator),
            finalizer=finalizer.get_hparams(state.finalizer),
        )

    @tff.tensorflow.computation(state_type, get_hparams.type_signature.result)
    def set_hparams(state: _State, new: Hyperparameters) -> _State:
        return state._replace(
            client_work=new["client_work"],
            aggregator=hyperparameters.write(rule.hparams, state.aggregator, new["aggregator"]),
            finalizer=finalizer.set_hparams(state.finalizer, new["finalizer"]),
        )

    return LearningProcess(
        initialize,
        next_fn,
        get_model_weights,
        set_model_weights,
        get_hparams_fn=get_hparams,
        set_hparams_fn=set_hparams,
    )


def compose_fed_avg(
    model_fn: ModelFn,
    client_work: tff.learning.templates.ClientWorkProcess,
    model_aggregator: tff.aggregators.WeightedAggregationFactory | None = None,
    server_optimizer_fn: Optimizer | None = None,
    *,
    model_distributor: _Distributor | None = None,
) -> LearningProcess:
    """Builds federated averaging around any client work and any weighted aggregator.

    `tff.learning.algorithms.build_weighted_fed_avg`, with the client work as an argument.

    Args:
      model_fn: The model that `client_work` trains: a function of no arguments that makes a
        `tff.learning.models.VariableModel`, or a `tff.learning.models.FunctionalModel`.
      client_work: A client work, such as that of `build_self_weighting_client_work`.
      model_aggregator: `tff.aggregators.MeanFactory()` if None. Its result must have the type of
        the trainable weights.
      server_optimizer_fn: The server's optimizer; SGD with learning rate 1 if None.
      model_distributor: As for `build_weighted_fed_avg`.

    Returns:
      A `tff.learning.templates.LearningProcess`.

    Raises:
      TypeError: If an argument is of the wrong kind, or the parts do not match.

    Example: with the `model` and `sgd` of `build_fed_avg`

      >>> from aggregators import build_self_weighting_client_work, scores, weighting
      >>> work = tff.learning.templates.build_functional_model_delta_client_work(
      ...     model=model,
      ...     optimizer=sgd,
      ...     client_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES,
      ... )
      >>> work = build_self_weighting_client_work(work, scores.l2_distance, weighting.softmax())
      >>> process = compose_fed_avg(model, work, tff.learning.robust_aggregator())
      >>> isinstance(process, tff.learning.templates.LearningProcess)
      True
    """
    check_model_fn(model_fn)
    if model_aggregator is None:
        model_aggregator = tff.aggregators.MeanFactory()
    if not isinstance(model_aggregator, tff.aggregators.WeightedAggregationFactory):
        raise TypeError(
            "`model_aggregator` must be a tff.aggregators.WeightedAggregationFactory; "
            f"found {model_aggregator!r}."
        )
    initial_weights, distributor, finalizer = _server_parts(
        model_fn, server_optimizer_fn, model_distributor
    )
    result_type = client_work.next.type_signature.result.result.member
    return tff.learning.templates.compose_learning_process(
        initial_weights,
        distributor,
        client_work,
        model_aggregator.create(result_type.update, result_type.update_weight),
        finalizer,
    )


def _server_parts(
    model_fn: ModelFn, server_optimizer_fn: Optimizer | None, distributor: _Distributor | None
) -> tuple[tff.Computation, _Distributor, tff.learning.templates.FinalizerProcess]:
    """Initial weights, distributor and finalizer; TFF's defaults for those that are None."""
    if server_optimizer_fn is None:
        server_optimizer_fn = tff.learning.optimizers.build_sgdm(1.0)
    check_optimizer("server_optimizer_fn", server_optimizer_fn)

    @tff.tensorflow.computation
    def initial_weights() -> ModelWeights:
        if isinstance(model_fn, tff.learning.models.FunctionalModel):
            parts = (tuple(tf.convert_to_tensor(w) for w in p) for p in model_fn.initial_weights)
            return tff.learning.models.ModelWeights(*parts)
        return tff.learning.models.ModelWeights.from_model(model_fn())

    weights_type = initial_weights.type_signature.result
    if distributor is None:
        distributor = tff.learning.templates.build_broadcast_process(weights_type)
    finalizer = tff.learning.templates.build_apply_optimizer_finalizer(
        server_optimizer_fn, weights_type
    )
    return initial_weights, distributor, finalizer
