"""Sums over the batches of one client: losses by examples, gradients by steps and by examples."""

from typing import Any

import tensorflow as tf

from aggregators.client_memory import densify


def count(predictions: Any) -> tf.Tensor:
    """The examples in a batch, of a model's predictions or any structure of them."""
    return tf.shape(tf.nest.flatten(predictions)[0])[0]


def no_loss() -> tuple[tf.Tensor, tf.Tensor]:
    """The loss of no batch, and its examples."""
    return tf.constant(0.0), tf.constant(0, tf.int64)


def add_loss(sums: Any, loss: Any, examples: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Adds a batch's loss, whatever its shape, times its examples; and its examples."""
    total, seen = sums
    if loss is not None:
        loss = tf.cast(loss, tf.float32)
        if loss.shape.rank != 0:
            loss = tf.reduce_mean(loss)
        # A batch without examples has a mean that is no number, and no part in the sum.
        total += tf.math.multiply_no_nan(loss, tf.cast(examples, tf.float32))
    return total, seen + tf.cast(examples, tf.int64)


def mean_loss(sums: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
    """The mean loss per example; 0 of none."""
    return tf.math.divide_no_nan(sums[0], tf.cast(sums[1], tf.float32))


def no_gradients(weights: Any) -> tuple[tf.Tensor, ...]:
    """The gradients of no step."""
    return tuple(tf.zeros(w.shape, w.dtype) for w in weights)


def add_gradients(total: Any, gradients: Any, weights: Any) -> Any:
    """Adds a step's gradients, where they are summed at all."""
    if not total:
        return total
    dense = densify(gradients, weights)
    return tuple(old + new for old, new in zip(total, dense, strict=True))


def mean_gradient(total: Any, steps: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The mean gradient per step."""
    return tuple(tf.math.divide_no_nan(x, tf.cast(steps, x.dtype)) for x in total)


def no_slope(weights: Any) -> Any:
    """The gradient of the loss over no examples, and their number."""
    return no_gradients(weights), tf.constant(0, tf.int64)


def add_slope(sums: Any, gradients: Any, weights: Any, examples: tf.Tensor) -> Any:
    """Adds a batch's gradient times its examples, and its examples."""
    total, seen = sums
    dense = densify(gradients, weights)
    weighted = tuple(
        old + tf.math.multiply_no_nan(g, tf.cast(examples, g.dtype))
        for old, g in zip(total, dense, strict=True)
    )
    return weighted, seen + tf.cast(examples, tf.int64)


def mean_slope(sums: Any) -> tuple[tf.Tensor, ...]:
    """The gradient of the mean loss per example."""
    return tuple(tf.math.divide_no_nan(x, tf.cast(sums[1], x.dtype)) for x in sums[0])
