"""Weightings turn a client's scores into its weight, as logarithms, so that nothing over- or underflows.

`softmax`, `power` and `uniform` make a `Weighting`, which anything in this package that weighs clients
takes. For client `k` and layer `l`

```
log w[k, l] = clip(rule(d[k, l] / scale[l]) - rule(typical[l] / scale[l])) + log n[k]
```

with `d` the score, `typical` the mean score of earlier rounds, `n` the number of examples (or the
weight that the client work gave), and `rule` the function that distinguishes the three. Only
differences of log-weights between clients matter, so a typical client gets a log-weight of 0. This
keeps the weights that clients send small. Nothing is subtracted in the first round, when no typical
score is known, nor for your own rule if it uses the loss.

The numbers of a weighting (temperature, exponent, bound, ...) are hyperparameters. They are part of the
state of the rule that uses it, and may change between rounds.
"""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import attrs
import tensorflow as tf

from aggregators.core import checks
from aggregators.core.hyperparameters import Hparam, Number, hparam
from aggregators.core.types import State

__all__ = ["Seen", "Weighting", "power", "softmax", "uniform"]

# Weights e^1000 apart are far enough, and float64 adds numbers of this size to ten digits. Much larger
# ones would swallow the log 2 that a second client of equal weight adds.
_LARGEST_LOG = 1e6

# Sharper rules would take all clients of a round past that limit, where all are alike again.
_LEAST_TEMPERATURE = 1e-4
_LARGEST_EXPONENT = 1e3
_LEAST_SCALE, _LARGEST_SCALE = 1e-12, 1e12

# The limit of a round's mean over the typical score in the running mean.
_LARGEST_GROWTH = 10.0


class Seen(NamedTuple):
    """Inputs of a weighting's rule besides relative scores.

    Attributes:
      hparams: The weighting's hyperparameters by name, float64 scalars.
      layer: int32 of shape `[num_layers]`: the layers' positions.
      round: int32 scalar: the number of earlier rounds.
      loss: float64 scalar: the client's mean loss; None unless `loss_at` says where it is taken.

    Example:
      >>> def of_depth(relative, seen):
      ...     return -relative * tf.cast(1 + seen.layer, relative.dtype)
      >>> Weighting(of_depth).times_examples
      True
    """

    hparams: Mapping[str, tf.Tensor]
    layer: tf.Tensor
    round: tf.Tensor
    loss: tf.Tensor | None = None


Rule = Callable[..., tf.Tensor]


def _softmax_near(relative: tf.Tensor, seen: Seen) -> tf.Tensor:
    return -relative / seen.hparams["temperature"]


def _softmax_far(relative: tf.Tensor, seen: Seen) -> tf.Tensor:
    return relative / seen.hparams["temperature"]


def _power(relative: tf.Tensor, seen: Seen) -> tf.Tensor:
    return seen.hparams["exponent"] * tf.math.log(tf.maximum(relative, seen.hparams["floor"]))


def _uniform(relative: tf.Tensor) -> tf.Tensor:
    return tf.zeros_like(relative)


_BUILT_IN = (_softmax_near, _softmax_far, _power, _uniform)


_WRITE = (
    "Use `weighting.softmax()`, `power()` or `uniform()`, or write `def rule(relative)` or `def "
    "rule(relative, seen)`, with TensorFlow operations on float64 tensors, element by element."
)


def _check_rule(argument: str, value: object) -> None:
    checks.function(argument, value, "(relative, seen)" if looks(value) else "(relative)", _WRITE)


def looks(rule: object) -> bool:
    """Whether a rule takes `seen`."""
    try:
        return callable(rule) and "seen" in inspect.signature(rule).parameters
    except ValueError:  # a builtin without a signature
        return False


_SCALE_HINT = 'Or "running", for the running mean score; None for scores as they are.'
_BOUND_HINT = "It is the largest ratio between two clients' weights; None for no limit."
_DECAY_HINT = "It is the share of the earlier rounds."


def _scale(value: object) -> Hparam | Literal["running"] | None:
    if value is None:
        return None
    if isinstance(value, str) and value == "running":
        return "running"
    return hparam("scale", value, _LEAST_SCALE, _LARGEST_SCALE, hint=_SCALE_HINT)


