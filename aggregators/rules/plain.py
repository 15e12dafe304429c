"""The mean by examples, with this package's measurements."""

from collections import OrderedDict

import tensorflow as tf

from aggregators import weighted_mean
from aggregators.core import checks
from aggregators.core.rule import Needs, Rule, RuleResult


def plain_mean(*, sample_size: int = 0) -> Rule:
    """The mean by clients' weights, as `tff.aggregators.MeanFactory` takes it, in the stream.

    ```
    update = sum_k n_k d_k / sum_k n_k
    ```

    with `d_k` the update and `n_k` the weight (number of examples) of client `k`.

    Args:
      sample_size: How many clients the measurements list one by one.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Raises:
      ValueError: If `sample_size` is out of its range.

    Example:
      >>> plain_mean().needs.names
      ()
    """
    sample_size = checks.whole("sample_size", sample_size, 0)
    return Rule(
        lambda update, weight, state: weighted_mean.weigh(update, tf.math.log(weight)[tf.newaxis]),
        lambda layers: weighted_mean.reduction(layers, sample_size=sample_size),
        lambda state, reduced: RuleResult(OrderedDict(), *weighted_mean.report(reduced)),
        needs=Needs(layers="model"),
        is_mean=True,
    )
