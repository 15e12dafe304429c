"""FedNova: averaging normalised by steps."""

import math

import tensorflow as tf

from aggregators import weighted_mean
from aggregators.core import checks
from aggregators.core.hyperparameters import Number, hparam
from aggregators.core.needs import Needs
from aggregators.core.rule import Rule, RuleResult, named_rule
from aggregators.core.types import Part, State
from aggregators.core.update import ClientUpdate


@named_rule
def fed_nova(momentum: Number = 0.0, *, max_steps: int | None = None) -> Rule:
    """FedNova: averages updates per step, so that clients with more steps do not count for more.

    ```
    update = (sum_k p_k a_k) sum_k p_k d_k / a_k,   p_k = n_k / sum_j n_j
    a_k = t_k                                          for plain SGD
    a_k = (t_k - r (1 - r^t_k) / (1 - r)) / (1 - r)    for SGD with momentum r
    ```

    with `d_k` the update, `t_k` the number of optimizer steps and `n_k` the client's weight. A
    client without steps does not count. `score_*` of the measurements is `a_k`. It takes one pass.
    `momentum` is a hyperparameter. `a_k` is at least 1, so the division lengthens no update. A client
    that claims many steps lengthens the common step, up to `max_steps`.

    Args:
      momentum: Momentum of the clients' SGD, at least 0 and below 1.
      max_steps: The largest number of steps that a client can take, at least 1. A client that claims
        more, or fewer than 0, does not count, and is one of the `bad_score_clients`. None for no limit.

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
    most = math.inf if max_steps is None else checks.whole("max_steps", max_steps, 1)

    def log_weight(update: ClientUpdate, state: State) -> Part:
        # Differences of nearly equal numbers at high momentum: float32 would be off by percents.
        steps = tf.cast(update.steps, tf.float64)
        rate = state["momentum"]
        lost = rate * (1.0 - tf.pow(rate, steps)) / (1.0 - rate)
        effective = tf.cast((steps - lost) / (1.0 - rate), tf.float32)
        per_step = [tf.math.divide_no_nan(x, tf.cast(effective, x.dtype)) for x in update.delta]
        return weighted_mean.weigh(
            update,
            tf.math.log(tf.where(steps > 0.0, update.weight, 0.0)),
            tensors=(*per_step, effective),
            scores=effective,
            is_valid=(steps >= 0.0) & (steps <= most),
        )

    def finish(state: State, result: RuleResult) -> RuleResult:
        del state  # the rule keeps nothing
        *tensors, effective = result.update
        return result._replace(update=[x * tf.cast(effective, x.dtype) for x in tensors])

    return weighted_mean.rule(
        log_weight,
        needs=Needs(layers="model", steps=True),
        hparams={"momentum": hparam("momentum", momentum, 0.0, 1.0, below=True)},
        finish=finish,
        num_scalars=1,
    )
