"""Weighted means over clients by log-weights, with the round's measurements: the base of most rules."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping

import tensorflow as tf

from aggregators.core import checks
from aggregators.core.hyperparameters import Hparam
from aggregators.core.layers import ModelLayers
from aggregators.core.needs import Needs
from aggregators.core.reduction import Reduction, zip_reductions
from aggregators.core.rule import Rule, RuleResult, call
from aggregators.core.types import Part, Reduced, State, Structure, Tensors
from aggregators.core.update import ClientUpdate
from aggregators.weighted_mean.statistics import ClientStatistics, measure, statistics_reduction
from aggregators.weighted_mean.streaming import LogWeighted, mean_reduction

__all__ = ["reduction", "report", "rule", "weigh"]

_NOTHING_IN_ONE_LAYER = Needs(layers="model")


def rule(
    log_weight: Callable[[ClientUpdate, State], tf.Tensor | Part],
    *,
    needs: Needs = _NOTHING_IN_ONE_LAYER,
    hparams: Mapping[str, Hparam] | None = None,
    initial_state: Callable[[ModelLayers], State] | None = None,
    finish: Callable[[State, RuleResult], RuleResult] | None = None,
    num_scalars: int = 0,
    name: str = "weighted_mean",
) -> Rule:
    """The mean by clients' log-weights, as a rule.

    ```
    update[l] = sum_k exp(log_weight[k, l]) d[k, l] / sum_k exp(log_weight[k, l])
    ```

    for every layer `l` and client `k`, with `d` the update. It takes one pass over clients, and no
    weight over- or underflows.

    Args:
      log_weight: `(update, state) -> log-weight`, on each client: one floating number, or one for each
        layer of `needs`; -inf for a client that must not count. Or the result of `weigh`, to show
        scores or to average something other than the delta.
      needs: The measurements that clients take; by default none, and all tensors are one layer.
      hparams: The rule's hyperparameters, by name; see `hparam`. They are float64 in the state.
      initial_state: `layers -> OrderedDict` of the server's state; None for no state.
      finish: `(state, result) -> result`, at the server: changes the `RuleResult` of the mean, such as
        its state. The state stays as it was if no client counted. None to keep the mean as it is.
      num_scalars: As for `reduction`. They come last in the update that `finish` gets.
      name: The rule's name in its representation.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Raises:
      TypeError: If an argument is of the wrong kind.

    Example: the mean by optimizer steps

      >>> def by_steps(update, state):
      ...     return tf.math.log(update.weight * tf.cast(update.steps, tf.float64))
      >>> rule(by_steps, needs=Needs(steps=True, layers="model"), name="mean_by_steps")
      mean_by_steps()

    Example: the mean by examples that shows the updates' norms, and keeps the longest so far

      >>> def by_examples(update, state):
      ...     norm = tf.linalg.global_norm(update.delta)
      ...     return weigh(update, tf.math.log(update.weight), scores=norm)
      >>> def keep_longest(state, result):
      ...     longest = tf.reduce_max(result.measurements["score_max"].values)
      ...     return result._replace(state={"longest": tf.maximum(longest, state["longest"])})
      >>> longest = rule(
      ...     by_examples,
      ...     initial_state=lambda layers: {"longest": tf.constant(0.0)},
      ...     finish=keep_longest,
      ... )
    """
    checks.function("log_weight", log_weight, "(update, state)")
    if finish is not None:
        checks.function("finish", finish, "(state, result)")

    def client(update: ClientUpdate, state: State) -> Part:
        found = call("`log_weight`", log_weight, update, state)
        return found if isinstance(found, Mapping) else weigh(update, found)

    def server(state: State, reduced: Reduced) -> RuleResult:
        result = report(reduced)
        if finish is None:
            return result
        found = call("`finish`", finish, state, result)
        checks.returned("finish", found, RuleResult)
        return found._replace(state=unless(result.unchanged, found.state, state))

    return Rule(
        client,
        lambda layers: reduction(layers, num_scalars=num_scalars),
        server,
        needs=needs,
        hparams=OrderedDict(hparams or {}),
        name=name,
        **({} if initial_state is None else {"initial_state": initial_state}),
    )


def unless(unchanged: tf.Tensor, new: State, old: State) -> State:
    """The new state, or the old one if the model stays unchanged."""

    def choose(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        x, y = tf.convert_to_tensor(x), tf.convert_to_tensor(y)
        if x.dtype != y.dtype or not x.shape.is_compatible_with(y.shape):
            return x  # `BoundRule` refuses it, as it does other names and structures
        if x.shape.is_fully_defined():
            return tf.where(unchanged, y, x)
        return tf.cond(unchanged, lambda: y, lambda: x)

    kept = OrderedDict(new)
    for name in [name for name in new if name in old]:
        after, before = tf.nest.flatten(new[name]), tf.nest.flatten(old[name])
        if len(after) == len(before):
            kept[name] = tf.nest.pack_sequence_as(new[name], list(map(choose, after, before)))
    return kept


def weigh(
    update: ClientUpdate,
    log_weights: tf.Tensor,
    *,
    tensors: Tensors | None = None,
    scores: tf.Tensor | None = None,
    is_valid: tf.Tensor | bool = True,
    others: Tensors = (),
) -> OrderedDict[str, Structure]:
    """A client's part in `reduction`.

    Args:
      update: The client's update.
      log_weights: Logarithms of the client's weights, floating: one number, or a tensor of shape
        `[num_layers]`; -inf for weight 0. A client with NaN or infinity among them does not count.
      tensors: The tensors to average; the update's delta if None. Scalars beyond the delta's tensors
        come last.
      scores: The scores that the measurements show, of the same shapes; zeros if None.
      is_valid: False if the client must not count because of a bad score.
      others: The client's log-weights in further means, for the listing of single clients.

    Returns:
      A mapping of `mean` to a `LogWeighted`, and of `statistics` to `ClientStatistics`.

    Raises:
      TypeError: If a log-weight is not floating.

    Example:
      >>> update = ClientUpdate((tf.constant([1.0, 2.0]),), tf.constant(4.0), tf.constant(False))
      >>> weigh(update, tf.math.log(update.weight))["mean"].log_weights.numpy().round(4)
      1.3863
    """
    log_weights = tf.convert_to_tensor(log_weights)
    if not log_weights.dtype.is_floating:
        raise TypeError(
            "`log_weight` must return a floating number, or one for each layer; found "
            f"{log_weights.dtype.name} of shape {log_weights.shape}."
        )
    is_valid = is_valid & tf.reduce_all(log_weights < math.inf)  # nor may any be NaN
    counts = is_valid & ~update.non_finite
    log_weights = tf.where(counts, tf.cast(log_weights, tf.float64), -math.inf)
    statistics = ClientStatistics(
        tf.cast(tf.zeros_like(log_weights) if scores is None else scores, tf.float32),
        log_weights,
        update.non_finite,
        ~is_valid & ~update.non_finite,
        tuple(others),
    )
    chosen = update.delta if tensors is None else tensors
    return OrderedDict(mean=LogWeighted(tuple(chosen), log_weights), statistics=statistics)


def reduction(layers: ModelLayers, *, num_scalars: int = 0, others: int = 0) -> Reduction:
    """The mean of what `weigh` gives, and the measurements of its clients, in one pass.

    Args:
      layers: The layers.
      num_scalars: How many float32 numbers follow the delta's tensors; with some, all is one layer.
      others: How many further log-weights come along.

    Returns:
      A `Reduction`.

    Example: the mean of two clients, of weights 1 and 3, as `report` gives it

      >>> import numpy as np
      >>> import tensorflow_federated as tff
      >>> from aggregators.core.layers import layers_of_type
      >>> fold = reduction(layers_of_type("model", tff.to_type([(np.float32, [1])])))
      >>> total = fold.zero()
      >>> for number, weight in ((0.0, 1.0), (8.0, 3.0)):
      ...     update = ClientUpdate((tf.constant([number]),), weight, tf.constant(False))
      ...     total = fold.merge(total, fold.lift(weigh(update, tf.math.log(weight))))
      >>> result = report(fold.report(total))
      >>> result.update[0].numpy(), int(result.measurements["clients"])
      (array([6.], dtype=float32), 2)
    """
    specs = [*layers.specs, *[tf.TensorSpec([], tf.float32)] * num_scalars]
    groups = (tuple(range(len(specs))),) if num_scalars else layers.groups
    return zip_reductions(
        mean=mean_reduction(specs, groups),
        statistics=statistics_reduction(len(groups), layers.sample_size, others=others),
    )


def report(reduced: Reduced, scale: tf.Tensor | None = None, *, shares: Tensors = ()) -> RuleResult:
    """The mean and its measurements, as the result of a rule without a state.

    Args:
      reduced: The result of `reduction`.
      scale: The divisor of the scores, shape `[num_layers]`; ones if None.
      shares: The share of each mean in the result; see `aggregators.weighted_mean.statistics.measure`.

    Returns:
      A `RuleResult` without a state. If no client counted, its update is zeros and `unchanged` is True.

    Example: nobody counted

      >>> import numpy as np
      >>> import tensorflow_federated as tff
      >>> from aggregators.core.layers import layers_of_type
      >>> fold = reduction(layers_of_type("model", tff.to_type([(np.float32, [1])])))
      >>> result = report(fold.report(fold.zero()))
      >>> result.update[0].numpy(), bool(result.unchanged)
      (array([0.], dtype=float32), True)
    """
    totals = reduced["statistics"]
    if scale is None:
        scale = tf.ones(totals.largest.shape[1:])
    measured = measure(totals, scale, shares=shares)
    return RuleResult(
        OrderedDict(), tuple(reduced["mean"].tensors), measured, measured["clients"] <= 0
    )
