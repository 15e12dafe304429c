"""The median of each element."""

import tensorflow as tf

from aggregators.core.rule import Rule, named_rule
from aggregators.core.types import State
from aggregators.rules import rows
from aggregators.rules.rows import Combined, Rows, rule_of_rows


@named_rule
def coordinate_median() -> Rule:
    """The median of each element over the clients, each counting once.

    ```
    update_i = median over k of d_k,i
    ```

    for every element `i` of the model and client `k`, with `d_k` the update. For an even number of
    clients it is the mean of the two in the middle. Numbers of examples do not count, nor do clients of
    weight 0. Fewer than half of bad clients leave each element between values of good ones.

    It is not safe if good clients differ: an element that most of them do not move stays as it is,
    whatever the others learned. In the worst of 30 simulated settings it was 32 points of accuracy below
    plain averaging, with nobody bad.

    Memory and time: see `collected`. A sort of each element's values takes about five times the memory
    of the largest tensor's rows. A secure sum cannot compute it.

    Measurements: norms as scores; `effective_clients` is the number of clients.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Example:
      >>> coordinate_median().needs.names
      ()

    Source: Yin, Chen, Ramchandran, Bartlett, Byzantine-Robust Distributed Learning: Towards Optimal
    Statistical Rates, 2018.
    """

    def combine(given: Rows, weights: tf.Tensor, state: State, cohort: tf.Tensor) -> Combined:
        del state, cohort  # a median needs neither
        return Combined(rows.middle(given, rows.half(given)), tf.ones_like(weights))

    return rule_of_rows(combine)
