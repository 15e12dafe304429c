"""Rules that take the middle of each element's values."""

from collections import OrderedDict

import tensorflow as tf

from aggregators.core.hyperparameters import Number, hparam
from aggregators.core.rule import Rule, State, named_rule
from aggregators.rules import rows
from aggregators.rules.rows import Combined, Rows, rule_of_rows


@named_rule
def coordinate_median() -> Rule:
    """The median of each element over the clients, each counting once.

    ```
    update_i = median over k of d_k,i
    ```

    for every element `i` of the model and client `k`, with `d_k` the update: of an even number of
    clients, the mean of the two in the middle. Numbers of examples do not enter; a client of weight 0
    does not count. Bad clients, if they are fewer than half, leave each element between values of good
    ones.

    It is not safe where good clients differ: what most of them do not move stays as it is, whatever the
    others learned. In a simulation of 30 settings, the worst was 32 points of accuracy below plain
    averaging, with nobody bad.

    Memory and time: see `collected`; and a sort of each element's values, which takes the memory of
    the largest tensor's rows some five times. Not for a secure sum.

    Measurements: norms in place of scores; `effective_clients` is the number of clients.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Example:
      >>> coordinate_median().needs.names
      ()

    Source: Yin, Chen, Ramchandran, Bartlett, Byzantine-Robust Distributed Learning: Towards Optimal
    Statistical Rates, 2018.
    """

    def combine(given: Rows, weights: tf.Tensor, state: State, cohort: tf.Tensor) -> Combined:
        del state, cohort  # a median has no numbers
        return Combined(rows.middle(given, rows.half(given)), tf.ones_like(weights))

    return rule_of_rows(combine)


@named_rule
def trimmed_mean(share: Number = 0.1) -> Rule:
    """The mean of each element over the clients, without its smallest and largest values.

    ```
    update_i = mean over k of d_k,i, without the floor(share K) smallest and as many of the largest
    ```

    for every element `i` of the model and the `K` clients that count, each once, with `d_k` the update.
    Numbers of examples do not enter. With `share=0` it is the mean of all.

    It is not safe where good clients differ, as `coordinate_median` is not: with 20 % it was 23 points
    of accuracy below plain averaging in the worst of 30 simulated settings, with nobody bad. Memory,
    time and measurements are those of `coordinate_median`.

    Args:
      share: Of the clients, at least 0 and below 0.5: left out at each end. A hyperparameter.

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
        del cohort  # those that do not count are not there
        clients = tf.cast(tf.shape(weights)[0], tf.float64)
        cut = tf.cast(tf.floor(state["share"] * clients + 1e-9), tf.int32)  # 0.29 of 100 are 29
        return Combined(
            rows.middle(given, tf.minimum(cut, rows.half(given))), tf.ones_like(weights)
        )

    return rule_of_rows(combine, hparams)
