"""The mean over clients, weighed layer by layer by what each client's model scores."""

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.layers import Groups, Layers, check_groups, resolve_layers
from aggregators.measurements import (
    ClientStatistics,
    check_sample_size,
    measure,
    statistics_reduction,
)
from aggregators.one_pass import ScoredUpdate, build_one_pass_process
from aggregators.reduction import Reduction, federated_reduction, of_lifted, zip_reductions
from aggregators.scores import MODEL_SCORES, Score, check_score, score_layers
from aggregators.streaming_mean import LogWeighted, mean_reduction
from aggregators.weighting import (
    Weighting,
    check_weighting,
    log_weights,
    next_typical_score,
    relative_scale,
)


class AdaptiveMean(NamedTuple):
    """What `federated_adaptive_mean` returns.

    Attributes:
      mean: The mean, `T@SERVER`.
      measurements: See `aggregators.measurements.measure`, at the server.
      typical_score: The running mean score after this round, float32 of shape `[num_layers]` at the
        server: what the next round takes as its `typical_score`.
    """

    mean: Any
    measurements: Any
    typical_score: Any


def federated_adaptive_mean(
    value: Any,
    server_model: Any,
    *,
    score: Score,
    weighting: Weighting,
    weight: Any = None,
    layers: Layers = "tensor",
    value_is: Literal["model", "delta"] = "model",
    typical_score: Any = None,
    sample_size: int = 0,
) -> AdaptiveMean:
    """Averages clients' models, weighed by how far each is from the server's.

    ```
    mean[l] = sum_k w[k, l] value[k, l] / sum_k w[k, l]
    ```

    for every layer `l` and client `k`, with `w` as `weighting` makes it of the score of layer `l`.
    Used like `tff.federated_mean` inside a `tff.federated_computation`:
    `<{T}@CLIENTS, T@SERVER> -> <T@SERVER, M@SERVER, float32[num_layers]@SERVER>`. One pass.

    A client with a value, weight or score that is not finite counts for nothing and is counted in
    the measurements; so does one of weight 0, which is not. A value counts as finite if the sum of
    its squares is, in float32: up to a norm of 2.6e19. If no client counts, the mean is the
    server's model, or zeros for deltas, and `unchanged` is 1.

    To run on several workers or in sub-rounds, the last argument of your computation must be placed
    at clients: where it is not, TFF 0.87 hands the first clients to every piece, in silence.

    Not for a secure sum: the weights of a layer are normalised while summing. For that, weigh on
    the clients (`build_score_weighted_client_work`).

    Args:
      value: Structure of floating tensors at `tff.CLIENTS`: trained models or deltas.
      server_model: The model that clients started from, same type, at `tff.SERVER`.
      score: How far a layer is from the server's; one from `aggregators.scores` or your own.
      weighting: How scores become weights; from `aggregators.weighting`.
      weight: A number per client at `tff.CLIENTS`, as for `tff.federated_mean` (number of
        examples); None for 1 each.
      layers: Which tensors are weighed together: `"tensor"`, `"model"` or groups of positions.
      value_is: `"model"` for trained models; `"delta"` for the server's model minus the trained
        one, which is what TFF's client work sends.
      typical_score: Mean score of earlier rounds, float32 of shape `[num_layers]` at `tff.SERVER`,
        0 where not known: zeros in the first round, then the `typical_score` that the round before
        returned, which follows `weighting.memory` and skips rounds without clients. Needed if
        `weighting` has a bound or a running scale; it changes no weight otherwise.
      sample_size: How many clients the measurements list one by one.

    Returns:
      An `AdaptiveMean` of the mean, its measurements and the next typical score, all at
      `tff.SERVER`.

    Raises:
      TypeError: If a value has the wrong placement or type.
      ValueError: If an argument is out of its range, or `typical_score` is needed and missing.

    Example:
      >>> import numpy as np
      >>> from aggregators import scores, weighting
      >>> model = tff.types.to_type((np.float32, [3]))
      >>> @tff.federated_computation(
      ...     tff.FederatedType(model, tff.CLIENTS), tff.FederatedType(model, tff.SERVER)
      ... )
      ... def mean(trained, server_model):
      ...     return federated_adaptive_mean(
      ...         trained,
      ...         server_model,
      ...         score=scores.l2_distance,
      ...         weighting=weighting.softmax(scale=None),
      ...     ).mean
      >>> str(mean.type_signature.result)
      'float32[3]@SERVER'
    """
    check_score(score)
    check_weighting(weighting)
    check_sample_size(sample_size)
    if value_is not in ("model", "delta"):
        raise ValueError(f'`value_is` must be "model" or "delta"; found {value_is!r}.')
    value, server_model = tff.to_value(value, None), tff.to_value(server_model, None)
    model_type = _member(value, "value", tff.CLIENTS)
    server_type = _member(server_model, "server_model", tff.SERVER)
    if not model_type.is_assignable_from(server_type):
        raise TypeError(
            f"`value` and `server_model` must have one type; found {model_type} at clients and "
            f"{server_type} at the server."
        )
    if weighting.needs_typical_score and typical_score is None:
        raise ValueError(
            "`weighting` has a running scale or a bound, so `typical_score` is needed: the mean "
            "score of earlier rounds, zeros in the first. Pass it, or use `scale=None` or a number."
        )
    specs = tensor_specs(model_type)
    groups = resolve_layers(layers, len(specs))
    if typical_score is not None:
        typical_score = tff.to_value(typical_score, None)
        found = _member(typical_score, "typical_score", tff.SERVER)
        if found != tff.to_type((np.float32, [len(groups)])):
            raise TypeError(
                f"`typical_score` must hold a number per layer, float32[{len(groups)}]; found "
                f"{found}. Start from zeros of that shape."
            )
    if weight is None:
        weight = tff.federated_value(1.0, tff.CLIENTS)
    if typical_score is None:
        typical_score = tff.federated_value([0.0] * len(groups), tff.SERVER)
        typical_score = tff.federated_map(
            tff.tensorflow.computation(lambda x: tf.stack(list(x))), typical_score
        )

    reduction = mean_and_statistics(specs, groups, sample_size)

    @tff.tensorflow.computation
    def on_client(value: Any, server: Any, weight: Any, typical: Any) -> Any:
        is_model = value_is == "model"
        model = value if is_model else tf.nest.map_structure(tf.subtract, server, value)
        scores = score_layers(score, server, model, groups)
        return reduction.lift(weigh(weighting, value, scores, weight, typical, False))  # type: ignore[misc]

    parts = tff.federated_map(
        on_client,
        (
            value,
            tff.federated_broadcast(server_model),
            weight,
            tff.federated_broadcast(typical_score),
        ),
    )
    reduced = federated_reduction(parts, of_lifted(reduction))

    @tff.tensorflow.computation
    def on_server(reduced: Any, server: Any, typical: Any) -> Any:
        measured = measure(reduced["statistics"], relative_scale(weighting, typical))
        tensors = reduced["mean"].tensors
        if value_is == "model":
            some = measured["clients"] > 0
            tensors = [
                tf.where(some, tensor, old)
                for tensor, old in zip(tensors, tf.nest.flatten(server), strict=True)
            ]
        return (
            tf.nest.pack_sequence_as(server, list(tensors)),
            measured,
            next_typical_score(weighting, typical, measured["score_mean"]),
        )

    mean, measured, following = tff.federated_map(on_server, (reduced, server_model, typical_score))
    return AdaptiveMean(mean, measured, following)


