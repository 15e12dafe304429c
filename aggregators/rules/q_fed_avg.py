"""q-FedAvg: fair losses across clients."""

import math
from collections import OrderedDict

import tensorflow as tf

from aggregators import weighted_mean
from aggregators.core.hyperparameters import Number, hparam
from aggregators.core.needs import Needs
from aggregators.core.reduction import Reduction, zip_reductions
from aggregators.core.rule import Rule, RuleResult, named_rule
from aggregators.core.types import Part, Reduced, State
from aggregators.core.update import ClientUpdate, finite_tensors


@named_rule
def q_fed_avg(q: Number, learning_rate: Number) -> Rule:
    """q-FedAvg: clients with a high loss count more, and the step shrinks to fit.

    ```
    update = sum_k D_k / sum_k h_k
    D_k = F_k^q L d_k,   h_k = q F_k^(q-1) |L d_k|^2 + L F_k^q
    ```

    with `F_k` the client's loss at the server's weights (plus 1e-10), `d_k` its update, and `L` one
    over the client's learning rate. It is computed as `mean(d) / mean(1 + q L |d|^2 / F)`, where both
    means have log-weights `q log F`, so that no loss over- or underflows. `q = 0` is the unweighted
    mean.

    A client's weight only decides whether it counts: 0 means no. Of the measurements, `score_*` is the
    loss, `step` the factor `1 / mean(1 + q L |d|^2 / F)`, and `largest_term` the largest term of that
    mean. It reveals a client with a huge update or a tiny loss, which can shrink the common step to
    nothing. It takes one pass. `q` and `learning_rate` are hyperparameters.

    Args:
      q: At least 0; 0 is plain averaging, large values even out clients' losses.
      learning_rate: The clients' learning rate, above 0.

    Returns:
      A `Rule` for `build_fed_avg` or `federated_rule`.

    Raises:
      ValueError: If a number is out of its range.

    Example:
      >>> q_fed_avg(0.5, learning_rate=0.1).needs.names
      ('initial_loss',)

    Source: Li, Sanjabi, Beirami, Smith, Fair Resource Allocation in Federated Learning, 2020.
    """
    hparams = OrderedDict(
        q=hparam("q", q, 0.0), learning_rate=hparam("learning_rate", learning_rate, 0.0, above=True)
    )

    def client(update: ClientUpdate, state: State) -> Part:
        loss = tf.cast(update.loss, tf.float32) + 1e-10
        tensors = update.delta
        square = 2.0 * tf.add_n([tf.nn.l2_loss(tf.cast(x, tf.float32)) for x in tensors])
        shrink = 1.0 + tf.cast(state["q"] / state["learning_rate"], tf.float32) * square / loss
        # A negative loss has no power, and an infinite term would spoil the round for all clients.
        has_weight = update.weight > 0.0
        is_valid = ((loss > 0.0) & finite_tensors([shrink])) | ~has_weight
        logs = state["q"] * tf.math.log(tf.cast(tf.where(loss > 0.0, loss, 1.0), tf.float64))
        logs = tf.where(has_weight, logs, -math.inf)
        mean = weighted_mean.weigh(
            update, logs, tensors=(*tensors, shrink), scores=loss, is_valid=is_valid
        )
        return OrderedDict(mean=mean, largest=tf.where(is_valid & has_weight, shrink, 0.0))

    def server(state: State, reduced: Reduced) -> RuleResult:
        del state  # the rule keeps nothing
        result = weighted_mean.report(reduced["mean"])
        *tensors, shrink = result.update
        step = tf.math.reciprocal_no_nan(shrink)
        measured = OrderedDict(
            result.measurements,
            step=tf.where(result.unchanged, 0.0, step),
            largest_term=reduced["largest"],
        )
        update = [x * tf.cast(step, x.dtype) for x in tensors]
        return result._replace(update=update, measurements=measured)

    return Rule(
        client,
        lambda layers: zip_reductions(
            mean=weighted_mean.reduction(layers, num_scalars=1),
            largest=Reduction(lambda: tf.constant(0.0), tf.maximum),
        ),
        server,
        needs=Needs(layers="model", loss="initial"),
        hparams=hparams,
    )
