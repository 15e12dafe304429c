"""The mean of clients' differences from the last update, clipped to a length."""

from collections import OrderedDict

import tensorflow as tf

from aggregators import weighted_mean
from aggregators.core.hyperparameters import Number, hparam
from aggregators.core.needs import Needs
from aggregators.core.reduction import zip_reductions
from aggregators.core.rule import Rule, RuleResult, named_rule
from aggregators.core.types import Part, Reduced, State
from aggregators.core.update import ClientUpdate, length
from aggregators.rules.redescending_mean import shrunk_mean, shrunk_reduction, sums_reduction
from aggregators.weighted_mean.statistics import statistics_reduction


@named_rule
def centered_clipping(radius: Number) -> Rule:
    """The last update plus the mean of clients' differences from it, each clipped to `radius`.

    ```
    update = v + mean over k of (d_k - v) min(1, radius / |d_k - v|)
    v     <- update
    ```

    with `d_k` the update over all tensors. Each client that counts does so once, whatever its number of
    examples. `v` is the last round's update, `center` in the state, and 0 at first. One of `K` clients
    moves the update by at most `radius / K`, whatever it sends. It takes one pass, on any number of
    workers. The state and the broadcast grow by a model.

    `radius` has the unit of an update's norm, and no default: `score_mean` shows the mean of `|d_k -
    v|`, and `clipped_clients` how many were beyond the radius.

    Of the robust rules of the literature it came nearest to being safe in a simulation of 30 settings:
    2 points of accuracy below plain averaging at worst, with random labels at a strong split. The source
    asks for momentum at the clients, which TFF's clients lose after a round (`kept_optimizer` keeps it).
    It may also repeat the step within a round, with one pass over clients each. A secure sum cannot
    compute it.

    Measurements: `|d_k - v|` as scores; weights after clipping; `clipped_clients` (int32).

    Args:
      radius: Above 0. A hyperparameter.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Raises:
      ValueError: If an argument is out of its range.

    Example:
      >>> list(centered_clipping(0.5).hparams)
      ['radius']

    Source: Karimireddy, He, Jaggi, Learning from History for Byzantine Robust Optimization, 2021.
    """

    def client(update: ClientUpdate, state: State) -> Part:
        apart = tuple(x - v for x, v in zip(update.delta, state["center"], strict=True))
        norm = length(apart)
        factor = tf.minimum(tf.math.log(state["radius"] / tf.cast(norm, tf.float64)), 0.0)
        counts = update.weight > 0.0
        once = tf.math.log(tf.cast(counts, tf.float64))
        found = weighted_mean.weigh(update, once + factor, scores=norm)
        return OrderedDict(
            mean=shrunk_mean(update._replace(delta=apart), once, factor),
            statistics=found["statistics"],
            sums=OrderedDict(clipped=tf.cast(counts & (factor < 0.0), tf.float64)),
        )

    def server(state: State, reduced: Reduced) -> RuleResult:
        mean = reduced["mean"]
        result = weighted_mean.report(reduced, shares=(mean.kept,))
        clipped = tf.cast(reduced["sums"]["clipped"], tf.int32)
        measured = OrderedDict(result.measurements, clipped_clients=clipped)
        update = tuple(
            tf.where(result.unchanged, v, v + x)
            for v, x in zip(state["center"], mean.tensors, strict=True)
        )
        return RuleResult(OrderedDict(center=update), update, measured, result.unchanged)

    return Rule(
        client,
        lambda layers: zip_reductions(
            mean=shrunk_reduction(layers),
            statistics=statistics_reduction(1, layers.sample_size),
            sums=sums_reduction(OrderedDict(clipped=[])),
        ),
        server,
        needs=Needs(layers="model"),
        initial_state=lambda layers: OrderedDict(center=layers.zeros()),
        hparams=OrderedDict(radius=hparam("radius", radius, 0.0, above=True)),
    )