class AdaptiveMeanFactory(tff.aggregators.WeightedAggregationFactory):
    """Builds weighted aggregators that weigh clients by their scores, layer by layer.

    ```
    mean[l] = sum_k w[k, l] delta[k, l] / sum_k w[k, l]
    ```

    for every layer `l` and client `k`, with `w` as `weighting` makes it of the score of layer `l`
    and the client's weight. The created process has type
    `<S@SERVER, {V}@CLIENTS, {W}@CLIENTS> -> <S@SERVER, R@SERVER, M@SERVER>`: `W` is a number, `V`
    either a structure of floating tensors (an update, scored here; `R` is `V`) or a `ScoredUpdate`
    (scored by `build_scored_client_work`; `R` is the type of its `delta`). `S` holds
    `typical_score`, the running mean score per layer.

    One pass over clients, so it spreads over workers and sub-rounds. Measurements: see
    `aggregators.measurements.measure`. Not for a secure sum, since weights are normalised
    while summing. Sensitivity: one client can move the mean as far as its weight allows, up to all
    the way unless `weighting` has a `bound` and examples are not counted; its update is not
    clipped, so wrap the factory in `tff.aggregators.clipping_factory` for that.

    A client with an update, weight or score that is not finite counts for nothing and is counted
    in the measurements; one of weight 0 counts for nothing. An update counts as finite if the sum
    of its squares is, in float32: up to a norm of 2.6e19. If no client counts, the result is NaN and
    `unchanged` is 1: that is how TFF's finalizers are told to leave model and optimizer as they
    were (zeros would still be a step of momentum, Adam or weight decay). TFF's own client work sends a
    non-finite update as zeros with weight 0, so in `build_weighted_fed_avg` such clients are seen as
    `zero_weight_clients` only.

    Example:
      >>> import numpy as np
      >>> from aggregators import scores, weighting
      >>> factory = AdaptiveMeanFactory(weighting.softmax(), score=scores.l2_distance)
      >>> update, weight = tff.to_type((np.float32, [3])), tff.to_type(np.float32)
      >>> process = factory.create(update, weight)
      >>> list(process.initialize.type_signature.result.member._asdict())
      ['typical_score']
    """

    def __init__(
        self,
        weighting: Weighting,
        *,
        score: Score | None = None,
        layers: Layers = "tensor",
        sample_size: int = 0,
    ):
        """Checks and keeps the arguments.

        Args:
          weighting: How scores become weights; from `aggregators.weighting`.
          score: For plain updates: how far a layer moved. It sees the update for the server's layer and
            zeros for the client's, so it must depend on their difference only:
            `l2_distance` or `spectral_distance` (`cosine_distance` is 1 for all that moved). None
            if updates come as `ScoredUpdate`.
          layers: Which tensors are weighed together: `"tensor"`, `"model"` or groups of positions.
            For `ScoredUpdate`, the layers that were scored.
          sample_size: How many clients the measurements list one by one.

        Raises:
          TypeError: If `weighting` or `score` is of the wrong kind.
          ValueError: If `score` needs the server's model, or an argument is out of its range.
        """
        check_weighting(weighting)
        check_sample_size(sample_size)
        check_groups(layers)
        if score is not None:
            check_score(score)
        if score in MODEL_SCORES:
            raise ValueError(
                f"`score` must depend on the update only; found {score.__name__}, which needs the "
                "server's model. Score on the clients with `build_scored_client_work`."
            )
        self._weighting = weighting
        self._score = score
        self._layers = layers
        self._sample_size = sample_size

    def create(self, value_type: Any, weight_type: Any) -> tff.templates.AggregationProcess:
        """Builds the process for these types; see the class.

        Args:
          value_type: TFF type of an update or of a `ScoredUpdate`.
          weight_type: TFF type of a number.

        Returns:
          A `tff.templates.AggregationProcess`.

        Raises:
          TypeError: If a type is not of this kind.
          ValueError: If plain updates come without a `score`, or scored ones with one.
        """
        scored = is_scored(value_type)
        if scored and self._score is not None:
            raise ValueError(
                "`score` must be None for a `ScoredUpdate`, which brings its scores; found "
                f"{self._score!r}."
            )
        if not scored and self._score is None:
            raise ValueError(
                "`score` is needed for plain updates; found None. Give one that depends on the "
                "update only, such as `scores.l2_distance`."
            )
        check_weight_type(weight_type)
        delta_type = value_type.delta if scored else value_type
        specs = tensor_specs(delta_type)
        groups = resolve_layers(self._layers, len(specs))
        if scored:
            check_scores_type(value_type, len(groups))
        weighting, score = self._weighting, self._score

        def client_part(value: Any, weight: Any, state: Any) -> Any:
            typical = state["typical_score"]
            if scored:
                return weigh(
                    weighting, value.delta, value.scores, weight, typical, value.non_finite
                )
            zeros = tf.nest.map_structure(tf.zeros_like, value)
            scores = score_layers(score, value, zeros, groups)  # type: ignore[arg-type]
            return weigh(weighting, value, scores, weight, typical, False)

        def server_part(state: Any, reduced: Any) -> tuple[Any, Any, Any]:
            typical = state["typical_score"]
            measured = measure(reduced["statistics"], relative_scale(weighting, typical))
            return (
                typical_state(weighting, typical, measured),
                pack(delta_type, none_if_no_client(reduced["mean"].tensors, measured)),
                measured,
            )

        return build_one_pass_process(
            value_type,
            weight_type,
            initial_state=lambda: OrderedDict(typical_score=tf.zeros([len(groups)])),
            client_part=client_part,
            reduction=mean_and_statistics(specs, groups, self._sample_size),
            server_part=server_part,
        )