def _bound(value: object) -> Hparam | None:
    return value if value is None else hparam("bound", value, 1.0, hint=_BOUND_HINT)


def _decay(value: object) -> Hparam:
    if isinstance(value, Hparam):
        return value
    return hparam("decay", value, 0.0, 1.0, below=True, hint=_DECAY_HINT)


def _own(hparams: Mapping[str, object]) -> Mapping[str, Hparam]:
    taken = ("scale", "bound", "decay", "round", "typical_score")
    if not isinstance(hparams, Mapping) or not all(
        isinstance(name, str) and name not in taken for name in hparams
    ):
        raise ValueError(
            f"`hparams` must map names, which must not be any of {', '.join(taken)}, to numbers; "
            f"found {hparams!r}."
        )
    return OrderedDict(
        (name, value if isinstance(value, Hparam) else hparam(name, value))
        for name, value in hparams.items()
    )


@attrs.frozen
class Weighting:
    """A rule from relative scores to log-weights, and its settings; `softmax` explains the fields.

    Build your own with `Weighting(rule=f, ...)`: `f(relative)` or `f(relative, seen)` maps a float64
    tensor of relative scores, one per layer, to float64 log-weights of that shape. `seen` is a
    `Seen`: layers, round, the client's loss, and the numbers that you give as `hparams`.

    Example:
      >>> def later(relative, seen):
      ...     return -seen.hparams["sharpness"] * tf.cast(seen.round, tf.float64) * relative
      >>> list(Weighting(later, hparams={"sharpness": 0.1}).all_hparams)
      ['sharpness', 'decay']
    """

    rule: Rule = attrs.field(
        validator=checks.validated(_check_rule),
        repr=lambda rule: getattr(rule, "__name__", repr(rule)),
    )
    scale: Hparam | Literal["running"] | None = attrs.field(default="running", converter=_scale)
    times_examples: bool = attrs.field(default=True, validator=checks.validated(checks.flag))
    bound: Hparam | None = attrs.field(default=None, converter=_bound)
    decay: Hparam = attrs.field(default=_decay(0.5), converter=_decay)
    hparams: Mapping[str, Hparam] = attrs.field(factory=dict, converter=_own)

    @property
    def is_own(self) -> bool:
        """Whether the rule is the user's own, and may use all of `seen`."""
        return self.rule not in _BUILT_IN and looks(self.rule)

    @property
    def is_uniform(self) -> bool:
        """Whether scores change nothing."""
        return self.rule is _uniform

    @property
    def needs_typical_score(self) -> bool:
        """Whether the weights depend on the scores of earlier rounds."""
        return self.scale == "running" or self.bound is not None

    @property
    def all_hparams(self) -> OrderedDict[str, Hparam]:
        """The numbers that may change between rounds, by name."""
        around = OrderedDict(scale=self.scale, bound=self.bound, decay=self.decay)
        if not self.needs_typical_score:
            del around["decay"]  # it would change a measurement alone
        return OrderedDict(
            [*self.hparams.items(), *((n, x) for n, x in around.items() if isinstance(x, Hparam))]
        )


