"""Client work whose clients weigh themselves, for any of TFF's weighted aggregators."""

from collections import OrderedDict
from typing import TypeAlias

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core import checks, hyperparameters
from aggregators.core.layers import Layers, layers_of_type
from aggregators.core.reduction import federated_reduce
from aggregators.core.rule import PerLayer
from aggregators.core.score import Function, Score, as_score, score_layers
from aggregators.core.types import Hyperparameters, Measurements, Part, State, Structure
from aggregators.core.update import finite_tensors
from aggregators.weighted_mean.statistics import (
    ClientStatistics,
    Totals,
    measure,
    statistics_reduction,
)
from aggregators.weighting import (
    Weighting,
    check_weighting,
    log_weights,
    next_typical_score,
    relative_scale,
)

ClientResult: TypeAlias = tff.learning.templates.ClientResult

# exp(60) is 1e26: two clients may differ by 52 orders of magnitude, and no weight leaves float32.
_LARGEST_EXPONENT = 60.0

# Aggregators multiply updates by weights and add them up in float32, which ends at 3e38.
_LARGEST_WEIGHTED_UPDATE = 1e35


def build_self_weighting_client_work(
    client_work: tff.learning.templates.ClientWorkProcess,
    score: Score | Function,
    weighting: Weighting,
    *,
    layers: Layers = "model",
    sample_size: int = 0,
) -> tff.learning.templates.ClientWorkProcess:
    """Makes every client weigh itself by how far its model moved.

    ```
    weight[k] = n[k] exp(clip(rule(d[k] / scale) - rule(typical / scale)))
    d[k] = mean over layers of score
    ```

    with `n` the weight that `client_work` gave (number of examples), or 1 where that is above 0 and
    `weighting` does not count examples. `typical` is the mean score of earlier rounds, and a client
    with that score has weight `n`. Nothing is subtracted in the first round, when it is unknown.
    Clients send an update and one positive number, which any weighted TFF aggregator takes: mean,
    clipping, zeroing, compression, and secure sum.

    Weights must fit in float32, so the exponent is clipped to [-60, 60]. Two clients beyond the same
    end weigh alike. If the temperature is so low that many scores are more than 60 temperatures from
    the typical one, this is therefore not the softmax that `rules.adaptive_mean` computes.

    Under a secure sum give `weighting` a `bound`: `tff.learning.secure_aggregator` silently clips
    weights above `2**20 - 1` and rounds all to steps of about `2**-12`. With a bound `b`, weights lie
    between `n / sqrt(b)` and `n sqrt(b)`.

    An update is sent as zeros with weight 0 if it, its score or its weight is not finite (a norm above
    2.6e19 counts as infinite), or if multiplying it by its weight would overflow (1e35). TFF's own
    client work also zeroes updates that are not finite, without saying so. A client of weight 0 that
    has data is therefore counted as non-finite here. A client without data has weight 0 whatever
    `client_work` gave: it did not move, and would pass for the nearest of all.

    Args:
      client_work: A client work whose update has the trainable weights' structure and is the
        initial weights minus the trained ones, and whose weight is one number.
      score: How far a layer is from the server's; one from `aggregators.scores` or your own.
      weighting: How scores become weights; from `aggregators.weighting`.
      layers: The groups of tensors to score: `"model"`, `"tensor"` or groups of positions. A client has
        one weight for all layers; for a weight per layer use `build_fed_avg`.
      sample_size: How many clients the measurements list one by one.

    Returns:
      A `tff.learning.templates.ClientWorkProcess`. Its state is an `OrderedDict` of `client_work` (the
      inner state), `typical_score` (float32 of shape `[1]`), `round` and the weighting's
      hyperparameters. The hyperparameters and measurements of `client_work` get one more entry,
      `weighting`: the weighting's hyperparameters, and the measurements that
      `aggregators.weighted_mean.statistics.measure` describes.

    Raises:
      TypeError: If an argument is of the wrong kind, or the client work does not match it.
      ValueError: If `layers` does not match the model, or `sample_size` is out of range.

    Example: with the `model` and `sgd` of `build_fed_avg`

      >>> from aggregators import scores, weighting
      >>> plain = tff.learning.templates.build_functional_model_delta_client_work(
      ...     model=model,
      ...     optimizer=tff.learning.optimizers.build_sgdm(0.1),
      ...     client_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES,
      ... )
      >>> work = build_self_weighting_client_work(plain, scores.kl_divergence, weighting.softmax())
      >>> list(work.initialize.type_signature.result.member._asdict())
      ['client_work', 'typical_score', 'round', 'temperature', 'decay']
    """
    if not isinstance(client_work, tff.learning.templates.ClientWorkProcess):
        raise TypeError(
            "`client_work` must be a tff.learning.templates.ClientWorkProcess; "
            f"found {client_work!r}."
        )
    score = as_score(score)
    check_weighting(weighting)
    sample_size = checks.whole("sample_size", sample_size, 0)
    signature = client_work.next.type_signature
    state_type, weights_type, data_type = signature.parameter
    result_type = signature.result.result.member
    model_layers = layers_of_type(layers, _trainable(weights_type.member))
    found = layers_of_type("model", result_type.update)
    if [(s.shape, s.dtype) for s in model_layers.specs] != [
        (s.shape, s.dtype) for s in found.specs
    ]:
        raise TypeError(
            "`client_work` must send an update with the shapes and dtypes of the trainable "
            f"weights, {_trainable(weights_type.member)}; found {result_type.update}."
        )
    if not isinstance(result_type.update_weight, tff.types.TensorType) or (
        result_type.update_weight.shape
    ):
        raise TypeError(
            f"`client_work` must send one number as its weight; found {result_type.update_weight}."
        )
    reduction = statistics_reduction(1, sample_size)
    inner_type = state_type.member
    own_hparams = weighting.all_hparams

    def own_state(round_number: tf.Tensor, typical_score: tf.Tensor) -> OrderedDict[str, Structure]:
        return OrderedDict(
            typical_score=typical_score,
            round=round_number,
            **hyperparameters.values(own_hparams, round_number),
        )

    @tff.tensorflow.computation(inner_type)
    def initial_state(inner: Structure) -> State:
        return OrderedDict(client_work=inner, **own_state(tf.constant(0), tf.zeros([1])))

    outer_type = initial_state.type_signature.result

    @tff.tensorflow.computation(outer_type)
    def without_inner(state: State) -> State:
        return OrderedDict((name, x) for name, x in state.items() if name != "client_work")

    @tff.tensorflow.computation(
        result_type,
        weights_type.member,
        data_type.member,
        without_inner.type_signature.result,
    )
    @tf.function
    def weigh_client(
        result: ClientResult, weights: Structure, data: Structure, state: State
    ) -> tuple[ClientResult, Part]:
        server = tf.nest.flatten(_trainable(weights))
        update = tf.nest.flatten(result.update)
        trained = [old - moved for old, moved in zip(server, update, strict=True)]
        by_layer = score_layers(score, server, trained, model_layers.groups)
        mean = tf.reduce_mean(by_layer, keepdims=True)
        own = tf.cast(result.update_weight, tf.float64)
        bad = ~finite_tensors(update) | ~tf.math.is_finite(own)
        largest = tf.reduce_max([tf.cast(_largest(tensor), tf.float64) for tensor in update])
        if (own <= 0.0) | (largest <= 0.0):
            # TFF sends a non-finite update as zeros with weight 0, like that of a client without
            # data. Data are looked up for clients that did not move only.
            has_data = _has_data(data)
            bad = bad | ((own <= 0.0) & has_data)
            own = tf.where(has_data, own, tf.zeros_like(own))
        own = tf.where(bad, tf.zeros_like(own), tf.maximum(own, 0.0))
        logs, is_valid = log_weights(weighting, mean, own, state)
        counted = (own > 0.0) & is_valid
        examples = own if weighting.times_examples else tf.ones_like(own)
        exponent = tf.where(counted, logs[0] - tf.math.log(tf.where(counted, examples, 1.0)), 0.0)
        exponent = tf.clip_by_value(exponent, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        new = tf.where(counted, examples * tf.exp(exponent), tf.zeros_like(own))
        bad = bad | (new * largest > _LARGEST_WEIGHTED_UPDATE)
        new = tf.where(bad, tf.zeros_like(new), new)
        kept = is_valid & ~bad
        update = [tf.where(kept, tensor, tf.zeros_like(tensor)) for tensor in update]
        weighted = ClientResult(
            update=tf.nest.pack_sequence_as(result.update, update),
            update_weight=tf.cast(new, tf.float32),
        )
        # Of the weights as they are sent, clipped.
        logs = tf.math.log(new)[tf.newaxis]
        return weighted, reduction.lift(ClientStatistics(mean, logs, bad, ~is_valid & ~bad))

    inner_measured = signature.result.measurements.member

    @tff.federated_computation
    def initialize() -> tff.Value:
        return tff.federated_map(initial_state, client_work.initialize())

    @tff.federated_computation(tff.FederatedType(outer_type, tff.SERVER), weights_type, data_type)
    def next_fn(state: tff.Value, weights: tff.Value, data: tff.Value) -> tff.Value:
        output = client_work.next(state["client_work"], weights, data)
        own = tff.federated_broadcast(tff.federated_map(without_inner, state))
        weighted, parts = tff.federated_map(weigh_client, (output.result, weights, data, own))
        totals = federated_reduce(parts, reduction.of_lifted)

        @tff.tensorflow.computation
        def on_server(
            state: State, inner: Structure, measured: Structure, totals: Totals
        ) -> tuple[State, Measurements]:
            state = hyperparameters.check_schedules(own_hparams, state)
            seen = measure(totals, relative_scale(weighting, state))
            typical = next_typical_score(weighting, state, seen["score_mean"].values)
            new = OrderedDict(client_work=inner, **own_state(state["round"] + 1, typical))
            new.update(hyperparameters.read(own_hparams, state))
            scalars = OrderedDict(
                (name, x.values[..., 0] if isinstance(x, PerLayer) else x)
                for name, x in seen.items()
            )
            scalars["unchanged"] = tf.cast(seen["clients"] <= 0, tf.int32)
            return new, _with(measured, "weighting", scalars, inner_measured)

        new_state, measured = tff.federated_map(
            on_server, (state, output.state, output.measurements, totals)
        )
        return tff.templates.MeasuredProcessOutput(new_state, weighted, measured)

    inner_hparams = client_work.get_hparams.type_signature.result

    @tff.tensorflow.computation(outer_type)
    def get_hparams(state: State) -> Hyperparameters:
        inner = client_work.get_hparams(state["client_work"])
        return _with(inner, "weighting", hyperparameters.read(own_hparams, state), inner_hparams)

    @tff.tensorflow.computation(outer_type, get_hparams.type_signature.result)
    def set_hparams(state: State, hparams: Hyperparameters) -> State:
        new = hyperparameters.write(own_hparams, state, hparams["weighting"])
        inner = _without(hparams, "weighting", inner_hparams)
        new["client_work"] = client_work.set_hparams(state["client_work"], inner)
        return new

    return tff.learning.templates.ClientWorkProcess(
        initialize, next_fn, get_hparams_fn=get_hparams, set_hparams_fn=set_hparams
    )


def _trainable(weights: Structure | tff.Type) -> Structure | tff.Type:
    """The trainable part of model weights or of their type; anything else as it is."""
    if isinstance(weights, tff.types.StructWithPythonType):
        is_model = weights.python_container is tff.learning.models.ModelWeights
        return weights.trainable if is_model else weights
    if isinstance(weights, tff.learning.models.ModelWeights):
        return weights.trainable
    return weights


def _largest(tensor: tf.Tensor) -> tf.Tensor:
    """The largest absolute value; 0 without elements."""
    if tensor.shape.num_elements() == 0:
        return tf.zeros([], tensor.dtype)
    return tf.reduce_max(tf.abs(tensor))


def _has_data(data: Structure) -> tf.Tensor:
    """Whether the first of a client's datasets has an element."""
    dataset = tf.nest.flatten(data)[0]
    return dataset.take(1).reduce(False, lambda found, batch: True)


def _is_mapping(value_type: tff.Type) -> bool:
    return isinstance(value_type, tff.types.StructWithPythonType) and issubclass(
        value_type.python_container, dict
    )


def _with(
    inner: Structure, name: str, value: Structure, inner_type: tff.Type
) -> OrderedDict[str, Structure]:
    """Adds an entry to a value of the inner work, which is wrapped if it is no dictionary."""
    if _is_mapping(inner_type):
        return OrderedDict([*inner.items(), (name, value)])
    return OrderedDict([("client_work", inner), (name, value)])


def _without(outer: State, name: str, inner_type: tff.Type) -> Structure:
    """The value that `_with` added an entry to."""
    if _is_mapping(inner_type):
        return OrderedDict((key, value) for key, value in outer.items() if key != name)
    return outer["client_work"]
