"""The mean of the clients whose updates have near neighbours."""

from collections import OrderedDict

import tensorflow as tf

from aggregators.core import checks
from aggregators.core.rule import Rule, named_rule
from aggregators.core.types import State
from aggregators.rules import rows
from aggregators.rules.rows import Combined, Rows, rule_of_rows


@named_rule
def multi_krum(num_bad: int, num_kept: int = 1) -> Rule:
    """The mean of the `num_kept` clients whose updates are nearest to their neighbours.

    ```
    score_k = sum of the K - num_bad - 2 smallest |d_k - d_j|^2 over j != k
    update  = mean of d_k over the num_kept clients of the smallest scores
    ```

    with `d_k` the update over all tensors and `K` the number of clients that count, each once, whatever
    its number of examples. With one client kept it is Krum. Of equal scores, the first client is kept.

    It is not safe if good clients differ, because it always leaves out the rare ones. In the worst of
    30 simulated settings with 2 bad clients of 10, Krum was 65 points of accuracy below plain averaging
    and multi-Krum 24. Against updates times -1 at strong splits it gained more than most rules.

    A cohort must have `max(2 num_bad + 3, num_kept)` clients; a smaller one ends the round with an
    error. If too few clients are left because the others were not finite or had no data, the model
    stays as it is, and `unchanged` and `too_few_clients` are 1. A client that sends NaN therefore cannot
    end a training.

    Memory: see `collected`, and twice that while distances are computed. Time: `K^2` passes over a
    model. A secure sum cannot compute it.

    Measurements: norms as scores; `effective_clients` is how many were kept; `too_few_clients` (int32).

    Args:
      num_bad: How many clients of a cohort may be bad, at least 0.
      num_kept: How many clients are averaged, at least 1.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Raises:
      ValueError: If an argument is out of its range.

    Example:
      >>> multi_krum(2, 6).needs.names
      ()

    Source: Blanchard, El Mhamdi, Guerraoui, Stainer, Machine Learning with Adversaries: Byzantine
    Tolerant Gradient Descent, 2017.
    """
    num_bad = checks.whole("num_bad", num_bad, 0)
    num_kept = checks.whole("num_kept", num_kept, 1)
    needed = max(2 * num_bad + 3, num_kept)

    def combine(given: Rows, weights: tf.Tensor, state: State, cohort: tf.Tensor) -> Combined:
        del state  # it has no hyperparameters
        message = [
            "`num_bad` and `num_kept` must leave a cohort of at least",
            needed,
            f"clients (2 num_bad + 3, and num_kept) for num_bad={num_bad}, num_kept={num_kept}; found",
            cohort,
            "clients. Take more clients a round, or smaller numbers.",
        ]
        weights = checks.asserted(cohort >= needed, message, weights)
        clients = tf.shape(weights)[0]
        apart = tf.map_fn(
            lambda k: rows.squared_distances(given, [x[k] for x in given]),
            tf.range(clients),
            fn_output_signature=tf.float64,
            parallel_iterations=1,  # each holds a copy of all rows
        )
        # The smallest is a client's distance from itself.
        nearest = tf.sort(apart)[:, 1 : tf.maximum(clients - num_bad - 1, 1)]
        best = tf.argsort(tf.reduce_sum(nearest, 1), stable=True)[:num_kept]
        kept = tf.reduce_sum(tf.one_hot(best, clients, dtype=tf.float64), 0)
        too_few = clients < needed
        return Combined(
            rows.mean_of([tf.gather(x, best) for x in given], tf.gather(kept, best)),
            kept,
            too_few,
            OrderedDict(too_few_clients=tf.cast(too_few, tf.int32)),
        )

    return rule_of_rows(combine)
