"""How a client's scores become its weight: as logarithms, so that nothing under- or overflows.

A `Weighting` is made by `softmax`, `power` or `uniform` and given to anything in this package that
weighs clients. For client `k` and layer `l`

```
log w[k, l] = clip(rule(d[k, l] / scale[l]) - rule(typical[l] / scale[l])) + log n[k]
```

with `d` the score, `typical` the mean score of earlier rounds, `n` the number of examples (or the
weight that the client work gave), and `rule` the function that distinguishes the three. Only
differences of log-weights between clients matter, so the typical client's is taken as 0: that
keeps numbers small, as a weight that a client sends has to be. Until a typical score is known (the
first round), nothing is subtracted.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import attrs
import tensorflow as tf

Rule = Callable[[tf.Tensor], tf.Tensor]

# Weights e^1000 apart are as good as any further, and float64 adds numbers of this size to ten
# digits. Much larger ones would swallow the logarithm of 2 that adding an equal weight makes.
_LARGEST_LOG = 1e6

# Sharper rules would take the clients of one round past that, where all are alike again.
_LEAST_TEMPERATURE = 1e-4
_LARGEST_EXPONENT = 1e3
_LEAST_SCALE, _LARGEST_SCALE = 1e-12, 1e12

# How much larger than the typical score a round's mean may seem when it is remembered.
_LARGEST_GROWTH = 10.0


@attrs.frozen
class SoftmaxRule:
    """log-weight = -r / temperature for `prefer="near"`, +r / temperature for `"far"`."""

    temperature: float
    prefer: Literal["near", "far"]

    def __call__(self, relative: tf.Tensor) -> tf.Tensor:
        """Maps relative scores to log-weights."""
        sign = -1.0 if self.prefer == "near" else 1.0
        return (sign / self.temperature) * relative


@attrs.frozen
class PowerRule:
    """log-weight = exponent * log(max(r, floor))."""

    exponent: float
    floor: float

    def __call__(self, relative: tf.Tensor) -> tf.Tensor:
        """Maps relative scores to log-weights."""
        return self.exponent * tf.math.log(tf.maximum(relative, self.floor))


@attrs.frozen
class UniformRule:
    """log-weight = 0, whatever the score."""

    def __call__(self, relative: tf.Tensor) -> tf.Tensor:
        """Maps relative scores to log-weights."""
        return tf.zeros_like(relative)


def _check_rule(instance: Any, attribute: Any, value: Any) -> None:
    del instance, attribute  # attrs passes them to every validator
    if not callable(value):
        raise TypeError(
            f"`rule` must be a function from relative scores to log-weights; found {value!r}. "
            "Use `weighting.softmax()`, `weighting.power()` or `weighting.uniform()`."
        )


def _check_scale(instance: Any, attribute: Any, value: Any) -> None:
    del instance, attribute
    if value is None or value == "running":
        return
    if not (_is_number(value) and _LEAST_SCALE <= value <= _LARGEST_SCALE):
        raise ValueError(
            f'`scale` must be None, "running" or a number from {_LEAST_SCALE:g} to '
            f"{_LARGEST_SCALE:g}; found {value!r}. None uses scores as they are."
        )


def _check_bound(instance: Any, attribute: Any, value: Any) -> None:
    del instance, attribute
    if value is not None and not (_is_number(value) and 1 <= value < math.inf):
        raise ValueError(
            "`bound` must be None or a finite number of at least 1, the largest ratio between "
            f"two clients' weights; found {value!r}."
        )


def _check_memory(instance: Any, attribute: Any, value: Any) -> None:
    del instance, attribute
    if not (_is_number(value) and 0 <= value < 1):
        raise ValueError(
            "`memory` must be at least 0 and below 1, the share of the earlier rounds in the "
            f"running mean score; found {value!r}."
        )


def _check_flag(instance: Any, attribute: Any, value: Any) -> None:
    del instance
    if not isinstance(value, bool):
        raise TypeError(f"`{attribute.name}` must be True or False; found {value!r}.")


@attrs.frozen
class Weighting:
    """A rule and what surrounds it; see `softmax` for the meaning of every field.

    Build your own with `Weighting(rule=f, ...)`, `f` mapping a float64 tensor of relative scores
    to log-weights, element by element.
    """

    rule: Rule = attrs.field(validator=_check_rule)
    scale: float | Literal["running"] | None = attrs.field(
        default="running", validator=_check_scale
    )
    times_examples: bool = attrs.field(default=True, validator=_check_flag)
    bound: float | None = attrs.field(default=None, validator=_check_bound)
    memory: float = attrs.field(default=0.5, validator=_check_memory)

    @property
    def needs_typical_score(self) -> bool:
        """Whether the weights depend on what scores earlier rounds saw."""
        return self.scale == "running" or self.bound is not None


def softmax(
    temperature: float = 1.0,
    *,
    prefer: Literal["near", "far"] = "near",
    scale: float | Literal["running"] | None = "running",
    times_examples: bool = True,
    bound: float | None = None,
    memory: float = 0.5,
) -> Weighting:
    """Weighs clients by a softmax over their scores.

    ```
    w[k] = n[k] exp(-d[k] / (T s)) / sum_j n[j] exp(-d[j] / (T s))
    ```

    with `d` the score, `T` the temperature, `s` the scale and `n` the number of examples; the sign
    is + for `prefer="far"`.

    Args:
      temperature: At least 1e-4. Small: the best client takes all. Large: all are alike.
      prefer: `"near"` gives more weight to clients near the server's model, which guards against
        bad clients and hurts when good clients differ much; `"far"` the reverse.
      scale: What scores are divided by. Divergences of trained models are about 1e-6 to 1e-4, so
        a softmax of the raw values is uniform to three digits. `"running"` divides by the mean
        score of earlier rounds, which makes a typical relative score 1; until one is known (the
        first round) all scores count alike. A number (1e-12 to 1e12) is used as it is; None means
        1. So that one client cannot switch the rule off for many rounds with a huge score, a round's
        mean counts as at most 10 times the running one. The first round has no such guard.
      times_examples: Whether weights are multiplied by the client's own weight (its number of
        examples). If not, that weight only tells whether the client counts: 0 means no.
      bound: The largest ratio between two clients' weights, number of examples aside. Log-weights
        are clipped to `log(bound) / 2` around that of the typical score. Until that score is known
        all scores count alike.
      memory: Share of the earlier rounds in the running mean score, in [0, 1). With 0, only the
        round before counts.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If a number is out of its range or `prefer` is neither word.
      TypeError: If `times_examples` is not a bool.

    Example:
      >>> softmax(0.5, prefer="far").rule
      SoftmaxRule(temperature=0.5, prefer='far')
    """
    if not (_is_number(temperature) and _LEAST_TEMPERATURE <= temperature < math.inf):
        raise ValueError(
            f"`temperature` must be a finite number of at least {_LEAST_TEMPERATURE:g}; "
            f"found {temperature!r}. For equal weights use `weighting.uniform()`."
        )
    if prefer not in ("near", "far"):
        raise ValueError(f'`prefer` must be "near" or "far"; found {prefer!r}.')
    return Weighting(
        SoftmaxRule(float(temperature), prefer),
        scale=scale,
        times_examples=times_examples,
        bound=bound,
        memory=memory,
    )


def power(
    exponent: float = -1.0,
    *,
    floor: float = 1e-3,
    scale: float | Literal["running"] | None = "running",
    times_examples: bool = True,
    bound: float | None = None,
    memory: float = 0.5,
) -> Weighting:
    """Weighs clients by a power of their score.

    ```
    w[k] = n[k] max(d[k] / s, floor)^exponent, normalised over clients
    ```

    The scale `s` cancels out, except in `floor` and `bound`.

    Args:
      exponent: From -1000 to 1000. -1 gives inverse weights (near counts more), positive values the
        reverse.
      floor: Above 0. A relative score below it counts as it, or a client that hardly moved would
        take all the weight of a negative power.
      scale: As in `softmax`.
      times_examples: As in `softmax`.
      bound: As in `softmax`.
      memory: As in `softmax`.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If a number is out of its range.
      TypeError: If `times_examples` is not a bool.

    Example:
      >>> power(-0.5).rule
      PowerRule(exponent=-0.5, floor=0.001)
    """
    if not (_is_number(exponent) and abs(exponent) <= _LARGEST_EXPONENT):
        raise ValueError(
            f"`exponent` must be a number from {-_LARGEST_EXPONENT:g} to {_LARGEST_EXPONENT:g}; "
            f"found {exponent!r}."
        )
    if not (_is_number(floor) and 0 < floor < math.inf):
        raise ValueError(f"`floor` must be a finite number above 0; found {floor!r}.")
    return Weighting(
        PowerRule(float(exponent), float(floor)),
        scale=scale,
        times_examples=times_examples,
        bound=bound,
        memory=memory,
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
    return Weighting(UniformRule(), scale=None, times_examples=times_examples)


def log_weights(
    weighting: Weighting, scores: tf.Tensor, weight: tf.Tensor, typical_score: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """One client's log-weight per layer, and whether there is nothing wrong with it.

    Args:
      weighting: The rule.
      scores: The client's scores, floating of shape `[num_layers]`.
      weight: The client's own weight (number of examples), a number.
      typical_score: Mean score of earlier rounds, shape `[num_layers]`; 0 where not known.

    Returns:
      The log-weights, float64 of shape `[num_layers]`, where a typical client with weight 1 has 0:
      -inf in all places for a client that must not count. And a bool, False if that is because
      its weight or a score is NaN or infinite, or the rule gives NaN for a score; if the
      weight is 0 or negative, nothing is wrong.
    """
    scores, weight = tf.cast(scores, tf.float64), tf.cast(weight, tf.float64)
    typical = tf.cast(typical_score, tf.float64)
    known, has_weight = typical > 0.0, weight > 0.0
    scale = relative_scale(weighting, typical)
    logs = weighting.rule(tf.math.divide_no_nan(scores, scale))
    centre = weighting.rule(tf.math.divide_no_nan(typical, scale))
    logs -= tf.where(known & tf.math.is_finite(centre), centre, 0.0)
    if weighting.bound is not None:
        half = 0.5 * math.log(weighting.bound)
        logs = tf.clip_by_value(logs, -half, half)
    if weighting.needs_typical_score:
        logs = tf.where(known, logs, 0.0)
    # A rule of the user's own may have no number for a score; such a client must not count.
    no_number = has_weight & tf.reduce_any(tf.math.is_nan(logs))
    sound = all_finite(scores) & tf.math.is_finite(weight) & ~no_number
    logs = tf.clip_by_value(logs, -_LARGEST_LOG, _LARGEST_LOG)
    if weighting.times_examples:
        logs += tf.math.log(weight)
    return tf.where(sound & has_weight, logs, -math.inf), sound


def relative_scale(weighting: Weighting, typical_score: tf.Tensor) -> tf.Tensor:
    """What scores are divided by, shape `[num_layers]`; 0 while all scores count alike."""
    if weighting.scale == "running":
        return typical_score
    fixed = 1.0 if weighting.scale is None else float(weighting.scale)
    scale = tf.constant(fixed, typical_score.dtype, typical_score.shape)
    return tf.where(typical_score > 0, scale, 0.0) if weighting.needs_typical_score else scale


def next_typical_score(
    weighting: Weighting, typical_score: tf.Tensor, mean_score: tf.Tensor
) -> tf.Tensor:
    """The running mean score after a round.

    Args:
      weighting: The rule.
      typical_score: The running mean before, 0 where not known.
      mean_score: This round's mean over the clients that counted; NaN if there was none.

    Returns:
      `memory * typical + (1 - memory) * min(mean, 10 * typical)`; the mean where nothing was known;
      unchanged where there is no mean.
    """
    mean_score = tf.cast(mean_score, typical_score.dtype)
    limited = tf.minimum(mean_score, _LARGEST_GROWTH * typical_score)
    moved = weighting.memory * typical_score + (1.0 - weighting.memory) * limited
    moved = tf.where(typical_score > 0, moved, mean_score)
    return tf.where(tf.math.is_finite(mean_score), moved, typical_score)


def all_finite(scores: tf.Tensor) -> tf.Tensor:
    """Whether no score is NaN or infinite: one bool."""
    return tf.reduce_all(tf.math.is_finite(scores))


def check_weighting(weighting: Any) -> None:
    """Raises `TypeError` for anything that is not a `Weighting`."""
    if not isinstance(weighting, Weighting):
        raise TypeError(
            f"`weighting` must be a `Weighting`; found {weighting!r}. "
            "Call `weighting.softmax()`, `weighting.power()` or `weighting.uniform()`."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
