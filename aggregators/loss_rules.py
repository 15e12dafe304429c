"""Aggregators for rules that need a client's loss or its steps, besides the update.

All take a `ScoredUpdate` (from `build_scored_client_work`) and a number as weight, and return the
type of its `delta`. All are one pass, as means by log-weight with an extra scalar or two in what
is averaged. None works under a secure sum. A client whose update, weight or loss is not finite
counts for nothing and is counted; if none counts, the result is NaN, which TFF's finalizers take
for a round to leave out, and `unchanged` is 1.
"""

import math
from collections import OrderedDict
from typing import Any, Literal

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.adaptive_mean import (
    check_scores_type,
    check_weight_type,
    is_scored,
    mean_and_statistics,
    none_if_no_client,
    pack,
    tensor_specs,
    typical_state,
    weigh,
)
from aggregators.layers import Layers, check_groups, resolve_layers
from aggregators.measurements import check_sample_size, measure
from aggregators.one_pass import build_one_pass_process
from aggregators.reduction import zip_reductions
from aggregators.streaming_mean import LogWeighted, mean_reduction
from aggregators.weighting import (
    Rule,
    Weighting,
    check_weighting,
    relative_scale,
    uniform,
)

_SCALAR = tf.TensorSpec([], tf.float32)


class QFedAvgFactory(tff.aggregators.WeightedAggregationFactory):
    """q-FedAvg: clients with a high loss count more, and the step shrinks to fit.

    ```
    update = sum_k D_k / sum_k h_k
    D_k = F_k^q L d_k,   h_k = q F_k^(q-1) |L d_k|^2 + L F_k^q
    ```

    with `F_k` the client's loss at the server's weights (plus 1e-10), `d_k` its update, and `L`
    one over the client's learning rate. Computed as `mean(d) / mean(1 + q L |d|^2 / F)`, both means
    with log-weight `q log F`, which no loss over- or underflows. `q = 0` is the unweighted mean.

    The client's weight only tells whether it counts (0: no). `score_*` of the measurements is the
    loss. One pass. Needs `loss_at="initial"` in the client work.

    Source: Li, Sanjabi, Beirami, Smith, Fair Resource Allocation in Federated Learning, 2020.
    """

    def __init__(self, q: float, learning_rate: float, *, sample_size: int = 0):
        """Checks and keeps the arguments.

        Args:
          q: At least 0; 0 is plain averaging, large values even out clients' losses.
          learning_rate: The clients' learning rate, above 0.
          sample_size: How many clients the measurements list one by one.

        Raises:
          ValueError: If a number is out of its range.
        """
        self._q = _number("q", q, 0.0)
        self._lipschitz = 1.0 / _number("learning_rate", learning_rate, 0.0, above=True)
        check_sample_size(sample_size)
        self._sample_size = sample_size

    def create(self, value_type: Any, weight_type: Any) -> tff.templates.AggregationProcess:
        """Builds the process for a `ScoredUpdate` and a number; see the class."""
        specs = _scored_specs(value_type, weight_type)
        q, lipschitz = self._q, self._lipschitz
        weighting = Weighting(_power_of_loss(q), scale=None, times_examples=False)
        groups = resolve_layers("model", len(specs) + 1)

        def client_part(value: Any, weight: Any, state: Any) -> Any:
            del state  # nothing is carried from round to round
            loss = tf.cast(value.loss, tf.float32) + 1e-10
            tensors = tf.nest.flatten(value.delta)
            square = tf.add_n([tf.reduce_sum(tf.square(_single(x))) for x in tensors])
            shrink = 1.0 + q * lipschitz * square / loss
            # A negative loss has no power; NaN takes such a client out, and it is counted.
            loss = tf.where(loss > 0, loss, math.nan)
            return weigh(
                weighting,
                (*tensors, shrink),
                loss[tf.newaxis],
                weight,
                tf.zeros([1]),
                value.non_finite,
            )

        def server_part(state: Any, reduced: Any) -> tuple[Any, Any, Any]:
            *tensors, shrink = reduced["mean"].tensors
            step = tf.math.reciprocal_no_nan(shrink)
            tensors = [x * tf.cast(step, x.dtype) for x in tensors]
            measured = measure(reduced["statistics"], tf.ones([1]))
            measured["step"] = step
            return state, pack(value_type.delta, none_if_no_client(tensors, measured)), measured

        return build_one_pass_process(
            value_type,
            weight_type,
            initial_state=OrderedDict,
            client_part=client_part,
            reduction=mean_and_statistics([*specs, _SCALAR], groups, self._sample_size),
            server_part=server_part,
        )