def softmax(
    temperature: Number = 1.0,
    *,
    prefer: Literal["near", "far"] = "near",
    scale: Number | Literal["running"] | None = "running",
    times_examples: bool = True,
    bound: Number | None = None,
    decay: Number = 0.5,
) -> Weighting:
    """Weighs clients by a softmax over their scores.

    ```
    w[k] = n[k] exp(-d[k] / (T s)) / sum_j n[j] exp(-d[j] / (T s))
    ```

    with `d` the score, `T` the temperature, `s` the scale and `n` the number of examples; the sign
    is + for `prefer="far"`. Every number may be a Keras schedule over rounds.

    Args:
      temperature: At least 1e-4. Small: the best client takes all. Large: all are alike.
      prefer: `"near"` gives more weight to clients near the server's model, which guards against
        bad clients and hurts when good clients differ much; `"far"` the reverse.
      scale: The divisor of the scores. Divergences of trained models are about 1e-6 to 1e-4, so a
        softmax of the raw values is uniform to three digits. `"running"` divides by the mean score of
        earlier rounds, which makes a typical relative score 1. In the first round, when no mean is
        known, all scores count alike. A number (1e-12 to 1e12) is used as it is; None means 1. A
        round's mean counts as at most 10 times the running one, or one client with a huge score could
        switch the rule off for many rounds. The first round has no such limit.
      times_examples: Whether weights are multiplied by the client's own weight (its number of
        examples). If not, that weight only decides whether the client counts: 0 means no.
      bound: The largest ratio between two clients' weights, number of examples aside. Log-weights
        are clipped to `log(bound) / 2` around that of the typical score. Until that score is known,
        all scores count alike.
      decay: Share of the earlier rounds in the running mean score, in [0, 1). With 0, only the last
        round counts.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If a number is out of its range or `prefer` is neither word.
      TypeError: If `times_examples` is not a bool.

    Example:
      >>> {name: number.value for name, number in softmax(0.5, bound=20.0).all_hparams.items()}
      {'temperature': 0.5, 'bound': 20.0, 'decay': 0.5}
    """
    checks.word("prefer", prefer, "near", "far")
    hint = "For equal weights use `weighting.uniform()`."
    return Weighting(
        _softmax_near if prefer == "near" else _softmax_far,
        scale=scale,
        times_examples=times_examples,
        bound=bound,
        decay=decay,
        hparams={"temperature": hparam("temperature", temperature, _LEAST_TEMPERATURE, hint=hint)},
    )


def power(
    exponent: Number = -1.0,
    *,
    floor: Number = 1e-3,
    scale: Number | Literal["running"] | None = "running",
    times_examples: bool = True,
    bound: Number | None = None,
    decay: Number = 0.5,
) -> Weighting:
    """Weighs clients by a power of their score.

    ```
    w[k] = n[k] max(d[k] / s, floor)^exponent, normalised over clients
    ```

    The scale `s` cancels out, except in `floor` and `bound`.

    Args:
      exponent: From -1000 to 1000. -1 gives inverse weights (near counts more), positive values the
        reverse.
      floor: Above 0. Relative scores are raised to it; otherwise a client that hardly moved would take
        all the weight of a negative power.
      scale: As in `softmax`.
      times_examples: As in `softmax`.
      bound: As in `softmax`.
      decay: As in `softmax`.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If a number is out of its range.
      TypeError: If `times_examples` is not a bool.

    Example:
      >>> {name: number.value for name, number in power(-0.5, scale=None).all_hparams.items()}
      {'exponent': -0.5, 'floor': 0.001}
    """
    return Weighting(
        _power,
        scale=scale,
        times_examples=times_examples,
        bound=bound,
        decay=decay,
        hparams=OrderedDict(
            exponent=hparam("exponent", exponent, -_LARGEST_EXPONENT, _LARGEST_EXPONENT),
            floor=hparam("floor", floor, 0.0, above=True),
        ),
    )


def uniform(*, times_examples: bool = True) -> Weighting:
    """Ignores scores: the plain mean, by examples or not.

    `w[k] = n[k] / sum_j n[j]`, or `1 / (number of clients)`. Scores are still measured.

    Args:
      times_examples: Whether weights are the client's own weight (its number of examples).

    Returns:
      A `Weighting`.

    Raises:
      TypeError: If `times_examples` is not a bool.

    Example:
      >>> uniform().scale is None
      True
    """
    return Weighting(_uniform, scale=None, times_examples=times_examples)


