"""FedNova: averaging normalised by steps."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from aggregators import weighted_mean
from aggregators.hyperparameters import Number, hparam
from aggregators.measurements import check_sample_size
from aggregators.rule import Needs, Rule, RuleResult
from aggregators.update import ClientUpdate


def fed_nova(momentum: Number = 0.0, *, sample_size: int = 0) -> Rule:
    """FedNova: updates are averaged per step, so that clients with more steps do not pull harder.

    ```
    update = (sum_k p_k a_k) sum_k p_k d_k / a_k,   p_k = n_k / sum_j n_j
    a_k = t_k                                          for plain SGD
    a_k = (t_k - r (1 - r^t_k) / (1 - r)) / (1 - r)    for SGD with momentum r
    ```

    with `d_k` the update, `t_k` the number of optimizer steps and `n_k` the client's weight. A
    client without steps counts for nothing. `score_*` of the measurements is `a_k`. One pass.
    `momentum` is a hyperparameter.

    Args:
      momentum: Momentum of the clients' SGD, at least 0 and below 1.
      sample_size: How many clients the measurements list one by one.

    Returns:
      A `Rule` for `build_fed_avg` or `federated_rule`.

    Raises:
      ValueError: If a number is out of its range.

    Example:
      >>> fed_nova(0.9).needs.names
      ('steps',)

    Source: Wang, Liu, Liang, Joshi, Poor, Tackling the Objective Inconsistency Problem in
    Heterogeneous Federated Optimization, 2020.
    """
    check_sample_size(sample_size)

    def client(update: ClientUpdate, weight: tf.Tensor, state: Mapping[str, Any]) -> Any:
        # Differences of nearly equal numbers at high momentum: float32 would be off by percents.
        steps = tf.cast(update.measured["steps"], tf.float64)
        rate = state["momentum"]
        lost = rate * (1.0 - tf.pow(rate, steps)) / (1.0 - rate)
        effective = tf.cast((steps - lost) / (1.0 - rate), tf.float32)
        per_step = [tf.math.divide_no_nan(x, tf.cast(effective, x.dtype)) for x in update.delta]
        weight = tf.where(steps > 0.0, weight, 0.0)
        return weighted_mean.weigh(
            update,
            tf.math.log(weight)[tf.newaxis],
            tensors=(*per_step, effective),
            scores=effective[tf.newaxis],
        )

    def server(state: Mapping[str, Any], reduced: Any) -> RuleResult:
        del state  # nothing is carried from round to round
        (*tensors, effective), measured = weighted_mean.report(reduced)
        tensors = [x * tf.cast(effective, x.dtype) for x in tensors]
        return RuleResult(OrderedDict(), tensors, measured)

    return Rule(
        client,
        lambda layers: weighted_mean.reduction(layers, sample_size=sample_size, numbers=1),
        server,
        needs=Needs(layers="model", steps=True),
        hparams={"momentum": hparam("momentum", momentum, 0.0, 1.0, below=True)},
    )
