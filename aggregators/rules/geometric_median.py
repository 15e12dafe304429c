"""The point with the least sum of distances from the clients' updates."""

from collections import OrderedDict

import tensorflow as tf

from aggregators.core import checks
from aggregators.core.hyperparameters import Number, hparam
from aggregators.core.rule import Rule, named_rule
from aggregators.core.types import State, Tensors
from aggregators.rules import rows
from aggregators.rules.rows import Combined, Rows, rule_of_rows


@named_rule
def geometric_median(iterations: int = 8, *, smoothing: Number = 1e-6) -> Rule:
    """The point with the least sum of distances from the clients' updates, by their weights.

    ```
    z    <- the median of each element over clients
    b_k   = n_k / max(smoothing, |z - d_k|)              `iterations` times
    z    <- sum_k b_k d_k / sum_k b_k
    update = z
    ```

    with `d_k` the update over all tensors and `n_k` its weight. As in the source, numbers of examples
    count; give clients equal weights to prevent that. It is the smoothed algorithm of Weiszfeld. Bad
    clients with less than half of the weight leave the result within a bound of the good ones.

    It is not safe where good clients differ: in the worst of 30 simulated settings it was 6 points of
    accuracy below plain averaging, with random labels at a strong split.

    The source differs: it starts from the mean, which one client can move far away, and takes 3 or 4
    iterations, each a secure sum over clients. Here an iteration is a pass over the rows on the server.
    Memory: see `collected`, and the sort of `coordinate_median`. A secure sum cannot compute it.

    Measurements: norms as scores; weights `b_k` of the last iteration.

    Args:
      iterations: The number of iterations, at least 1.
      smoothing: Above 0, in the unit of an update's norm. A hyperparameter.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Raises:
      ValueError: If an argument is out of its range.

    Example:
      >>> list(geometric_median(4).hparams)
      ['smoothing']

    Source: Pillutla, Kakade, Harchaoui, Robust Aggregation for Federated Learning, 2019.
    """
    iterations = checks.whole("iterations", iterations, 1)
    hparams = OrderedDict(smoothing=hparam("smoothing", smoothing, 0.0, above=True))

    def combine(given: Rows, weights: tf.Tensor, state: State, cohort: tf.Tensor) -> Combined:
        del cohort  # clients that do not count have no rows

        def step(
            number: tf.Tensor, point: Tensors, _: tf.Tensor
        ) -> tuple[tf.Tensor, Tensors, tf.Tensor]:
            apart = tf.sqrt(rows.squared_distances(given, point))
            by = weights / tf.maximum(apart, state["smoothing"])
            return number + 1, rows.mean_of(given, by), by

        start = rows.middle(given, rows.half(given))
        _, point, by = tf.while_loop(
            lambda number, *_: number < iterations, step, (tf.constant(0), start, weights)
        )
        return Combined(point, by)

    return rule_of_rows(combine, hparams)