def weigh(
    weighting: Weighting,
    value: Any,
    scores: tf.Tensor,
    weight: tf.Tensor,
    typical_score: tf.Tensor,
    non_finite: Any,
) -> OrderedDict[str, Any]:
    """One client's part in `mean_and_statistics`.

    Args:
      weighting: How scores become weights.
      value: Structure of tensors to average.
      scores: float32 of shape `[num_layers]`.
      weight: The client's own weight, a number.
      typical_score: Running mean score, shape `[num_layers]`.
      non_finite: Whether the value is already known not to be finite.

    Returns:
      A mapping of `mean` to a `LogWeighted` and `statistics` to `ClientStatistics`.
    """
    tensors = tuple(tf.convert_to_tensor(tensor) for tensor in tf.nest.flatten(value))
    logs, sound = log_weights(weighting, scores, weight, typical_score)
    bad = tf.cast(non_finite, tf.bool) | ~sound | ~finite_tensors(tensors)
    logs = tf.where(bad, tf.constant(-math.inf, tf.float64), logs)
    return OrderedDict(
        mean=LogWeighted(tensors, logs), statistics=ClientStatistics(scores, logs, bad)
    )


def mean_and_statistics(specs: list[tf.TensorSpec], groups: Groups, sample_size: int) -> Reduction:
    """The streaming mean and the measurements of its clients, in one pass."""
    return zip_reductions(
        mean=mean_reduction(specs, groups),
        statistics=statistics_reduction(len(groups), sample_size),
    )


