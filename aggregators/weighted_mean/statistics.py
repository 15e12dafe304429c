"""A round's measurements of its clients: scores, weights, and how many did not count."""

import math
from collections import OrderedDict
from typing import NamedTuple

import tensorflow as tf

from aggregators.core.reduction import Reduction
from aggregators.core.rule import PerLayer
from aggregators.core.types import Structure, Tensors
from aggregators.weighted_mean.streaming import by_layer, log_add, share


class ClientStatistics(NamedTuple):
    """A client's contribution to the measurements.

    Attributes:
      scores: float32 of shape `[num_layers]`, or one number for all layers.
      log_weights: float64 of the same shapes; -inf if the client does not count.
      non_finite: bool: True if the reason is an update, weight or loss that is not finite.
      bad_score: bool: True if the reason is a score that is not a finite number of at least 0, or for
        which the rule has no number.
      others: Log-weights in further means of the same clients, each float64 of the same shapes.
    """

    scores: tf.Tensor
    log_weights: tf.Tensor
    non_finite: tf.Tensor
    bad_score: tf.Tensor
    others: Tensors = ()


class Totals(NamedTuple):
    """The measurements of any set of clients, in a form that merges with few operations.

    Sums, maxima and sums of logarithms are one tensor each, since each operation adds nearly a
    millisecond to the time that building a process takes.

    Attributes:
      sums: float64 of shape `[4 + num_layers]`: clients that counted, clients that were not finite,
        clients with a bad score, other clients of weight 0, and the scores of those that counted.
      largest: float64 of shape `[3, num_layers]`: score, minus score, and log-weight.
      log_sums: float64 of shape `[2 + others, num_layers]`: weights, their squares, other weights.
      sample: `()`, or the number of filled rows (int32) and the rows of scores and log-weights (float64
        of shape `[sample_size, 2 + others, num_layers]`).
    """

    sums: tf.Tensor
    largest: tf.Tensor
    log_sums: tf.Tensor
    sample: Tensors


def statistics_reduction(num_layers: int, sample_size: int = 0, *, others: int = 0) -> Reduction:
    """Reduces `ClientStatistics` to `Totals`.

    Args:
      num_layers: How many layers there are.
      sample_size: How many clients are listed one by one: the first ones of the cohort.
      others: How many further log-weights each client has.

    Returns:
      A `Reduction` from `ClientStatistics` to `Totals`; see `measure`.
    """

    def pad(rows: tf.Tensor) -> tf.Tensor:
        rows = rows[:sample_size]
        rows = tf.pad(rows, [[0, sample_size - tf.shape(rows)[0]], [0, 0], [0, 0]])
        return tf.ensure_shape(rows, [sample_size, 2 + others, num_layers])

    def zero() -> Totals:
        empty = tf.zeros([sample_size, 2 + others, num_layers], tf.float64)
        return Totals(
            sums=tf.constant(0.0, tf.float64, [4 + num_layers]),
            largest=tf.constant(-math.inf, tf.float64, [3, num_layers]),
            log_sums=tf.constant(-math.inf, tf.float64, [2 + others, num_layers]),
            sample=(tf.constant(0), empty) if sample_size else (),
        )

    def lift(value: ClientStatistics) -> Totals:
        logs = by_layer("log_weight", value.log_weights, num_layers)
        others_logs = [by_layer("others", other, num_layers) for other in value.others]
        counts = tf.reduce_any(logs > -math.inf)
        weightless = tf.logical_not(counts | value.non_finite | value.bad_score)
        scores = by_layer("scores", tf.cast(value.scores, tf.float64), num_layers)
        kinds = tf.stack([counts, value.non_finite, value.bad_score, weightless])
        sample: Tensors = ()
        if sample_size:
            row = tf.stack([scores, logs, *others_logs])
            sample = (tf.constant(1), pad(row[tf.newaxis]))
        return Totals(
            sums=tf.concat([tf.cast(kinds, tf.float64), tf.where(counts, scores, 0.0)], 0),
            largest=tf.where(counts, tf.stack([scores, -scores, logs]), -math.inf),
            log_sums=tf.stack([logs, 2.0 * logs, *others_logs]),
            sample=sample,
        )

    def merge(a: Totals, b: Totals) -> Totals:
        sample: Tensors = ()
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

    return Reduction(zero, merge, lift)


