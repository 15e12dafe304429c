"""The mean over clients, weighted layer by layer by the scores of their models."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal, TypeAlias

import attrs
import tensorflow as tf

from aggregators import weighted_mean
from aggregators.core import checks
from aggregators.core.hyperparameters import Hparam
from aggregators.core.layers import Layers, ModelLayers
from aggregators.core.needs import LossAt, Needs
from aggregators.core.rule import PerLayer, Rule, RuleResult, named_rule
from aggregators.core.score import Function, Score
from aggregators.core.types import Part, State, Structure
from aggregators.core.update import ClientUpdate
from aggregators.weighting import (
    Weighting,
    check_weighting,
    log_weights,
    next_typical_score,
    relative_scale,
)

ScoreLike: TypeAlias = Score | Function | Literal["loss"]


@attrs.frozen
class Weighed:
    """The adaptive weights of a rule, which other rules use too.

    Attributes:
      needs: The measurements that clients take.
      weighting: How scores become weights.
    """

    needs: Needs
    weighting: Weighting

    @property
    def hparams(self) -> Mapping[str, Hparam]:
        """The weighting's hyperparameters."""
        return self.weighting.all_hparams

    def initial_state(self, layers: ModelLayers) -> OrderedDict[str, Structure]:
        """`typical_score`, the mean score of earlier rounds: zeros, since it is unknown."""
        return OrderedDict(typical_score=tf.zeros([len(layers.names)]))

    def weights(self, update: ClientUpdate, state: State) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The client's scores, its log-weights, and whether its scores are valid."""
        scores = update.scores
        if self.needs.score is None:
            scores = tf.ones_like(state["typical_score"]) * update.loss
        loss = None if self.needs.loss is None else update.loss
        return scores, *log_weights(self.weighting, scores, update.weight, state, loss)

    def scale(self, state: State) -> tf.Tensor:
        """The divisor of the scores."""
        return relative_scale(self.weighting, state)

    def next_state(self, state: State, mean_score: tf.Tensor) -> OrderedDict[str, Structure]:
        """`typical_score` after a round with this mean score."""
        return OrderedDict(typical_score=next_typical_score(self.weighting, state, mean_score))


def weighed(
    score: ScoreLike, weighting: Weighting, layers: Layers, loss_at: LossAt | None
) -> Weighed:
    """Checks the arguments that rules around adaptive weights share; see `adaptive_mean`."""
    check_weighting(weighting)
    if loss_at is not None:
        checks.word("loss_at", loss_at, "training", "initial")
    if isinstance(score, str) and score == "loss":
        return Weighed(Needs(layers=layers, loss=loss_at or "training"), weighting)
    if score is None or isinstance(score, str):
        raise TypeError(
            f'`score` must be a score or "loss"; found {score!r}. Use one from `aggregators.scores`, '
            "such as `scores.kl_divergence`."
        )
    return Weighed(Needs(score=score, layers=layers, loss=loss_at), weighting)


@named_rule
def adaptive_mean(
    score: ScoreLike,
    weighting: Weighting,
    *,
    layers: Layers = "tensor",
    loss_at: LossAt | None = None,
) -> Rule:
    """The mean over clients, weighted layer by layer by the scores of their models.

    ```
    update[l] = sum_k w[k, l] d[k, l] / sum_k w[k, l]
    ```

    for every layer `l` and client `k`, with `d` the update. `weighting` computes `w` from the score of
    layer `l` and the client's weight. The scale of weights does not matter. It takes one pass.

    The state holds `typical_score`, the running mean score per layer, and the weighting's
    hyperparameters. With the default running scale, the first round is plain averaging. Measurements:
    see `aggregators.weighted_mean.statistics.measure`. The `bound` of `weighting` limits the ratio of
    two clients' weights, not the size of an update: for that put
    `tff.aggregators.clipping_factory(norm, ...)` around the factory.

    KL divergence that prefers near clients helps if honest clients are alike (Dirichlet splits of 0.5
    and more) and some are bad, by 3 to 8 points of accuracy in `examples/study`; at stronger splits,
    against updates times -1. It hurts if honest clients differ: by 4 points with nobody bad, by 8 with
    random labels, 18 in the worst setting, since there honest clients are far and those with random
    labels are near. To get the gain without the loss, use it as a candidate of `jury_mean`, whose
    clients vote on it: `[("loss", weighting.softmax()), (scores.kl_divergence, weighting.softmax())]`
    with `layers="tensor"`. The rule trusts the clients' reports: a client that reports a distance or a
    loss of 0 counts for most.

    Args:
      score: How far a layer is from the server's: one from `aggregators.scores`; your own `Score`; a
        bare function of `(server_layer, client_layer)`, which is assumed to need the server's model; or
        `"loss"`, the client's loss, in all layers.
      weighting: How scores become weights; from `aggregators.weighting`.
      layers: The tensors that are weighed together: `"tensor"`, `"layer"`, `"model"` or groups of
        positions; see `aggregators.core.layers.resolve_layers`.
      loss_at: Which loss is measured, for `score="loss"` and for your own weighting if it uses
        `seen.loss`: `"training"` (the default for the score) or `"initial"`; see `Needs`.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of its range.

    Example:
      >>> from aggregators import scores, weighting
      >>> rule = adaptive_mean(scores.kl_divergence, weighting.softmax(0.5, bound=20.0))
      >>> list(rule.hparams)
      ['temperature', 'bound', 'decay']
    """
    by_score = weighed(score, weighting, layers, loss_at)
    if loss_at is not None and not (isinstance(score, str) or weighting.is_own):
        raise ValueError(
            "`loss_at` must be None if neither score nor weighting uses the loss; found "
            f'{loss_at!r}. Use `score="loss"`, or a weighting whose rule takes `seen`.'
        )

    def log_weight(update: ClientUpdate, state: State) -> Part:
        scores, logs, is_valid = by_score.weights(update, state)
        return weighted_mean.weigh(update, logs, scores=scores, is_valid=is_valid)

    def finish(state: State, result: RuleResult) -> RuleResult:
        measured = result.measurements
        scale = PerLayer(tf.cast(by_score.scale(state), tf.float32))
        return result._replace(
            state=by_score.next_state(state, measured["score_mean"].values),
            measurements=OrderedDict(measured, scale=scale),
        )

    return weighted_mean.rule(
        log_weight,
        needs=by_score.needs,
        hparams=by_score.hparams,
        initial_state=by_score.initial_state,
        finish=finish,
    )
