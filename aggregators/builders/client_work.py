"""Client work that trains as TFF's does, and takes the measurements that a rule needs."""

from collections import OrderedDict

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.client.loop import Loop
from aggregators.client.training import ClientTraining, check_optimizer
from aggregators.core import checks
from aggregators.core.layers import layers_of_type
from aggregators.core.needs import Needs, check_no_process
from aggregators.core.types import (
    Hyperparameters,
    Metrics,
    MetricsAggregator,
    ModelFn,
    ModelWeights,
    Optimizer,
)
from aggregators.core.update import MeasuredUpdate


def build_client_work(
    model_fn: ModelFn,
    optimizer: Optimizer,
    needs: Needs,
    *,
    client_weighting: tff.learning.ClientWeighting = tff.learning.ClientWeighting.NUM_EXAMPLES,
    metrics_aggregator: MetricsAggregator | None = None,
    loop_implementation: tff.learning.LoopImplementation = Loop.DATASET_ITERATOR,
) -> tff.learning.templates.ClientWorkProcess:
    """Trains as TFF's client work does, and sends a rule's measurements with the update.

    Training, metrics and weights equal those of `tff.learning.templates.build_model_delta_client_work`
    (or of its functional twin), with one exception: a client without examples has weight 0 under
    uniform weighting too, since its score and loss of 0 would be the best of all.

    The update is a `MeasuredUpdate`, for `RuleFactory`. A client whose update or loss is not finite
    sends zeros with weight 0, and says so in `non_finite`. Updates are finite up to a norm of 2.6e19.
    `build_fed_avg` includes all of this.

    Args:
      model_fn: A function of no arguments that makes a `tff.learning.models.VariableModel`, or a
        `tff.learning.models.FunctionalModel`.
      optimizer: The clients' optimizer.
      needs: The measurements to take: `rule.needs`.
      client_weighting: By number of examples, or uniform.
      metrics_aggregator: As for `build_fed_avg`.
      loop_implementation: As for `build_fed_avg`.

    Returns:
      A `tff.learning.templates.ClientWorkProcess`. For both kinds of model its state is the optimizer's
      hyperparameters, which `get_hparams` returns. Its measurements are `train`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If the layers do not fit the model.

    Example: with the `model` and `sgd` of `build_fed_avg`

      >>> from aggregators import rules
      >>> work = build_client_work(model, sgd, rules.fed_nova().needs)
      >>> str(work.next.type_signature.result.result.member.update.measured)
      '<steps=int32>'
    """
    checks.instance("needs", needs, Needs)
    check_no_process("needs", needs)
    check_optimizer("optimizer", optimizer)
    training = ClientTraining(
        model_fn, optimizer, needs, client_weighting, metrics_aggregator, loop_implementation
    )
    types = training.types()
    layers = layers_of_type(needs.layers, types.weights.trainable, types.names)
    hparams = training.hparams()

    @tff.federated_computation
    def initialize() -> tff.Value:
        return tff.federated_value(hparams, tff.SERVER)

    state_type = initialize.type_signature.result.member

    @tff.tensorflow.computation(state_type, types.weights, types.data)
    def work(
        state: Hyperparameters, weights: ModelWeights, dataset: tf.data.Dataset
    ) -> tuple[tff.learning.templates.ClientResult, Metrics]:
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
    def next_fn(state: tff.Value, weights: tff.Value, data: tff.Value) -> tff.Value:
        result, metrics = tff.federated_map(work, (tff.federated_broadcast(state), weights, data))
        measured = tff.federated_zip(OrderedDict(train=types.aggregate_metrics(metrics)))
        return tff.templates.MeasuredProcessOutput(state, result, measured)

    @tff.tensorflow.computation(state_type)
    def get_hparams(state: Hyperparameters) -> Hyperparameters:
        return state

    @tff.tensorflow.computation(state_type, state_type)
    def set_hparams(state: Hyperparameters, new: Hyperparameters) -> Hyperparameters:
        del state  # the hyperparameters are the whole state
        return new

    return tff.learning.templates.ClientWorkProcess(
        initialize, next_fn, get_hparams_fn=get_hparams, set_hparams_fn=set_hparams
    )
