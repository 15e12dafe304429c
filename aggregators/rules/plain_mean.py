"""The mean by examples, with this package's measurements."""

import tensorflow as tf

from aggregators import weighted_mean
from aggregators.core.rule import Rule, named_rule


@named_rule
def plain_mean() -> Rule:
    """The mean by clients' weights in one pass, as of `tff.aggregators.MeanFactory`.

    ```
    update = sum_k n_k d_k / sum_k n_k
    ```

    with `d_k` the update and `n_k` the weight (number of examples) of client `k`.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Example:
      >>> plain_mean()
      plain_mean()
    """
    return weighted_mean.rule(lambda update, state: tf.math.log(update.weight))