class FedNovaFactory(tff.aggregators.WeightedAggregationFactory):
    """FedNova: updates are averaged per step, so that clients with more steps do not pull harder.

    ```
    update = (sum_k p_k a_k) sum_k p_k d_k / a_k,   p_k = n_k / sum_j n_j
    a_k = t_k                                          for plain SGD
    a_k = (t_k - r (1 - r^t_k) / (1 - r)) / (1 - r)    for SGD with momentum r
    ```

    with `d_k` the update, `t_k` the number of optimizer steps and `n_k` the client's weight. A
    client without steps counts for nothing. `score_*` of the measurements is `a_k`. One pass.

    Source: Wang, Liu, Liang, Joshi, Poor, Tackling the Objective Inconsistency Problem in
    Heterogeneous Federated Optimization, 2020.
    """

    def __init__(self, momentum: float = 0.0, *, sample_size: int = 0):
        """Checks and keeps the arguments.

        Args:
          momentum: Momentum of the clients' SGD, in [0, 1).
          sample_size: How many clients the measurements list one by one.

        Raises:
          ValueError: If a number is out of its range.
        """
        self._momentum = _number("momentum", momentum, 0.0)
        if self._momentum >= 1.0:
            raise ValueError(f"`momentum` must be below 1; found {momentum!r}.")
        check_sample_size(sample_size)
        self._sample_size = sample_size

    def create(self, value_type: Any, weight_type: Any) -> tff.templates.AggregationProcess:
        """Builds the process for a `ScoredUpdate` and a number; see the class."""
        specs = _scored_specs(value_type, weight_type)
        momentum = self._momentum
        groups = resolve_layers("model", len(specs) + 1)

        def client_part(value: Any, weight: Any, state: Any) -> Any:
            del state  # nothing is carried from round to round
            # Differences of nearly equal numbers at high momentum: float32 would be off by percents.
            steps = tf.cast(value.steps, tf.float64)
            effective = steps
            if momentum:
                rate = tf.constant(momentum, tf.float64)
                lost = rate * (1.0 - tf.pow(rate, steps)) / (1.0 - rate)
                effective = (steps - lost) / (1.0 - rate)
            effective = tf.cast(effective, tf.float32)
            tensors = tf.nest.flatten(value.delta)
            per_step = [tf.math.divide_no_nan(x, tf.cast(effective, x.dtype)) for x in tensors]
            return weigh(
                uniform(),
                (*per_step, effective),
                effective[tf.newaxis],
                tf.where(steps > 0, tf.cast(weight, tf.float32), 0.0),
                tf.zeros([1]),
                value.non_finite,
            )

        def server_part(state: Any, reduced: Any) -> tuple[Any, Any, Any]:
            *tensors, effective = reduced["mean"].tensors
            tensors = [x * tf.cast(effective, x.dtype) for x in tensors]
            measured = measure(reduced["statistics"], tf.ones([1]))
            return state, pack(value_type.delta, none_if_no_client(tensors, measured)), measured

        return build_one_pass_process(
            value_type,
            weight_type,
            initial_state=OrderedDict,
            client_part=client_part,
            reduction=mean_and_statistics([*specs, _SCALAR], groups, self._sample_size),
            server_part=server_part,
        )