def measure(
    totals: Totals, scale: tf.Tensor, *, shares: Tensors = ()
) -> OrderedDict[str, Structure]:
    """The measurements of one aggregation, named and typed.

    Args:
      totals: The result of `statistics_reduction`.
      scale: The divisor of the scores, shape `[num_layers]`; 0 while unknown.
      shares: If there are several means, the share of each in the result, float64 scalars: that of
        `log_weights` first, then those of the others.

    Returns:
      An `OrderedDict`. Per layer means a mapping from the layers' names to numbers, or one number for
      a single layer.

      * `clients` int32: clients that counted.
      * `non_finite_clients` int32: clients left out for an update, weight or loss that was not
        finite.
      * `bad_score_clients` int32: clients left out for a score that is not a finite number of at
        least 0, or for which the rule had no number.
      * `zero_weight_clients` int32: clients left out for a weight of 0 or less: those without data,
        and those whose non-finite update TFF's own client work sent as zeros.
      * `score_mean`, `score_min`, `score_max` float32 per layer: over the clients that counted, each
        counting once; NaN if none did.
      * `effective_clients` float32 per layer: `(sum w)^2 / sum w^2`. The number of clients if all
        weights are equal, 1 if one client has all the weight, 0 without clients.
      * `largest_weight` float32 per layer: the largest `w / sum w`.
      * `scale` float32 per layer: the divisor of the scores; 0 if it was unknown, so that all scores
        counted alike.
      * With a sample of K clients, whose rows are the first K clients in the order of the cohort (in
        sub-rounds and on several workers, in the order in which TFF merges the pieces):
        `sample_clients` int32, the number of filled rows; `sample_counted` bool[K], whether the client
        counted; `sample_scores` and `sample_weights` float32[K] per layer, the client's score and its
        share in the result over all means.
    """
    counts, scores = tf.split(totals.sums, [4, -1])
    score_max, minus_min, log_max = tf.unstack(totals.largest)
    log_sum, log_square_sum, *log_other_sums = tf.unstack(totals.log_sums)
    clients, non_finite, bad_score, zero_weight = tf.unstack(tf.cast(counts, tf.int32))
    some = clients > 0
    per_layer = OrderedDict(
        score_mean=scores / tf.unstack(counts)[0],
        score_min=tf.where(some, -minus_min, math.nan),
        score_max=tf.where(some, score_max, math.nan),
        effective_clients=share(2.0 * log_sum, log_square_sum),
        largest_weight=share(log_max, log_sum),
        scale=tf.cast(scale, tf.float64),
    )
    narrow = tf.unstack(tf.cast(tf.stack(list(per_layer.values())), tf.float32))
    found = OrderedDict(
        clients=clients,
        non_finite_clients=non_finite,
        bad_score_clients=bad_score,
        zero_weight_clients=zero_weight,
        **{name: PerLayer(values) for name, values in zip(per_layer, narrow, strict=True)},
    )
    if totals.sample:
        filled, rows = totals.sample
        is_filled = tf.range(tf.shape(rows)[0]) < filled
        row_scores, *row_logs = tf.unstack(rows, axis=1)
        weights = [share(*pair) for pair in zip(row_logs, [log_sum, *log_other_sums], strict=True)]
        used = tf.add_n([w * s for w, s in zip(weights, shares)]) if shares else weights[0]
        used = tf.where(is_filled[:, tf.newaxis], used, 0.0)
        found["sample_clients"] = filled
        found["sample_counted"] = is_filled & tf.reduce_any(row_logs[0] > -math.inf, 1)
        found["sample_scores"] = PerLayer(tf.cast(row_scores, tf.float32))
        found["sample_weights"] = PerLayer(tf.cast(used, tf.float32))
    return found