def none_if_no_client(tensors: Any, measured: Any) -> tuple[tf.Tensor, ...]:
    """The tensors, or NaN in their place if no client counted: TFF's word for a rejected round."""
    nothing = tf.where(measured["clients"] > 0, 0.0, math.nan)
    return tuple(x + tf.cast(nothing, x.dtype) for x in tensors)


def typical_state(weighting: Weighting, typical: tf.Tensor, measured: Any) -> OrderedDict[str, Any]:
    """The state after a round."""
    following = next_typical_score(weighting, typical, measured["score_mean"])
    return OrderedDict(typical_score=following)


def finite_tensors(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """Whether the sum of all squares is a number in float32, so the norm below 2.6e19: one bool."""
    # One pass over memory, a third of what a look at each element takes.
    squares = [tf.nn.l2_loss(tf.cast(x, tf.float32) if x.dtype.size < 4 else x) for x in tensors]
    return tf.math.is_finite(tf.add_n([tf.cast(square, tf.float32) for square in squares]))


def is_scored(value_type: Any) -> bool:
    """Whether this TFF type is a `ScoredUpdate`."""
    return (
        isinstance(value_type, tff.types.StructWithPythonType)
        and value_type.python_container is ScoredUpdate
    )


def tensor_specs(value_type: Any) -> list[tf.TensorSpec]:
    """The tensors of a TFF type, in the order of `tf.nest.flatten`."""
    return tf.nest.flatten(tff.types.type_to_tf_tensor_specs(value_type))


def pack(value_type: Any, tensors: tuple[tf.Tensor, ...]) -> Any:
    """Gives flat tensors the structure of a TFF type."""
    return tf.nest.pack_sequence_as(tff.types.type_to_tf_tensor_specs(value_type), list(tensors))


def check_weight_type(weight_type: Any) -> None:
    """Raises `TypeError` unless this is the type of one number."""
    if not isinstance(weight_type, tff.types.TensorType) or weight_type.shape:
        raise TypeError(f"`weight_type` must be the type of one number; found {weight_type}.")


def check_scores_type(value_type: Any, num_layers: int) -> None:
    """Raises `ValueError` unless a `ScoredUpdate` has one score per layer."""
    found = tuple(value_type.scores.shape)
    if found != (num_layers,):
        raise ValueError(
            f"`layers` gives {num_layers} layers, but the updates hold scores of shape {found}. "
            "Use the same `layers` for the client work and the aggregator."
        )


def _member(value: Any, argument: str, placement: Any) -> Any:
    signature = value.type_signature
    if not isinstance(signature, tff.FederatedType) or signature.placement is not placement:
        raise TypeError(f"`{argument}` must be placed at tff.{placement.name}; found {signature}.")
    return signature.member
