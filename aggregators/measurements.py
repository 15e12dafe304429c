"""What a round shows of its clients: scores, weights, and who did not count."""

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import tensorflow as tf

from aggregators.reduction import Reduction, reduction_from_merge
from aggregators.streaming_mean import log_add, share


class ClientStatistics(NamedTuple):
    """What one client contributes to the measurements.

    Attributes:
      scores: float32 of shape `[num_layers]`.
      log_weights: float64 of shape `[num_layers]`; -inf if the client does not count.
      non_finite: bool; whether that is because its update, weight or score is not finite.
    """

    scores: Any
    log_weights: Any
    non_finite: Any


class Totals(NamedTuple):
    """The measurements of any set of clients, in a form that merges."""

    clients: Any
    non_finite: Any
    score_sum: Any
    score_min: Any
    score_max: Any
    log_sum: Any
    log_square_sum: Any
    log_max: Any
    sample_size: Any
    sample_scores: Any
    sample_log_weights: Any


def statistics_reduction(num_layers: int, sample_size: int = 0) -> Reduction:
    """Reduces `ClientStatistics` to `Totals`.

    Args:
      num_layers: Length of `scores` and `log_weights`.
      sample_size: How many clients that count are kept one by one: the first that come.

    Returns:
      A `Reduction` from `ClientStatistics` to `Totals`; see `measure`.
    """
    layer = [num_layers]

    def fill(value: float) -> tf.Tensor:
        return tf.fill(layer, tf.constant(value, tf.float64))

    def pad(rows: tf.Tensor) -> tf.Tensor:
        rows = rows[:sample_size]
        rows = tf.pad(rows, [[0, sample_size - tf.shape(rows)[0]], [0, 0]])
        return tf.ensure_shape(rows, [sample_size, num_layers])

    def zero() -> Totals:
        none = tf.zeros([sample_size, num_layers], tf.float64)
        return Totals(
            clients=tf.constant(0),
            non_finite=tf.constant(0),
            score_sum=fill(0.0),
            score_min=fill(math.inf),
            score_max=fill(-math.inf),
            log_sum=fill(-math.inf),
            log_square_sum=fill(-math.inf),
            log_max=fill(-math.inf),
            sample_size=tf.constant(0),
            sample_scores=none,
            sample_log_weights=none,
        )

    def lift(value: ClientStatistics) -> Totals:
        counts = tf.reduce_any(value.log_weights > -math.inf)
        scores = tf.cast(value.scores, tf.float64)
        kept = tf.cast(counts, tf.int32)
        return Totals(
            clients=kept,
            non_finite=tf.cast(value.non_finite, tf.int32),
            score_sum=tf.where(counts, scores, fill(0.0)),
            score_min=tf.where(counts, scores, fill(math.inf)),
            score_max=tf.where(counts, scores, fill(-math.inf)),
            log_sum=value.log_weights,
            log_square_sum=2.0 * value.log_weights,
            log_max=value.log_weights,
            sample_size=tf.minimum(kept, sample_size),
            sample_scores=pad(scores[tf.newaxis]),
            sample_log_weights=pad(value.log_weights[tf.newaxis]),
        )

    def merge(a: Totals, b: Totals) -> Totals:
        def join(rows_a: tf.Tensor, rows_b: tf.Tensor) -> tf.Tensor:
            return pad(tf.concat([rows_a[: a.sample_size], rows_b[: b.sample_size]], 0))

        return Totals(
            clients=a.clients + b.clients,
            non_finite=a.non_finite + b.non_finite,
            score_sum=a.score_sum + b.score_sum,
            score_min=tf.minimum(a.score_min, b.score_min),
            score_max=tf.maximum(a.score_max, b.score_max),
            log_sum=log_add(a.log_sum, b.log_sum),
            log_square_sum=log_add(a.log_square_sum, b.log_square_sum),
            log_max=tf.maximum(a.log_max, b.log_max),
            sample_size=tf.minimum(a.sample_size + b.sample_size, sample_size),
            sample_scores=join(a.sample_scores, b.sample_scores),
            sample_log_weights=join(a.sample_log_weights, b.sample_log_weights),
        )

    return reduction_from_merge(zero, lift, merge)


def mean_score(totals: Totals) -> tf.Tensor:
    """Unweighted mean score per layer of the clients that counted, float64; NaN if none did."""
    return totals.score_sum / tf.cast(totals.clients, tf.float64)


def measure(totals: Totals, scale: tf.Tensor) -> OrderedDict[str, tf.Tensor]:
    """The measurements of one aggregation, named and typed.

    Args:
      totals: What `statistics_reduction` reports.
      scale: What scores were divided by, shape `[num_layers]`; 0 while not known.

    Returns:
      An `OrderedDict`; `[L]` is the number of layers, in the order of `layers`:

      * `clients` int32: clients that counted.
      * `non_finite_clients` int32: clients left out for an update, weight or score that was not
        finite.
      * `unchanged` int32: 1 if no client counted, and the result is therefore no change.
      * `score_mean`, `score_min`, `score_max` float32[L]: over the clients that counted, each
        counting once; NaN if none did.
      * `effective_clients` float32[L]: `(sum w)^2 / sum w^2`. The number of clients if all weights
        are equal, 1 if one client has it all, 0 without clients.
      * `largest_weight` float32[L]: the largest `w / sum w`.
      * `scale` float32[L]: what scores were divided by; 0 if that was not known yet, and all
        scores counted alike.
      * with a sample of K clients: `sample_clients` int32, and `sample_scores`, `sample_weights`
        float32[K, L], the first `sample_clients` rows of which are filled.
    """
    some = totals.clients > 0
    none = tf.fill(tf.shape(totals.score_sum), tf.constant(math.nan, tf.float64))

    def narrow(value: tf.Tensor) -> tf.Tensor:
        return tf.cast(value, tf.float32)

    found = OrderedDict(
        clients=totals.clients,
        non_finite_clients=totals.non_finite,
        unchanged=tf.cast(tf.logical_not(some), tf.int32),
        score_mean=narrow(mean_score(totals)),
        score_min=narrow(tf.where(some, totals.score_min, none)),
        score_max=narrow(tf.where(some, totals.score_max, none)),
        effective_clients=narrow(share(2.0 * totals.log_sum, totals.log_square_sum)),
        largest_weight=narrow(share(totals.log_max, totals.log_sum)),
        scale=narrow(scale),
    )
    size = totals.sample_scores.shape[0]
    if size:
        rows = tf.broadcast_to(totals.log_sum, tf.shape(totals.sample_log_weights))
        filled = (tf.range(size) < totals.sample_size)[:, tf.newaxis]
        weights = share(totals.sample_log_weights, rows)
        found["sample_clients"] = totals.sample_size
        found["sample_scores"] = narrow(totals.sample_scores)
        found["sample_weights"] = narrow(tf.where(filled, weights, tf.zeros_like(weights)))
    return found


def check_sample_size(sample_size: Any) -> None:
    """Raises `ValueError` unless this is a whole number of clients."""
    if not isinstance(sample_size, int) or isinstance(sample_size, bool) or sample_size < 0:
        raise ValueError(
            f"`sample_size` must be a whole number of at least 0; found {sample_size!r}."
        )
