"""The adaptive mean behind a gate that depends on the round, FedMed-style."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, NamedTuple

import tensorflow as tf

from aggregators import weighted_mean
from aggregators.core import checks
from aggregators.core.autograph import with_autograph
from aggregators.core.hyperparameters import Number, hparam
from aggregators.core.layers import Layers, ModelLayers
from aggregators.core.needs import LossAt
from aggregators.core.reduction import Reduction, zip_reductions
from aggregators.core.rule import Rule, RuleResult, named_rule
from aggregators.core.types import Part, Reduced, State, Structure
from aggregators.core.update import ClientUpdate
from aggregators.rules.adaptive_mean import ScoreLike, weighed
from aggregators.scores import js_divergence
from aggregators.weighted_mean.streaming import LogWeighted, mean_reduction
from aggregators.weighting import Weighting, softmax


class Round(NamedTuple):
    """A gate's view of this round and the earlier ones, all float64 except `round`.

    Attributes:
      round: int32 scalar: the number of earlier rounds.
      loss: Mean loss of the clients that counted, by their weights.
      previous_loss: The same for the last round in which a client counted; NaN if there was none.
      scores: Their mean score, shape `[num_layers]`.
      typical_score: Running mean score of earlier rounds, shape `[num_layers]`; 0 where unknown.
    """

    round: tf.Tensor
    loss: tf.Tensor
    previous_loss: tf.Tensor
    scores: tf.Tensor
    typical_score: tf.Tensor


Gate = Callable[[Round], tf.Tensor]

_ADVICE = (
    "Write `def gate(seen)`, a function of a `Round`, with TensorFlow operations, that returns one "
    "number from 0 (plain mean) to 1 (adaptive mean), or one bool."
)


@named_rule
def loss_gated(
    weighting: Weighting | None = None,
    *,
    score: ScoreLike = js_divergence,
    layers: Layers = "tensor",
    loss_at: LossAt = "training",
    gate: Literal["not_fallen", "fallen"] | Gate = "not_fallen",
    min_decrease: Number = 0.0,
) -> Rule:
    """Mixes the plain and the adaptive mean, by the clients' loss or by your own gate.

    ```
    update = plain + share (adaptive - plain),   plain = sum_k n_k d_k / sum_k n_k
    loss_t = sum_k n_k F_k / sum_k n_k
    fell = loss_t < loss_(t-1) - min_decrease |loss_(t-1)|
    share = 1 if not fell else 0            for gate="not_fallen"
    share = 1 if fell else 0                for gate="fallen"
    share = gate(Round)                     for your own function
    ```

    with `F_k` the loss of client `k`, `n_k` its weight, `d_k` its update, and `adaptive` the mean of
    `adaptive_mean`. Both means and the loss take one pass together. Named gates stay closed until there
    is a previous loss, so always in round 1. Your own gate is called in every round.

    The state is that of `adaptive_mean` and `previous_loss` (NaN if none). Measurements are those of
    the adaptive mean, in plain rounds too (but `sample_weights` are those in use), and `loss`,
    `previous_loss`, `share`, `adaptive` (int32, 1 if the share was above 0) and `gate_out_of_range`
    (int32): 1 if the gate returned NaN, which counts as 0, or a number outside of 0 to 1, which is
    clipped.

    Args:
      weighting: The weighting of the adaptive mean; a softmax that prefers near clients if None.
      score: As for `adaptive_mean`.
      layers: As for `adaptive_mean`.
      loss_at: Which loss clients measure; see `Needs`.
      gate: `"not_fallen"`, `"fallen"`, or a function of a `Round` that returns a share or a bool.
      min_decrease: Relative decrease of the loss that counts as a fall, at least 0 and below 1: a
        hyperparameter of the gates by name.

    Returns:
      A `Rule` for `build_fed_avg` or `federated_rule`.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of its range.

    Example:
      >>> def late(seen):
      ...     return tf.minimum(tf.cast(seen.round, tf.float64) / 10.0, 1.0)
      >>> loss_gated(gate=late).needs.names
      ('js_divergence', 'training_loss')

    Source: the gates by name follow Algorithm 1 of Wu, Liang, Wang, FedMed: A Federated Learning
    Framework for Language Modeling, 2020. Choices that the algorithm leaves open are arguments here,
    with defaults of this package: no claim is made to reproduce the source's numbers.
    """
    if not callable(gate) and (not isinstance(gate, str) or gate not in ("not_fallen", "fallen")):
        raise ValueError(
            f'`gate` must be "not_fallen", "fallen" or a function; found {gate!r}. {_ADVICE}'
        )
    by_score = weighed(score, softmax() if weighting is None else weighting, layers, loss_at)
    least_fall = hparam("min_decrease", min_decrease, 0.0, 1.0, below=True)
    if callable(gate) and min_decrease != 0.0:
        raise ValueError(
            f"`min_decrease` must be 0 for your own gate, which does not use it; found "
            f"{min_decrease!r}."
        )

    def client(update: ClientUpdate, state: State) -> Part:
        scores, logs, is_valid = by_score.weights(update, state)
        # One weight for all layers: those of the plain mean do not differ between them.
        plain_log = tf.where(is_valid, tf.math.log(update.weight), -math.inf)
        adaptive = weighted_mean.weigh(
            update, logs, scores=scores, is_valid=is_valid, others=(plain_log,)
        )
        plain = LogWeighted((*update.delta, tf.cast(update.loss, tf.float32)), plain_log)
        return OrderedDict(adaptive=adaptive, plain=plain)

    def server(state: State, reduced: Reduced) -> RuleResult:
        *plain, loss = reduced["plain"].tensors
        totals = reduced["adaptive"]["statistics"]
        previous = state["previous_loss"]
        counted = totals.sums[0]
        seen = Round(
            round=state["round"],
            loss=tf.cast(loss, tf.float64),
            previous_loss=tf.cast(previous, tf.float64),
            scores=totals.sums[4:] / counted,
            typical_score=tf.cast(state["typical_score"], tf.float64),
        )
        if callable(gate):
            asked = _ask(gate, seen)
        else:
            fell = seen.loss < seen.previous_loss - state["min_decrease"] * tf.abs(
                seen.previous_loss
            )
            opened = (fell if gate == "fallen" else ~fell) & ~tf.math.is_nan(previous)
            asked = tf.cast(opened, tf.float64)
        some = counted > 0.0
        asked = tf.where(some, asked, 0.0)
        in_range = (asked >= 0.0) & (asked <= 1.0)
        number = tf.where(tf.math.is_nan(asked), tf.zeros_like(asked), asked)
        share = tf.clip_by_value(number, 0.0, 1.0)
        result = weighted_mean.report(
            reduced["adaptive"], by_score.scale(state), shares=(share, 1.0 - share)
        )
        update = [
            # If one mean is taken whole, the other must leave no rounding behind.
            tf.where(share == 1.0, a, p + tf.cast(share, p.dtype) * (a - p))
            for a, p in zip(result.update, plain, strict=True)
        ]
        own = by_score.next_state(state, result.measurements["score_mean"].values)
        own["previous_loss"] = tf.where(some, loss, previous)
        measured = OrderedDict(
            result.measurements,
            loss=tf.where(some, loss, math.nan),
            previous_loss=previous,
            share=tf.cast(share, tf.float32),
            adaptive=tf.cast(share > 0.0, tf.int32),
            gate_out_of_range=tf.cast(~in_range, tf.int32),
        )
        return RuleResult(own, update, measured, result.unchanged)

    def initial_state(layers: ModelLayers) -> OrderedDict[str, Structure]:
        return OrderedDict(by_score.initial_state(layers), previous_loss=tf.constant(math.nan))

    def reduction(layers: ModelLayers) -> Reduction:
        specs = [*layers.specs, tf.TensorSpec([], tf.float32)]
        return zip_reductions(
            adaptive=weighted_mean.reduction(layers, others=1),
            plain=mean_reduction(specs, (tuple(range(len(specs))),)),
        )

    own = {} if callable(gate) else {"min_decrease": least_fall}
    return Rule(
        client,
        reduction,
        server,
        needs=by_score.needs,
        initial_state=initial_state,
        hparams=checks.joined("weighting", by_score.hparams, own),
    )


def _ask(gate: Gate, seen: Round) -> tf.Tensor:
    """Calls a gate and checks what it returns: one float64 number."""
    found = checks.called(
        "`gate` must be a function of a `Round`",
        lambda: tf.convert_to_tensor(with_autograph(gate)(seen)),
        found=f"{gate!r}, which failed",
        advice=_ADVICE,
    )
    if found.shape.rank != 0 or not (found.dtype.is_floating or found.dtype == tf.bool):
        raise TypeError(
            f"`gate` must return one floating number or bool; found {found.dtype.name} of shape "
            f"{found.shape} from {gate!r}. {_ADVICE}"
        )
    return tf.cast(found, tf.float64)
