"""The weighted mean over clients as one associative pass, with weights given as logarithms.

The accumulator is the mean itself, `M`, and the logarithm of the weight behind it, `L`:

```
L' = log(exp(L_a) + exp(L_b))
M' = M_a + (M_b - M_a) exp(L_b - L')
```

The factor lies in [0, 1], so neither weights nor sums of values over- or underflow. The accumulator of
a single client is its value and its log-weight. A log-weight of -inf (weight 0) removes the value
altogether, even a NaN.
"""

import math
from typing import NamedTuple

import tensorflow as tf

from aggregators.core.layers import Groups
from aggregators.core.reduction import Reduction
from aggregators.core.types import Specs, Tensors

# Below any logarithm of a weight, and finite, since -inf minus -inf is NaN.
_LOWEST = -1e300


class LogWeighted(NamedTuple):
    """Tensors with log-weights, as a client sends them and as they accumulate.

    Attributes:
      tensors: Tuple of floating tensors.
      log_weights: float64 of shape `[num_layers]`, or one number for all layers; -inf stands for
        weight 0.
    """

    tensors: Tensors
    log_weights: tf.Tensor


def mean_reduction(specs: Specs, groups: Groups) -> Reduction:
    """The weighted mean per layer, over values of type `LogWeighted`.

    Args:
      specs: Shapes (fully defined) and dtypes (floating) of the tensors. Half precision
        accumulates in float32.
      groups: The tensors that share a log-weight, from `resolve_layers`.

    Returns:
      A `Reduction` that reports `LogWeighted`: the means in the dtypes of `specs`, and the
      logarithms of the summed weights. If all weights are 0, these are zeros and -inf.

    Raises:
      TypeError: If a shape or a dtype is not of this kind.

    Source: the running log-sum-exp of Milakov and Gimelshein, Online normalizer calculation for
    softmax, 2018, applied to means, which so stay normalised.
    """
    for position, spec in enumerate(specs):
        if not spec.dtype.is_floating or not spec.shape.is_fully_defined():
            raise TypeError(
                "A mean must have floating tensors of known shape; found "
                f"{spec.dtype.name} of shape {spec.shape} at position {position}. "
                "Cast it, or leave it out of the update."
            )
    owner = {position: layer for layer, group in enumerate(groups) for position in group}
    wide = [tf.float32 if spec.dtype.size < 4 else spec.dtype for spec in specs]

    def zero() -> LogWeighted:
        return LogWeighted(
            tuple(tf.zeros(spec.shape, dtype) for spec, dtype in zip(specs, wide, strict=True)),
            tf.fill([len(groups)], tf.constant(-math.inf, tf.float64)),
        )

    def lift(value: LogWeighted) -> LogWeighted:
        tensors = (tf.cast(x, dtype) for x, dtype in zip(value.tensors, wide, strict=True))
        return LogWeighted(tuple(tensors), by_layer("log_weight", value.log_weights, len(groups)))

    def merge(a: LogWeighted, b: LogWeighted) -> LogWeighted:
        total = log_add(a.log_weights, b.log_weights)
        of_b = share(b.log_weights, total)
        by_dtype = {dtype: tf.unstack(tf.cast(of_b, dtype)) for dtype in dict.fromkeys(wide)}
        tensors = []
        for position, (x, y) in enumerate(zip(a.tensors, b.tensors, strict=True)):
            of_y = by_dtype[wide[position]][owner[position]]
            # Here 0 times NaN is 0, so a client of weight 0 leaves no trace.
            tensors.append(x + tf.math.multiply_no_nan(y - x, of_y))
        return LogWeighted(tuple(tensors), total)

    def report(total: LogWeighted) -> LogWeighted:
        tensors = (tf.cast(x, s.dtype) for x, s in zip(total.tensors, specs, strict=True))
        return LogWeighted(tuple(tensors), total.log_weights)

    return Reduction(zero, merge, lift, report)


def by_layer(argument: str, values: tf.Tensor, num_layers: int) -> tf.Tensor:
    """One number for all layers, or one for each, as a tensor of shape `[num_layers]`."""
    if values.shape == []:
        return tf.fill([num_layers], values)
    if values.shape != [num_layers]:
        raise ValueError(
            f"`{argument}` must be one number, or one for each of the model's layers, {num_layers}; "
            f"found a tensor of shape {values.shape}. `needs` says what a layer is."
        )
    return values


def log_add(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """`log(exp(a) + exp(b))` by element, float64; -inf where both are."""
    largest = tf.maximum(a, b)
    # softplus(x) is log(1 + exp(x)).
    return largest + tf.math.softplus(tf.minimum(a, b) - tf.maximum(largest, _LOWEST))


def share(log_part: tf.Tensor, log_total: tf.Tensor) -> tf.Tensor:
    """`exp(part - total)`, float64 of `[..., num_layers]` and `[num_layers]`; 0 where both are -inf."""
    return tf.exp(log_part - tf.maximum(log_total, _LOWEST))
