"""A mix of several means, by the clients' votes on which of them did better."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, TypeAlias

import attrs
import tensorflow as tf

from aggregators import weighted_mean
from aggregators.core import checks
from aggregators.core.candidates import Candidates, Error
from aggregators.core.hyperparameters import Hparam, Number, hparam
from aggregators.core.layers import Layers, ModelLayers
from aggregators.core.needs import Needs
from aggregators.core.reduction import Reduction, zip_reductions
from aggregators.core.rule import Rule, RuleResult, named_rule
from aggregators.core.types import Part, Reduced, State, Structure, Tensors
from aggregators.core.update import ClientUpdate, length
from aggregators.rules.adaptive_mean import ScoreLike, Weighed, weighed
from aggregators.rules.redescending_mean import (
    LENGTHS,
    shrinking,
    shrunk_mean,
    shrunk_reduction,
    sums_reduction,
)
from aggregators.weighted_mean.statistics import statistics_reduction
from aggregators.weighting import Weighting, softmax

CandidateMeans: TypeAlias = Sequence[tuple[ScoreLike, Weighting]]

# The trust in longer steps that gives half of the longest stride.
_STRIDE_MARGIN = 0.5


@attrs.frozen
class _CandidateMean:
    """One of the adaptive means that clients vote on, and its part of the rule's state.

    Attributes:
      name: The prefix of its part of the state, of its hyperparameters and measurements.
      by_score: Its weights.
    """

    name: str
    by_score: Weighed

    def hparams(self) -> OrderedDict[str, Hparam]:
        return OrderedDict((f"{self.name}_{n}", x) for n, x in self.by_score.hparams.items())

    def initial_state(self, layers: ModelLayers) -> OrderedDict[str, Structure]:
        own = self.by_score.initial_state(layers)
        return OrderedDict((f"{self.name}_{n}", x) for n, x in own.items())

    def view(self, state: State) -> State:
        """The state of the adaptive mean by itself."""
        names = ["typical_score", *self.by_score.hparams]
        return {"round": state["round"], **{n: state[f"{self.name}_{n}"] for n in names}}

    def next_state(self, state: State, mean_score: tf.Tensor) -> OrderedDict[str, Structure]:
        own = self.by_score.next_state(self.view(state), mean_score)
        return OrderedDict((f"{self.name}_{n}", x) for n, x in own.items())


@named_rule
def jury_mean(
    candidates: CandidateMeans | None = None,
    *,
    votes: Literal["model", "direction"] | Error = "model",
    layers: Layers = "model",
    sharpness: Number = 20.0,
    margin: Number = 0.3,
    vote_decay: Number = 0.8,
    gap_decay: Number = 0.5,
    vote_limit: Number = 6.0,
    vote_floor: Number = 1e-3,
    vote_rate: Number = 0.5,
    stride_step: Number | None = None,
    cutoff: Number = 2.5,
    power: Number = 3.0,
    initial_norm: float | None = 1.0,
    norm_quantile: Number = 0.5,
    norm_rate: Number = 0.2,
) -> Rule:
    """Moves from the redescending mean towards other means, as far as the clients' votes trust them.

    ```
    A      = sum_k n_k f_k d_k / sum_k n_k                   the redescending mean
    B_j    = sum_k n_k t_jk f_k d_k / sum_k n_k t_jk         candidate j; t_jk its weights
    a      = w - sum_j share_j gap_j,   b_j = a - gap_j      models that clients score
    v_jk   = clip(E_k(a) - E_k(b_j), +-vote_limit s_j)
    agree_j <- vote_decay agree_j + sum_k n_k v_jk / sum_k n_k
    size_j  <- vote_decay size_j + sum_k n_k |v_jk| / sum_k n_k
    trust_j = agree_j / max(size_j, vote_floor)
    share  = softmax over 0 and sharpness (trust_j - margin)     without that of 0, which is A's
    update = A + sum_j share_j (B_j - A)
    gap_j  <- gap_decay gap_j + (B_j - A)
    s_j    <- max(s_j exp(-vote_rate (share of clients with |v_jk| <= s_j  -  0.5)), vote_floor)
    ```

    with `d_k` the update and `n_k` the weight of client `k`, `f_k` as in `redescending_mean`, `w` the
    server's model, and `E_k` the mean error of a model over the client's examples. `a` is the model
    that the server would have if it had followed `A` alone lately, `b_j` the one if it had followed
    `B_j`. `s_j`, the size of a typical vote, is the running median of `|v_jk|` before clipping; each
    client counts once. For one candidate, `share` is `sigmoid(sharpness (trust - margin))`. One pass
    over clients, on any number of workers: the running median needs a count of clients alone.

    With a `stride_step` clients also vote on the length of the step (`s`, the last candidate). The
    stride grows slowly, to twice the step at most, and falls at once:

    ```
    a      = w - sum_j share_j gap_j - stride gap_s,   b_j = a - gap_j,   b_s = a - gap_s
    stride = min(sigmoid(sharpness (trust_s - 0.5)), stride + stride_step)
    update = (1 + stride) mix,   mix = A + sum_j share_j (B_j - A)
    gap_s  <- gap_decay gap_s + mix
    ```

    The default candidate is the mean of clients with a low training loss, `t_k = exp(-l_k / (T L))`,
    `L` the running mean loss. Clients with wrong labels do not reach a low loss. The votes decide how
    much weight this mean gets, because it lowers accuracy where honest clients differ.

    A client whose score for a candidate is not a finite number of at least 0 has no part in that
    candidate; a candidate without clients is `A`. A client with an error that is not finite does not
    count, and is one of the `non_finite_clients`.

    State: `typical_norm`; `gap`, the tensors of a model for each candidate; `share`, `agreement`,
    `vote_size` and `vote_scale` (`s`), float64 of shape `[candidates]`; and for each candidate
    `<candidate>_typical_score`. With a stride all but `share` have one more entry for it, and there is
    `stride`. The state is sent to clients with the model.

    Measurements: those of `redescending_mean`, and, by the candidates' names (one number for one
    candidate), `share`, `votes` (this round's mean), `vote_size`, `trust` and `clients_without_score`
    (int32). With a stride, `votes`, `vote_size` and `trust` have an entry for it, and there is `stride`.
    For votes by models, `loss_voting_clients` (int32) counts clients that fell back to the loss.

    Hyperparameters: all numbers but `initial_norm`, and those of the weightings as
    `<candidate>_<number>`.

    The rule guards against bad data and crude faults, not against adversaries. A client's update and
    votes count with its whole weight. If clients may lie about their number of examples, use
    `client_weighting=UNIFORM`. `vote_limit` limits the effect of a lying vote. But a client that
    reports a loss of 0 weighs more in that candidate, and enough such clients that vote for it steer
    the update. In a simulation, two liars of ten cost up to 8.7 points of accuracy against plain
    averaging and four up to 69, while `redescending_mean` lost at most 0.5. `examples/study` has
    attackers through TFF that cost more. A secure sum cannot compute it.

    Args:
      candidates: Pairs of a score and a weighting, as `adaptive_mean` takes them; at most one score
        besides `"loss"`, the training loss. None is `[("loss", weighting.softmax())]`. Add
        `(scores.kl_divergence, weighting.softmax())`, with `layers="tensor"`, for a mean by KL
        divergence, or `("loss", weighting.uniform(times_examples=False))` for one in which all clients
        count alike. A candidate is named after its score, or `uniform`.
      votes: How clients vote. `"model"`: by the errors of the candidate models on their own data, which
        are `1 - p(true label)` for a classifier and the loss for other models, with a forward pass for
        each model; see `Candidates`. A function `(predictions, labels) -> errors`: by these errors;
        `class_error` makes one for a classifier whose predictions do not show whether they are logits,
        or which labels are ignored. `"direction"`: by `v_jk = cos(d_k, gap_j)`, that is, whether a
        client moves along the gap; no model is scored, and the rule needs only updates and losses.
      layers: The tensors that candidates weigh together; see `Needs`.
      sharpness: At least 0: how sharply shares follow trust.
      margin: The trust, from -1 to 1, above which a candidate has a larger share than `A`.
      vote_decay: Share of earlier rounds in agreement and size, at least 0 and below 1.
      gap_decay: Share of the earlier gap, at least 0 and below 1.
      vote_limit: Above 0: how many typical votes one may count for.
      vote_floor: Above 0: the first and the least size of a typical vote. Smaller votes are rounding,
        and prove nothing.
      vote_rate: How fast the typical vote moves, from 0 (never) to 100: by a factor of at most
        `exp(vote_rate / 2)` in a round.
      stride_step: From 0 to 1: by how much the stride may grow in a round. None: steps are those of the
        mix. It needs votes by models.
      cutoff: As for `redescending_mean`.
      power: As for `redescending_mean`.
      initial_norm: As for `redescending_mean`.
      norm_quantile: As for `redescending_mean`.
      norm_rate: As for `redescending_mean`.

    Returns:
      A `Rule` for `build_fed_avg`; with `votes="direction"`, for `RuleFactory` and `federated_rule` too.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If an argument is out of its range.

    Example:
      >>> jury_mean().needs.names
      ('training_loss', 'candidate_errors', 'errors_are_losses')
      >>> jury_mean(votes="direction").needs.names
      ('training_loss',)
    """
    if not callable(votes) and (not isinstance(votes, str) or votes not in ("model", "direction")):
        raise ValueError(
            '`votes` must be "model", "direction" or a function of predictions and labels; found '
            f"{votes!r}."
        )
    strides = stride_step is not None
    if strides and votes == "direction":
        raise ValueError(
            '`stride_step` must be None with `votes="direction"`, since directions say nothing about '
            f"the length of a step; found {stride_step!r}. Take votes by models, or leave it out."
        )
    means = _checked(candidates, layers)
    voted_on = [*(mean.name for mean in means), *(["stride"] if strides else [])]
    shrink = shrinking(cutoff, power, initial_norm, norm_quantile, norm_rate)
    hparams: OrderedDict[str, Hparam] = OrderedDict(
        sharpness=hparam("sharpness", sharpness, 0.0, 1e6),
        margin=hparam("margin", margin, -1.0, 1.0),
        vote_decay=hparam("vote_decay", vote_decay, 0.0, 1.0, below=True),
        gap_decay=hparam("gap_decay", gap_decay, 0.0, 1.0, below=True),
        vote_limit=hparam("vote_limit", vote_limit, 0.0, above=True),
        vote_floor=hparam("vote_floor", vote_floor, 0.0, above=True),
        vote_rate=hparam("vote_rate", vote_rate, 0.0, 100.0),
        **shrink.hparams,
    )
    if strides:
        hparams["stride_step"] = hparam("stride_step", stride_step, 0.0, 1.0)
    for mean in means:
        hparams = checks.joined("candidates", hparams, mean.hparams())

    def client(update: ClientUpdate, state: State) -> Part:
        norm = length(update.delta)
        factor = shrink.log_factor(norm, state)
        weight = update.weight
        counts = (weight > 0.0) & ~update.non_finite
        scores, logs, is_valid = zip(
            *(mean.by_score.weights(update, mean.view(state)) for mean in means),
            strict=True,
        )
        plain = tf.math.log(weight) * tf.ones_like(logs[0])
        found = weighted_mean.weigh(
            update,
            plain + factor,
            scores=norm * tf.ones(plain.shape),
            others=[log + factor for log in logs],
        )
        raw = vote(update, norm, state)
        limit = state["vote_limit"] * state["vote_scale"]
        cast = tf.clip_by_value(raw, -limit, limit)
        is_usual = tf.abs(raw) <= state["vote_scale"]
        has_part = counts & tf.stack(is_valid)
        by_loss = votes == "model" and update.errors_are_losses
        sums = OrderedDict(
            shrink.counts(norm, counts, state),
            weight=tf.where(counts, weight, 0.0),
            votes=tf.where(counts, weight * tf.stack([cast, tf.abs(cast)]), 0.0),
            usual=tf.cast(counts & is_usual, tf.float64),
            scored=tf.cast(has_part, tf.float64),
            by_loss=tf.cast(counts & by_loss, tf.float64),
            scores=tf.where(has_part[:, tf.newaxis], tf.cast(tf.stack(scores), tf.float64), 0.0),
        )
        # Candidates without a typical score use the same operations and numbers as the first mean. They
        # equal it to the last bit, and the gap stays 0.
        shrunk = [shrunk_mean(update, log, factor) for log in (plain, *logs)]
        return OrderedDict(statistics=found["statistics"], sums=sums, **_numbered(shrunk))

    def vote(update: ClientUpdate, norm: tf.Tensor, state: State) -> tf.Tensor:
        """One client's votes, float64 `[voted on]`; above 0 for a candidate that did better."""
        if votes != "direction":
            errors = tf.cast(update.candidate_errors, tf.float64)
            return errors[0] - errors[1:]
        # A gap that is mere rounding has a direction too, which must not count.
        least = state["vote_floor"] * state["typical_norm"]
        norm = tf.cast(norm, tf.float64)
        return tf.stack(
            [
                tf.math.divide_no_nan(
                    _product(update.delta, gap),
                    tf.maximum(tf.cast(length(gap), tf.float64), least) * norm,
                )
                for gap in state["gap"]
            ]
        )

    def server(state: State, reduced: Reduced) -> RuleResult:
        sums = reduced["sums"]
        voted = tf.math.divide_no_nan(sums["votes"], sums["weight"])
        agreement = state["vote_decay"] * state["agreement"] + voted[0]
        size = state["vote_decay"] * state["vote_size"] + voted[1]
        trust = agreement / tf.maximum(size, state["vote_floor"])
        shares = _shares(state["sharpness"], state["margin"], trust[: len(means)])

        first, *others = [reduced[name] for name in _numbered([None] * (1 + len(means)))]
        mix, apart = list(first.tensors), []
        for part, other in zip(tf.unstack(shares), others, strict=True):
            both = zip(first.tensors, other.tensors, other.has_weight, strict=True)
            apart.append([tf.where(has_weight, b - a, 0) for a, b, has_weight in both])
            mix = _along(mix, part, apart[-1])
        update, kept = shrink.shortened(mix, state, sums)
        if strides:
            apart.append(update)
            stride = tf.sigmoid(state["sharpness"] * (trust[-1] - _STRIDE_MARGIN))
            stride = tf.minimum(stride, state["stride"] + state["stride_step"])
            update, kept = _along(update, stride, update), kept * (1.0 + stride)
        kept_gaps = zip(state["gap"], apart, strict=True)
        gaps = tuple(tuple(_along(d, state["gap_decay"], gap)) for gap, d in kept_gaps)
        # The factor in the update of a client's normalised weight in each mean.
        parts = [1.0 - tf.reduce_sum(shares), *tf.unstack(shares)]
        used = [kept * part * one.kept for part, one in zip(parts, [first, *others], strict=True)]
        result = weighted_mean.report(
            {"mean": first, "statistics": reduced["statistics"]}, shares=used
        )
        measured = OrderedDict(result.measurements)
        moved = OrderedDict(
            gap=gaps,
            share=shares,
            agreement=agreement,
            vote_size=size,
            vote_scale=next_vote_scale(state, measured["clients"], sums["usual"]),
        )
        if strides:
            moved["stride"] = stride
        own = shrink.next_state(state, measured["clients"], sums)
        own.update(weighted_mean.unless(result.unchanged, moved, state))
        mean_scores = sums["scores"] / sums["scored"][:, tf.newaxis]  # NaN, if nobody had a part
        for mean, mean_score in zip(means, tf.unstack(mean_scores), strict=True):
            own.update(mean.next_state(state, mean_score))
        measured.update(shrink.measurements(state, sums))
        counted = tf.cast(measured["clients"], tf.float64)
        shown = OrderedDict(share=shares, votes=voted[0], vote_size=size, trust=trust)
        for name, values in shown.items():
            measured[name] = _by_name(voted_on, tf.cast(values, tf.float32))
        without_score = tf.cast(counted - sums["scored"], tf.int32)
        measured["clients_without_score"] = _by_name(voted_on, without_score)
        if strides:
            measured["stride"] = tf.cast(stride, tf.float32)
        if votes == "model":
            measured["loss_voting_clients"] = tf.cast(sums["by_loss"], tf.int32)
        return RuleResult(own, update, measured, result.unchanged)

    def next_vote_scale(state: State, clients: tf.Tensor, usual: tf.Tensor) -> tf.Tensor:
        """The typical votes after a round in which so many clients cast no larger ones."""
        share = tf.math.divide_no_nan(usual, tf.cast(clients, tf.float64))
        moved = state["vote_scale"] * tf.exp(-state["vote_rate"] * (share - 0.5))
        # In the first round all candidates are one model, so there are no votes.
        moved = tf.where(state["round"] > 0, moved, state["vote_scale"])
        return tf.maximum(moved, state["vote_floor"])

    def initial_state(layers: ModelLayers) -> OrderedDict[str, Structure]:
        start = tf.constant(0)
        none = tf.zeros([len(voted_on)], tf.float64)
        sharpness = hparams["sharpness"].at(start)
        shares = _shares(sharpness, hparams["margin"].at(start), none[: len(means)])
        gap = tuple(layers.zeros() for _ in voted_on)
        own = shrink.initial_state()
        typical = none + hparams["vote_floor"].at(start)
        own.update(gap=gap, share=shares, agreement=none, vote_size=none, vote_scale=typical)
        if strides:
            own["stride"] = tf.sigmoid(-sharpness * _STRIDE_MARGIN)
        for mean in means:
            own = checks.joined("candidates", own, mean.initial_state(layers))
        return own

    def reduction(layers: ModelLayers) -> Reduction:
        number, size = len(means), len(layers.groups)
        return zip_reductions(
            statistics=statistics_reduction(size, layers.sample_size, others=number),
            sums=sums_reduction(
                OrderedDict(
                    OrderedDict.fromkeys(LENGTHS, ()),
                    weight=[],
                    votes=[2, len(voted_on)],
                    usual=[len(voted_on)],
                    scored=[number],
                    by_loss=[],
                    scores=[number, size],
                )
            ),
            **_numbered([shrunk_reduction(layers)] * (1 + number)),
        )

    scored = [mean.by_score.needs.score for mean in means]
    needs = Needs(
        score=next((score for score in scored if score is not None), None),
        layers=layers,
        loss="training" if any(mean.by_score.needs.loss for mean in means) else None,
        candidates=None
        if votes == "direction"
        else Candidates(_models, 1 + len(voted_on), None if votes == "model" else votes),
    )
    return Rule(
        client, reduction, server, needs=needs, initial_state=initial_state, hparams=hparams
    )


def _models(weights: Tensors, state: State) -> list[list[tf.Tensor]]:
    """The models that clients score: `a`, then `b_j` for each candidate."""
    plain = list(weights)
    parts = [*tf.unstack(state["share"]), *([state["stride"]] if "stride" in state else [])]
    for part, gap in zip(parts, state["gap"], strict=True):
        plain = _along(plain, part, gap)
    return [plain, *([w - g for w, g in zip(plain, gap, strict=True)] for gap in state["gap"])]


def _along(start: Tensors, far: tf.Tensor, way: Tensors) -> list[tf.Tensor]:
    """`start + far way`."""
    return [x + tf.cast(far, x.dtype) * d for x, d in zip(start, way, strict=True)]


def _shares(sharpness: tf.Tensor, margin: tf.Tensor, trust: tf.Tensor) -> tf.Tensor:
    """The candidates' shares: a softmax in which the redescending mean has 0."""
    return tf.nn.softmax(tf.concat([[0.0], sharpness * (trust - margin)], 0))[1:]


def _product(a: Tensors, b: Tensors) -> tf.Tensor:
    """The inner product of all tensors as one vector, float64."""
    wide = [tf.float32 if x.dtype.size < 4 else x.dtype for x in a]
    parts = [
        tf.reduce_sum(tf.cast(x, kind) * tf.cast(y, kind))
        for x, y, kind in zip(a, b, wide, strict=True)
    ]
    return tf.add_n([tf.cast(part, tf.float64) for part in parts])


def _numbered(means: Sequence[Structure]) -> OrderedDict[str, Structure]:
    return OrderedDict((f"mean_{number}", mean) for number, mean in enumerate(means))


def _by_name(names: Sequence[str], values: tf.Tensor) -> tf.Tensor | OrderedDict[str, tf.Tensor]:
    """The values by the first of these names; a single value as it is."""
    named = OrderedDict(zip(names, tf.unstack(values), strict=False))
    return named if len(named) > 1 else next(iter(named.values()))


def _checked(candidates: CandidateMeans | None, layers: Layers) -> tuple[_CandidateMean, ...]:
    """The candidates, each named after its score."""
    given: CandidateMeans = [("loss", softmax())] if candidates is None else candidates
    pairs: list[tuple[ScoreLike, Weighting]] = list(given) if isinstance(given, Sequence) else []
    if not pairs or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            "`candidates` must be pairs of a score and a weighting, at least one, such as "
            f'[("loss", weighting.softmax())]; found {candidates!r}.'
        )
    means: list[_CandidateMean] = []
    for score, weighting in pairs:
        by_score = weighed(score, weighting, layers, None)
        name = "loss" if by_score.needs.score is None else by_score.needs.score.name
        name = "uniform" if weighting.is_uniform else name
        same = sum(mean.name == name for mean in means)
        means.append(_CandidateMean(name if not same else f"{name}_{same + 1}", by_score))
    found = {mean.by_score.needs.score for mean in means} - {None}
    if len(found) > 1:
        raise ValueError(
            '`candidates` must have at most one score besides "loss", since clients take one; found '
            f"{sorted(score.name for score in found if score)}."
        )
    return tuple(means)
