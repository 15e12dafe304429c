"""The mean of each element without its smallest and largest values."""

from collections import OrderedDict

import tensorflow as tf

from aggregators.core.hyperparameters import Number, hparam
from aggregators.core.rule import Rule, named_rule
from aggregators.core.types import State
from aggregators.rules import rows
from aggregators.rules.rows import Combined, Rows, rule_of_rows


@named_rule
def trimmed_mean(share: Number = 0.1) -> Rule:
    """The mean of each element over the clients, without its smallest and largest values.

    ```
    update_i = mean over k of d_k,i, without the floor(share K) smallest and as many of the largest
    ```

    for every element `i` of the model and the `K` clients that count, each once, with `d_k` the update.
    Numbers of examples do not count. With `share=0` it is the mean of all.

    It is not safe where good clients differ, as `coordinate_median` is not: with 20 % it was 23 points
    of accuracy below plain averaging in the worst of 30 simulated settings, with nobody bad. Memory,
    time and measurements are those of `coordinate_median`.

    Args:
      share: The share of clients left out at each end, at least 0 and below 0.5. A hyperparameter.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Raises:
      ValueError: If an argument is out of its range.

    Example:
      >>> list(trimmed_mean(0.2).hparams)
      ['share']

    Source: Yin, Chen, Ramchandran, Bartlett, Byzantine-Robust Distributed Learning: Towards Optimal
    Statistical Rates, 2018.
    """
    hparams = OrderedDict(share=hparam("share", share, 0.0, 0.5, below=True))

    def combine(given: Rows, weights: tf.Tensor, state: State, cohort: tf.Tensor) -> Combined:
        del cohort  # clients that do not count have no rows
        clients = tf.cast(tf.shape(weights)[0], tf.float64)
        cut = tf.cast(tf.floor(state["share"] * clients + 1e-9), tf.int32)  # 0.29 of 100 are 29
        return Combined(
            rows.middle(given, tf.minimum(cut, rows.half(given))), tf.ones_like(weights)
        )

    return rule_of_rows(combine, hparams)
