"""Rules that need all updates at once, as rows on the server."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import tensorflow as tf

from aggregators import weighted_mean
from aggregators.core.collected import Collected, collected
from aggregators.core.hyperparameters import Hparam
from aggregators.core.layers import ModelLayers
from aggregators.core.needs import Needs
from aggregators.core.reduction import Reduction, zip_reductions
from aggregators.core.rule import PerLayer, Rule, RuleResult
from aggregators.core.types import Part, Reduced, State, Tensors
from aggregators.core.update import ClientUpdate, length
from aggregators.weighted_mean.statistics import statistics_reduction

Rows = Tensors


class Combined(NamedTuple):
    """The result of combining a cohort's rows.

    Attributes:
      tensors: The flat update.
      weights: The weight of each client, float64 of shape `[clients]`, in any scale.
      unchanged: A bool: whether there is no update, although clients counted.
      measurements: Further measurements.
    """

    tensors: Tensors
    weights: tf.Tensor
    unchanged: tf.Tensor | bool = False
    measurements: Mapping[str, tf.Tensor] = OrderedDict()


def rule_of_rows(
    combine: Callable[[Rows, tf.Tensor, State, tf.Tensor], Combined],
    hparams: Mapping[str, Hparam] | None = None,
) -> Rule:
    """A rule that combines all clients' updates at once.

    Args:
      combine: `(rows, weights, state, cohort) -> Combined`. There is at least one row (of zeros, if no
        client counts), in single precision or wider. `cohort` is the number of all clients.
      hparams: The rule's hyperparameters.

    Returns:
      A `Rule`.
    """

    def client(update: ClientUpdate, state: State) -> Part:
        del state  # only the server needs it
        norm, log_weight = length(update.delta), tf.math.log(update.weight)
        found = weighted_mean.weigh(update, log_weight, scores=norm)
        return OrderedDict(rows=(update.delta, update.weight), statistics=found["statistics"])

    def server(state: State, reduced: Reduced) -> RuleResult:
        rows: Collected = reduced["rows"]
        none = {"mean": Collected((), ()), "statistics": reduced["statistics"]}
        measured = OrderedDict(weighted_mean.report(none).measurements)
        kinds = ("clients", "non_finite_clients", "bad_score_clients", "zero_weight_clients")
        cohort = tf.add_n([measured[name] for name in kinds])
        whole = Collected(tuple(_some(x) for x in rows.tensors), _some(rows.weights))
        found = combine([_wide(x) for x in whole.tensors], whole.weights, state, cohort)
        shares = found.weights / tf.reduce_sum(found.weights)
        is_some = measured["clients"] > 0
        for name, number in (
            ("effective_clients", 1.0 / tf.reduce_sum(shares * shares)),
            ("largest_weight", tf.reduce_max(shares)),
        ):
            number = tf.cast(tf.where(is_some, number, 0.0), tf.float32)
            measured[name] = PerLayer(number[tf.newaxis])
        if "sample_counted" in measured:
            listed = measured["sample_counted"]
            position = tf.maximum(tf.cumsum(tf.cast(listed, tf.int32)) - 1, 0)
            used = tf.where(listed, tf.gather(shares, position), 0.0)
            measured["sample_weights"] = PerLayer(tf.cast(used, tf.float32)[:, tf.newaxis])
        measured.update(found.measurements)
        tensors = [tf.cast(x, y.dtype) for x, y in zip(found.tensors, rows.tensors, strict=True)]
        return RuleResult(OrderedDict(), tensors, measured, ~is_some | found.unchanged)

    def reduction(layers: ModelLayers) -> Reduction:
        statistics = statistics_reduction(1, layers.sample_size)
        return zip_reductions(rows=collected(layers), statistics=statistics)

    return Rule(
        client,
        reduction,
        server,
        needs=Needs(layers="model"),
        hparams=hparams or OrderedDict(),
    )


def _some(rows: tf.Tensor) -> tf.Tensor:
    """The rows, or a row of zeros if there are none."""
    return tf.pad(
        rows, [[0, tf.cast(tf.shape(rows)[0] < 1, tf.int32)], *[[0, 0]] * (rows.shape.rank - 1)]
    )


def _wide(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32) if x.dtype.size < 4 else x


def mean_of(rows: Rows, weights: tf.Tensor) -> list[tf.Tensor]:
    """The mean over the rows, by weights float64 of shape `[clients]`."""
    shares = weights / tf.reduce_sum(weights)
    means = [tf.tensordot(tf.cast(shares, x.dtype), x, 1) for x in rows]
    return [tf.reshape(mean, x.shape[1:]) for mean, x in zip(means, rows, strict=True)]


def squared_distances(rows: Rows, point: Rows) -> tf.Tensor:
    """The squared distance of each row from a point, float64 of shape `[clients]`; may be infinite."""
    squares = [
        tf.reduce_sum(tf.math.squared_difference(x, y), tf.range(1, tf.rank(x)))
        for x, y in zip(rows, point, strict=True)
    ]
    return tf.add_n([tf.cast(square, tf.float64) for square in squares])


def middle(rows: Rows, cut: tf.Tensor) -> list[tf.Tensor]:
    """The mean of each element over the clients, without the `cut` smallest and the `cut` largest."""
    found = []
    for x in rows:
        clients = tf.shape(x)[0]
        columns = tf.transpose(tf.reshape(x, [clients, -1]))
        ordered = tf.sort(columns)[:, cut : clients - cut]
        found.append(tf.reshape(tf.reduce_mean(ordered, 1), x.shape[1:]))
    return found


def half(rows: Rows) -> tf.Tensor:
    """How many values a median leaves out at each end."""
    return (tf.shape(rows[0])[0] - 1) // 2
