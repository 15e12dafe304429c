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
    """The measurements of any set of clients, in a form that merges with a handful of operations.

    What is added, what takes the larger and what adds up as logarithms lies in one tensor each:
    TensorFlow traces, optimizes and loads these functions anew for every process that is built, for
    the better part of a millisecond per operation.

    Attributes:
      sums: float64 of shape `[3 + num_layers]`: clients that counted, clients that were not finite,
        other clients of weight 0, and the scores of those that counted.
      largest: float64 of shape `[3, num_layers]`: score, minus score, and log-weight.
      log_sums: float64 of shape `[2, num_layers]`: weights and their squares.
      sample: `()`, or how many rows are filled (int32) and rows of scores and log-weights (float64
        of shape `[sample_size, 2, num_layers]`).
    """

    sums: Any
    largest: Any
    log_sums: Any
    sample: Any


def statistics_reduction(num_layers: int, sample_size: int = 0) -> Reduction:
    """Reduces `ClientStatistics` to `Totals`.

    Args:
      num_layers: Length of `scores` and `log_weights`.
      sample_size: How many clients that count are kept one by one: the first that come.

    Returns:
      A `Reduction` from `ClientStatistics` to `Totals`; see `measure`.
    """

    def pad(rows: tf.Tensor) -> tf.Tensor:
        rows = rows[:sample_size]
        rows = tf.pad(rows, [[0, sample_size - tf.shape(rows)[0]], [0, 0], [0, 0]])
        return tf.ensure_shape(rows, [sample_size, 2, num_layers])

    def zero() -> Totals:
        empty = tf.zeros([sample_size, 2, num_layers], tf.float64)
        return Totals(
            sums=tf.constant(0.0, tf.float64, [3 + num_layers]),
            largest=tf.constant(-math.inf, tf.float64, [3, num_layers]),
            log_sums=tf.constant(-math.inf, tf.float64, [2, num_layers]),
            sample=(tf.constant(0), empty) if sample_size else (),
        )

    def lift(value: ClientStatistics) -> Totals:
        logs = value.log_weights
        counts = tf.reduce_any(logs > -math.inf)
        weightless = tf.logical_not(counts | value.non_finite)
        scores = tf.cast(value.scores, tf.float64)
        numbers = tf.cast(tf.stack([counts, value.non_finite, weightless]), tf.float64)
        sample: Any = ()
        if sample_size:
            sample = (tf.cast(counts, tf.int32), pad(tf.stack([scores, logs])[tf.newaxis]))
        return Totals(
            sums=tf.concat([numbers, tf.where(counts, scores, 0.0)], 0),
            largest=tf.where(counts, tf.stack([scores, -scores, logs]), -math.inf),
            log_sums=tf.stack([logs, 2.0 * logs]),
            sample=sample,
        )

    def merge(a: Totals, b: Totals) -> Totals:
        sample: Any = ()
        if sample_size:
            (filled_a, rows_a), (filled_b, rows_b) = a.sample, b.sample
            rows = pad(tf.concat([rows_a[:filled_a], rows_b[:filled_b]], 0))
            sample = (tf.minimum(filled_a + filled_b, sample_size), rows)
        return Totals(
            sums=a.sums + b.sums,
            largest=tf.maximum(a.largest, b.largest),
            log_sums=log_add(a.log_sums, b.log_sums),
            sample=sample,
        )

    return reduction_from_merge(zero, lift, merge)


def measure(totals: Totals, scale: tf.Tensor) -> OrderedDict[str, tf.Tensor]:
    """The measurements of one aggregation, named and typed.

    Args:
      totals: What `statistics_reduction` reports.
      scale: What scores were divided by, shape `[num_layers]`; 0 while not known.

    Returns:
      An `OrderedDict`; `[L]` is the number of layers, in the order of `layers`:

      * `clients` int32: clients that counted.
      * `non_finite_clients` int32: clients left out for an update, weight or score that was not
        finite, or a score for which the rule had no number.
      * `zero_weight_clients` int32: clients left out for a weight of 0 or less: those without data,
        and those whose update TFF's own client work found not finite and sent as zeros.
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
    counts, scores = tf.split(totals.sums, [3, -1])
    score_max, minus_min, log_max = tf.unstack(totals.largest)
    log_sum, log_square_sum = tf.unstack(totals.log_sums)
    clients, non_finite, zero_weight = tf.unstack(tf.cast(counts, tf.int32))
    some = clients > 0
    by_layer = OrderedDict(
        score_mean=scores / tf.unstack(counts)[0],
        score_min=tf.where(some, -minus_min, math.nan),
        score_max=tf.where(some, score_max, math.nan),
        effective_clients=share(2.0 * log_sum, log_square_sum),
        largest_weight=share(log_max, log_sum),
        scale=tf.cast(scale, tf.float64),
    )
    narrow = tf.unstack(tf.cast(tf.stack(list(by_layer.values())), tf.float32))
    found = OrderedDict(
        clients=clients,
        non_finite_clients=non_finite,
        zero_weight_clients=zero_weight,
        unchanged=tf.cast(tf.logical_not(some), tf.int32),
        **dict(zip(by_layer, narrow, strict=True)),
    )
    if totals.sample:
        filled, rows = totals.sample
        logs = rows[:, 1]
        is_filled = (tf.range(tf.shape(rows)[0]) < filled)[:, tf.newaxis]
        weights = tf.where(is_filled, share(logs, log_sum), 0.0)
        found["sample_clients"] = filled
        found["sample_scores"] = tf.cast(rows[:, 0], tf.float32)
        found["sample_weights"] = tf.cast(weights, tf.float32)
    return found


def check_sample_size(sample_size: Any) -> None:
    """Raises `ValueError` unless this is a whole number of clients."""
    if not isinstance(sample_size, int) or isinstance(sample_size, bool) or sample_size < 0:
        raise ValueError(
            f"`sample_size` must be a whole number of at least 0; found {sample_size!r}."
        )