def log_weights(
    weighting: Weighting,
    scores: tf.Tensor,
    weight: tf.Tensor,
    state: State,
    loss: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """One client's log-weight per layer, and whether its scores are valid.

    Args:
      weighting: The rule.
      scores: The client's scores, floating of shape `[num_layers]`.
      weight: The client's own weight (number of examples), a finite number of at least 0.
      state: `typical_score`, the mean score of earlier rounds, shape `[num_layers]`, 0 where
        unknown; `round`; and the weighting's hyperparameters.
      loss: The client's loss, for a rule that uses it.

    Returns:
      The log-weights, float64 of shape `[num_layers]`: 0 for a typical client with weight 1, -inf for
      all layers of a client that must not count. And a bool, False if a score is not a finite number
      of at least 0, or the rule gives NaN for it. A client of weight 0 has valid scores.

    Raises:
      TypeError: If the rule fails, or returns another shape or dtype than its argument's.
    """
    scores, weight = tf.cast(scores, tf.float64), tf.cast(weight, tf.float64)
    typical = tf.cast(state["typical_score"], tf.float64)
    known, has_weight = typical > 0.0, weight > 0.0
    scale = relative_scale(weighting, state)
    seen = Seen(
        hparams={name: tf.cast(state[name], tf.float64) for name in weighting.all_hparams},
        layer=tf.range(scores.shape[0]),
        round=state["round"],
        loss=None if loss is None else tf.cast(loss, tf.float64),
    )
    logs = _apply(weighting.rule, tf.math.divide_no_nan(scores, scale), seen)
    if seen.loss is None or not weighting.is_own:  # else a typical client has no typical loss
        centre = _apply(weighting.rule, tf.math.divide_no_nan(typical, scale), seen)
        logs -= tf.where(known & tf.math.is_finite(centre), centre, 0.0)
    if weighting.bound is not None:
        half = 0.5 * tf.math.log(seen.hparams["bound"])
        logs = tf.clip_by_value(logs, -half, half)
    if weighting.needs_typical_score:
        logs = tf.where(known, logs, 0.0)
    is_number = tf.math.is_finite(scores) & (scores >= 0.0) & ~tf.math.is_nan(logs)
    is_valid = tf.reduce_all(is_number) | ~has_weight
    limited = tf.clip_by_value(logs, -_LARGEST_LOG, _LARGEST_LOG)
    logs = tf.where(tf.equal(logs, -math.inf), logs, limited)  # a weight of 0 stays 0
    if weighting.times_examples:
        logs += tf.math.log(weight)
    return tf.where(is_valid & has_weight, logs, -math.inf), is_valid


def _apply(rule: Rule, relative: tf.Tensor, seen: Seen) -> tf.Tensor:
    """Calls a rule and checks what it returns."""
    given = (relative, seen) if looks(rule) else (relative,)
    found = checks.called(
        "`rule` must map relative scores to log-weights",
        lambda: tf.convert_to_tensor(rule(*given)),
        found=f"{rule!r}, which failed on float64{list(relative.shape)}",
        advice=_WRITE,
    )
    if found.dtype != relative.dtype or found.shape != relative.shape:
        raise TypeError(
            f"`rule` must return float64 of the shape it is given, {list(relative.shape)}; found "
            f"{found.dtype.name} of shape {found.shape} from {rule!r}. {_WRITE}"
        )
    return found


def relative_scale(weighting: Weighting, state: State) -> tf.Tensor:
    """The divisor of the scores, float64 `[num_layers]`; 0 while all scores count alike."""
    typical = tf.cast(state["typical_score"], tf.float64)
    if weighting.scale == "running":
        return typical
    fixed = 1.0 if weighting.scale is None else tf.cast(state["scale"], tf.float64)
    scale = tf.ones_like(typical) * fixed
    return tf.where(typical > 0, scale, 0.0) if weighting.needs_typical_score else scale


def next_typical_score(weighting: Weighting, state: State, mean_score: tf.Tensor) -> tf.Tensor:
    """The running mean score after a round.

    Args:
      weighting: The rule.
      state: As for `log_weights`.
      mean_score: This round's mean over the clients that counted; NaN if none did.

    Returns:
      `decay * typical + (1 - decay) * min(mean, 10 * typical)`. The mean itself where no typical score
      was known; the old score where there is no mean.
    """
    typical = state["typical_score"]
    decay = (
        state["decay"] if "decay" in weighting.all_hparams else weighting.decay.at(state["round"])
    )
    decay = tf.cast(decay, typical.dtype)
    mean_score = tf.cast(mean_score, typical.dtype)
    limited = tf.minimum(mean_score, _LARGEST_GROWTH * typical)
    moved = decay * typical + (1.0 - decay) * limited
    moved = tf.where(typical > 0, moved, mean_score)
    return tf.where(tf.math.is_finite(mean_score), moved, typical)


def check_weighting(weighting: object) -> None:
    """Raises `TypeError` for anything that is not a `Weighting`."""
    if not isinstance(weighting, Weighting):
        advice = "Call `weighting.softmax()`, `weighting.power()` or `weighting.uniform()`."
        if callable(weighting):
            advice = "Wrap your own function: `Weighting(rule=f)`."
        raise TypeError(f"`weighting` must be a `Weighting`; found {weighting!r}. {advice}")
