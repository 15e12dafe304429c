"""The mean of what clients add to the last update, cut to a length."""

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
    """The last update, moved by the mean of how clients differ from it, each cut to `radius`.

    ```
    update = v + mean over k of (d_k - v) min(1, radius / |d_k - v|)
    v     <- update
    ```

    with `d_k` the update over all tensors, of the clients that count, each once: numbers of examples
    do not enter. `v` is the update of the round before, `center` in the state, and 0 at first. A client
    moves the update by at most `radius / K`, of `K` clients, whatever it sends. One pass, any number of
    workers; the state and what is broadcast grow by a model.

    `radius` is in the units of an update's norm, and has no default: `score_mean` shows the mean of
    `|d_k - v|`, and `clipped_clients` how many were beyond the radius.

    Of the robust rules of the literature it came nearest to being safe in a simulation of 30 settings:
    2 points of accuracy below plain averaging at worst, with random labels at a strong split. The source
    asks for momentum at the clients, which TFF's clients lose after a round (`kept_optimizer` keeps it).
    It may also repeat the step within a round, with one pass over clients each. Not for a secure sum.

    Measurements: `|d_k - v|` in place of scores; weights after clipping; `clipped_clients` (int32).

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
