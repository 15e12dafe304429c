"""What rules are made of: a mean by log-weight over clients, with the round's measurements."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from aggregators.core.layers import ModelLayers
from aggregators.core.reduction import Reduction, zip_reductions
from aggregators.core.update import ClientUpdate
from aggregators.weighted_mean.statistics import ClientStatistics, measure, statistics_reduction
from aggregators.weighted_mean.streaming import LogWeighted, mean_reduction

__all__ = ["reduction", "report", "weigh"]


def weigh(
    update: ClientUpdate,
    log_weights: tf.Tensor,
    *,
    tensors: Sequence[tf.Tensor] | None = None,
    scores: tf.Tensor | None = None,
    sound: tf.Tensor | bool = True,
    others: Sequence[tf.Tensor] = (),
) -> OrderedDict[str, Any]:
    """A client's part in `reduction`.

    Args:
      update: The client's update.
      log_weights: Logarithms of its weights, float64 of shape `[num_layers]`; -inf for weight 0.
      tensors: What is averaged; the update's delta if None. Numbers beyond the delta's tensors
        come last.
      scores: What the measurements show as scores, of shape `[num_layers]`; zeros if None.
      sound: False if the client must not count for a score that is none.
      others: Its log-weights in further means, for the listing of single clients.

    Returns:
      A mapping of `mean` to a `LogWeighted` and `statistics` to `ClientStatistics`.

    Example:
      >>> update = ClientUpdate((tf.constant([1.0, 2.0]),), {}, tf.constant(False))
      >>> weigh(update, tf.math.log([4.0]))["mean"].log_weights.numpy().round(4)
      array([1.3863])
    """
    sound = tf.convert_to_tensor(sound)
    counts = sound & ~update.non_finite
    log_weights = tf.where(counts, tf.cast(log_weights, tf.float64), -math.inf)
    if scores is None:
        scores = tf.zeros(log_weights.shape)
    statistics = ClientStatistics(
        tf.cast(scores, tf.float32),
        log_weights,
        update.non_finite,
        ~sound & ~update.non_finite,
        tuple(tf.broadcast_to(other, log_weights.shape) for other in others),
    )
    chosen = update.delta if tensors is None else tensors
    return OrderedDict(mean=LogWeighted(tuple(chosen), log_weights), statistics=statistics)


def reduction(
    layers: ModelLayers, *, sample_size: int = 0, numbers: int = 0, others: int = 0
) -> Reduction:
    """The mean of what `weigh` gives, and the measurements of its clients, in one pass.

    Args:
      layers: The layers.
      sample_size: How many clients the measurements list one by one.
      numbers: How many float32 numbers follow the delta's tensors; with some, all is one layer.
      others: How many further log-weights come along.

    Returns:
      A `Reduction`.

    Example: the mean of two clients, of weights 1 and 3, as `report` gives it

      >>> import numpy as np
      >>> import tensorflow_federated as tff
      >>> from aggregators.core.layers import layers_of_type
      >>> fold = reduction(layers_of_type("model", tff.to_type([(np.float32, [1])])))
      >>> total = fold.zero()
      >>> for number, weight in ((0.0, 1.0), (8.0, 3.0)):
      ...     update = ClientUpdate((tf.constant([number]),), {}, tf.constant(False))
      ...     total = fold.merge(total, fold.lift(weigh(update, tf.math.log([weight]))))
      >>> (mean,), measured = report(fold.report(total))
      >>> mean.numpy(), int(measured["clients"])
      (array([6.], dtype=float32), 2)
    """
    specs = [*layers.specs, *[tf.TensorSpec([], tf.float32)] * numbers]
    groups = (tuple(range(len(specs))),) if numbers else layers.groups
    return zip_reductions(
        mean=mean_reduction(specs, groups),
        statistics=statistics_reduction(len(groups), sample_size, others=others),
    )


def report(
    reduced: Mapping[str, Any], scale: tf.Tensor | None = None, **options: Any
) -> tuple[tuple[tf.Tensor, ...], OrderedDict[str, Any]]:
    """The mean and its measurements.

    Args:
      reduced: What `reduction` gives.
      scale: What scores were divided by, shape `[num_layers]`; ones if None.
      **options: Further arguments of `measurements.measure`.

    Returns:
      The means, zeros if no client counted, and the measurements, whose `unchanged` says so.

    Example: nobody counted

      >>> import numpy as np
      >>> import tensorflow_federated as tff
      >>> from aggregators.core.layers import layers_of_type
      >>> fold = reduction(layers_of_type("model", tff.to_type([(np.float32, [1])])))
      >>> (mean,), measured = report(fold.report(fold.zero()))
      >>> mean.numpy(), int(measured["unchanged"])
      (array([0.], dtype=float32), 1)
    """
    totals = reduced["statistics"]
    if scale is None:
        scale = tf.ones(totals.largest.shape[1:])
    measured = measure(totals, scale, **options)
    return tuple(reduced["mean"].tensors), measured
