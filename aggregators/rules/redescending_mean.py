"""The mean by examples, with updates that are much too long shrunk below the right length."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import attrs
import tensorflow as tf

from aggregators import weighted_mean
from aggregators.core import checks
from aggregators.core.hyperparameters import Hparam, Number, hparam
from aggregators.core.layers import ModelLayers
from aggregators.core.needs import Needs
from aggregators.core.reduction import Reduction, zip_reductions
from aggregators.core.rule import Rule, RuleResult, named_rule
from aggregators.core.types import Part, Reduced, State, Structure, Tensors
from aggregators.core.update import ClientUpdate, length
from aggregators.weighted_mean.statistics import statistics_reduction
from aggregators.weighted_mean.streaming import (
    LogWeighted,
    by_layer,
    log_add,
    mean_reduction,
    share,
)

_LEAST_NORM = 1e-30

# The counts and sums of `Shrinking`.
LENGTHS = ("within", "shrunk", "moving", "log_norm")


@attrs.frozen
class Shrinking:
    """Shrinks long updates, for `redescending_mean` and `jury_mean`.

    Attributes:
      initial_norm: The typical norm before the first round; None if unknown.
      hparams: `cutoff`, `power`, `norm_quantile` and `norm_rate`.
    """

    initial_norm: float | None
    hparams: Mapping[str, Hparam]

    def initial_state(self) -> OrderedDict[str, Structure]:
        """`typical_norm`, float64; 0 if unknown."""
        return OrderedDict(typical_norm=tf.constant(self.initial_norm or 0.0, tf.float64))

    def log_factor(self, norm: tf.Tensor, state: State) -> tf.Tensor:
        """The logarithm of the factor of an update with this norm, float64, at most 0."""
        typical = state["typical_norm"]
        longest = tf.math.log(state["cutoff"] * typical / tf.cast(norm, tf.float64))
        return tf.where(typical > 0.0, state["power"] * tf.minimum(longest, 0.0), 0.0)

    def counts(
        self, norm: tf.Tensor, counts: tf.Tensor, state: State
    ) -> OrderedDict[str, tf.Tensor]:
        """Whether a client's update is at most typical, shrunk, or above 0; and the norm's logarithm."""
        norm, typical = tf.cast(norm, tf.float64), state["typical_norm"]
        within = norm <= typical
        shrunk = (norm > state["cutoff"] * typical) & (typical > 0.0)
        moves = counts & (norm > 0.0)
        kinds = (counts & within, counts & shrunk, moves)
        found = OrderedDict(
            (name, tf.cast(kind, tf.float64)) for name, kind in zip(LENGTHS, kinds, strict=False)
        )
        found["log_norm"] = tf.where(moves, tf.math.log(norm), 0.0)
        return found

    def measurements(
        self, state: State, sums: Mapping[str, tf.Tensor]
    ) -> OrderedDict[str, tf.Tensor]:
        """`typical_norm` as it was used, and `shrunk_clients`."""
        return OrderedDict(
            typical_norm=tf.cast(state["typical_norm"], tf.float32),
            shrunk_clients=tf.cast(sums["shrunk"], tf.int32),
        )

    def next_state(
        self, state: State, clients: tf.Tensor, sums: Mapping[str, tf.Tensor]
    ) -> OrderedDict[str, Structure]:
        """The typical norm after a round; unchanged if nobody counted."""
        found = tf.math.divide_no_nan(sums["within"], tf.cast(clients, tf.float64))
        step = tf.exp(-state["norm_rate"] * (found - state["norm_quantile"]))
        typical = state["typical_norm"]
        moved = tf.clip_by_value(typical * step, _LEAST_NORM, 1.0 / _LEAST_NORM)
        moved = tf.where(typical > 0.0, moved, self._first(sums))
        return OrderedDict(typical_norm=tf.where(clients > 0, moved, typical))

    def shortened(
        self, tensors: Tensors, state: State, sums: Mapping[str, tf.Tensor]
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """A round's mean, shortened in the first round, and the factor, float64; 1 in later rounds."""
        if self.initial_norm is not None:
            return list(tensors), tf.constant(1.0, tf.float64)
        most = tf.math.divide_no_nan(self._first(sums), tf.cast(length(tensors), tf.float64))
        kept = tf.where(state["typical_norm"] > 0.0, tf.ones_like(most), tf.minimum(most, 1.0))
        return [tf.cast(kept, x.dtype) * x for x in tensors], kept

    def _first(self, sums: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """The geometric mean of the updates' norms above 0; 0 if there is none."""
        mean = tf.exp(tf.math.divide_no_nan(sums["log_norm"], sums["moving"]))
        return tf.where(sums["moving"] > 0.0, mean, 0.0)


def shrinking(
    cutoff: Number,
    power: Number,
    initial_norm: float | None,
    norm_quantile: Number,
    norm_rate: Number,
) -> Shrinking:
    """Checks the arguments that rules with `Shrinking` share; see `redescending_mean`."""
    if initial_norm is not None:
        within = checks.Range(_LEAST_NORM, 1.0 / _LEAST_NORM)
        initial_norm = checks.number("initial_norm", initial_norm, within, more=", or None")
    return Shrinking(
        initial_norm,
        OrderedDict(
            cutoff=hparam("cutoff", cutoff, 0.0, above=True),
            power=hparam("power", power, 0.0, 1000.0),
            norm_quantile=hparam("norm_quantile", norm_quantile, 0.0, 1.0),
            norm_rate=hparam("norm_rate", norm_rate, 0.0, 100.0),
        ),
    )


def shrunk_mean(
    update: ClientUpdate, plain: tf.Tensor, log_factor: tf.Tensor
) -> OrderedDict[str, Structure]:
    """A client's part in `shrunk_reduction`: its plain log-weights, and the logarithm of the factor."""
    plain = tf.where(update.non_finite, tf.constant(-math.inf, tf.float64), plain)
    return OrderedDict(mean=LogWeighted(update.delta, plain + log_factor), plain=plain)


class ShrunkMean(NamedTuple):
    """A mean of shrunk updates: `sum_k w_k f_k d_k / sum_k w_k`.

    Attributes:
      tensors: The mean; zeros where nobody has weight.
      kept: `sum_k w_k f_k / sum_k w_k`, float64 of shape `[num_layers]`.
      has_weight: For each tensor, whether anybody has weight in its layer: a bool.
    """

    tensors: Tensors
    kept: tf.Tensor
    has_weight: Tensors


def shrunk_reduction(layers: ModelLayers) -> Reduction:
    """Reduces results of `shrunk_mean` to a `ShrunkMean`.

    The mean has the shrunk weights, and is multiplied at the end by the share that they keep, so that no
    client's tensors are written again.
    """
    none, size = [-math.inf] * len(layers.groups), len(layers.groups)
    both = zip_reductions(
        mean=mean_reduction(layers.specs, layers.groups),
        plain=Reduction(
            lambda: tf.constant(none, tf.float64),
            log_add,
            lambda logs: by_layer("plain", logs, size),
        ),
    )
    owner = {position: layer for layer, group in enumerate(layers.groups) for position in group}

    def report(total: Reduced) -> ShrunkMean:
        found = both.report(total)
        kept = share(found["mean"].log_weights, found["plain"])
        has_weight = tf.unstack(found["mean"].log_weights > -math.inf)
        factors = tf.unstack(kept)
        tensors = tuple(
            x * tf.cast(factors[owner[position]], x.dtype)
            for position, x in enumerate(found["mean"].tensors)
        )
        return ShrunkMean(tensors, kept, tuple(has_weight[owner[i]] for i in range(len(tensors))))

    return attrs.evolve(both, report=report)


def sums_reduction(shapes: Mapping[str, Sequence[int]]) -> Reduction:
    """Adds up float64 tensors of these shapes, by name, over clients."""
    return Reduction(
        lambda: OrderedDict((name, tf.zeros(shape, tf.float64)) for name, shape in shapes.items()),
        lambda a, b: OrderedDict((name, a[name] + b[name]) for name in shapes),
    )


@named_rule
def redescending_mean(
    *,
    cutoff: Number = 2.5,
    power: Number = 3.0,
    initial_norm: float | None = 1.0,
    norm_quantile: Number = 0.5,
    norm_rate: Number = 0.2,
) -> Rule:
    """The mean by clients' weights, with very long updates shrunk below the typical length.

    ```
    f_k    = min(1, cutoff C / |d_k|)^power
    update = sum_k n_k f_k d_k / sum_k n_k
    C     <- C exp(-norm_rate (share of clients with |d_k| <= C  -  norm_quantile))
    ```

    with `d_k` the update, `|d_k|` its norm over all tensors, `n_k` its weight, and `C` the typical
    norm, float64 in the state as `typical_norm`: a running quantile over clients that counted, each
    counting once. Shorter updates are averaged as they are. With the default power an update ten times
    too long counts for less than one of typical length. With any power above 1 no update counts for more
    than `cutoff C`, its client's share of examples aside. The rule needs the update alone, in one pass.

    The typical norm moves by a factor of at most `exp(norm_rate)` per round. If updates are much longer
    than `cutoff initial_norm`, the first rounds therefore learn almost nothing, which `typical_norm`,
    `score_mean` and `shrunk_clients` show. With `initial_norm=None` the first round finds the norm:

    ```
    C      = exp(mean of log |d_k| over clients with |d_k| > 0)
    update = m min(1, C / |m|),   m = sum_k n_k d_k / sum_k n_k
    ```

    No update is shrunk in that round. A client with a huge update therefore decides the direction of
    the first step, and makes `C` too large for a while (one of k clients, by the k-th root of the
    excess). If clients may be hostile, give a number.

    Measurements: norms as scores; weights after shrinking; `typical_norm` (float32, as used), and
    `shrunk_clients` (int32, clients with a factor below 1). All numbers but `initial_norm` are
    hyperparameters.

    Args:
      cutoff: Above 0: the number of typical norms above which an update is shrunk.
      power: From 0 to 1000. 0 is the plain mean; 1 clips to `cutoff C`; above 1 longer updates count for
        less.
      initial_norm: The typical norm before the first round, above 0; None to find it in that round.
      norm_quantile: The quantile of the clients' norms, from 0 to 1, that is the typical norm.
      norm_rate: How fast the typical norm moves, from 0 (never) to 100.

    Returns:
      A `Rule` for `RuleFactory`, `federated_rule` or `build_fed_avg`.

    Raises:
      ValueError: If a number is out of its range.

    Example:
      >>> redescending_mean(cutoff=2.0).needs.names
      ()

    Source: a redescending weight in the sense of robust statistics (Hampel, 1974) on the norm; the
    running quantile is that of Andrew, Thakkar, McMahan, Ramaswamy, Differentially Private Learning
    with Adaptive Clipping, 2021.
    """
    shrink = shrinking(cutoff, power, initial_norm, norm_quantile, norm_rate)

    def client(update: ClientUpdate, state: State) -> Part:
        norm = length(update.delta)
        factor, plain = shrink.log_factor(norm, state), tf.math.log(update.weight)
        found = weighted_mean.weigh(update, plain + factor, scores=norm)
        return OrderedDict(
            mean=shrunk_mean(update, plain, factor),
            statistics=found["statistics"],
            sums=shrink.counts(norm, update.weight > 0.0, state),
        )

    def server(state: State, reduced: Reduced) -> RuleResult:
        mean, sums = reduced["mean"], reduced["sums"]
        tensors, kept = shrink.shortened(mean.tensors, state, sums)
        result = weighted_mean.report(reduced, shares=(kept * mean.kept,))
        measured = OrderedDict(result.measurements, **shrink.measurements(state, sums))
        own = shrink.next_state(state, measured["clients"], sums)
        return RuleResult(own, tensors, measured, result.unchanged)

    return Rule(
        client,
        lambda layers: zip_reductions(
            mean=shrunk_reduction(layers),
            statistics=statistics_reduction(len(layers.groups), layers.sample_size),
            sums=sums_reduction(OrderedDict.fromkeys(LENGTHS, ())),
        ),
        server,
        needs=Needs(layers="model"),
        initial_state=lambda layers: shrink.initial_state(),
        hparams=shrink.hparams,
    )