class LossGatedMeanFactory(tff.aggregators.WeightedAggregationFactory):
    """Takes the adaptive mean in rounds where the clients' loss says so, else the plain mean.

    ```
    loss_t = sum_k n_k F_k / sum_k n_k
    fell = loss_t < loss_(t-1) - min_decrease |loss_(t-1)|
    update = adaptive mean if (not fell) else sum_k n_k d_k / sum_k n_k
    ```

    with `F_k` the loss that came with client `k`'s update, `n_k` its weight and `d_k` its update.
    Both means and the loss are accumulated in one pass, so the gate costs no second one. The first
    round is plain, as is any before a loss is known.

    The state is `typical_score` (as in `AdaptiveMeanFactory`), `previous_loss` and
    `previous_known`. The measurements are those of the adaptive mean, also in plain rounds, and
    `loss`, `previous_loss` (NaN if none) and `adaptive` (int32, 1 if that branch was taken).
    """

    def __init__(
        self,
        weighting: Weighting,
        *,
        layers: Layers = "tensor",
        adaptive_when: Literal["not_fallen", "fallen"] = "not_fallen",
        min_decrease: float = 0.0,
        sample_size: int = 0,
    ):
        """Checks and keeps the arguments.

        Args:
          weighting: Of the adaptive mean; from `aggregators.weighting`.
          layers: The layers that were scored.
          adaptive_when: Which of the two opens the gate.
          min_decrease: Relative decrease of the loss that counts as a fall, in [0, 1).
          sample_size: How many clients the measurements list one by one.

        Raises:
          TypeError: If `weighting` is of the wrong kind.
          ValueError: If another argument is out of its range.
        """
        check_weighting(weighting)
        check_groups(layers)
        check_sample_size(sample_size)
        if adaptive_when not in ("not_fallen", "fallen"):
            raise ValueError(
                f'`adaptive_when` must be "not_fallen" or "fallen"; found {adaptive_when!r}.'
            )
        self._min_decrease = _number("min_decrease", min_decrease, 0.0)
        if self._min_decrease >= 1.0:
            raise ValueError(f"`min_decrease` must be below 1; found {min_decrease!r}.")
        self._weighting = weighting
        self._layers = layers
        self._when_fallen = adaptive_when == "fallen"
        self._sample_size = sample_size

    def create(self, value_type: Any, weight_type: Any) -> tff.templates.AggregationProcess:
        """Builds the process for a `ScoredUpdate` and a number; see the class."""
        specs = _scored_specs(value_type, weight_type)
        groups = resolve_layers(self._layers, len(specs))
        check_scores_type(value_type, len(groups))
        weighting = self._weighting

        def client_part(value: Any, weight: Any, state: Any) -> Any:
            bad = tf.cast(value.non_finite, tf.bool) | ~tf.math.is_finite(value.loss)
            typical = state["typical_score"]
            adaptive = weigh(weighting, value.delta, value.scores, weight, typical, bad)
            plain = weigh(
                uniform(),
                (*tf.nest.flatten(value.delta), value.loss),
                value.scores,
                weight,
                typical,
                bad,
            )["mean"]
            # One weight for all layers: uniform weights do not differ between them.
            plain = LogWeighted(plain.tensors, plain.log_weights[:1])
            return OrderedDict(adaptive=adaptive, plain=plain)

        def server_part(state: Any, reduced: Any) -> tuple[Any, Any, Any]:
            typical, totals = state["typical_score"], reduced["adaptive"]["statistics"]
            measured = measure(totals, relative_scale(weighting, typical))
            *plain, loss = reduced["plain"].tensors
            some = measured["clients"] > 0
            previous, known = state["previous_loss"], state["previous_known"]
            fell = loss < previous - self._min_decrease * tf.abs(previous)
            adaptive = known & some & (fell if self._when_fallen else ~fell)
            tensors = [
                tf.where(adaptive, a, p)
                for a, p in zip(reduced["adaptive"]["mean"].tensors, plain, strict=True)
            ]
            new_state = typical_state(weighting, typical, measured)
            measured["loss"] = tf.where(some, loss, math.nan)
            measured["previous_loss"] = tf.where(known, previous, math.nan)
            measured["adaptive"] = tf.cast(adaptive, tf.int32)
            new_state["previous_loss"] = tf.where(some, loss, previous)
            new_state["previous_known"] = known | some
            return new_state, pack(value_type.delta, none_if_no_client(tensors, measured)), measured

        return build_one_pass_process(
            value_type,
            weight_type,
            initial_state=lambda: OrderedDict(
                typical_score=tf.zeros([len(groups)]),
                previous_loss=tf.constant(0.0),
                previous_known=tf.constant(False),
            ),
            client_part=client_part,
            reduction=zip_reductions(
                adaptive=mean_and_statistics(specs, groups, self._sample_size),
                plain=mean_reduction([*specs, _SCALAR], resolve_layers("model", len(specs) + 1)),
            ),
            server_part=server_part,
        )


def _power_of_loss(q: float) -> Rule:
    return lambda loss: q * tf.math.log(loss)


def _single(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, tf.float32)


def _scored_specs(value_type: Any, weight_type: Any) -> list[tf.TensorSpec]:
    if not is_scored(value_type):
        raise TypeError(
            "`value_type` must be that of a `ScoredUpdate`, which brings the loss and the steps; "
            f"found {value_type}. Use `build_scored_client_work`."
        )
    check_weight_type(weight_type)
    return tensor_specs(value_type.delta)


def _number(argument: str, value: Any, least: float, *, above: bool = False) -> float:
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or not math.isfinite(value) or value < least or (above and value == least):
        raise ValueError(
            f"`{argument}` must be a finite number {'above' if above else 'of at least'} "
            f"{least:g}; found {value!r}."
        )
    return float(value)
