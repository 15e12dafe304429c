"""Means of losses or gradients over one client's batches, by examples or by steps."""

from typing import TypeAlias

import tensorflow as tf

from aggregators.core.types import Structure

# A sum, and its count.
Sums: TypeAlias = tuple[Structure, tf.Tensor]

SCALAR = tf.TensorSpec([], tf.float32)


def loss_of_batch(loss: tf.Tensor) -> tf.Tensor:
    """A batch's loss of any shape as one float32."""
    loss = tf.cast(loss, tf.float32)
    return loss if loss.shape.rank == 0 else tf.reduce_mean(loss)


def no_sum(like: Structure) -> Sums:
    """The empty sum, with these shapes and dtypes, and its count."""
    return tf.nest.map_structure(lambda x: tf.zeros(x.shape, x.dtype), like), tf.constant(
        0, tf.int64
    )


def add_step(sums: Sums, values: Structure) -> Sums:
    """Adds the values of one step."""
    total, count = sums
    return tf.nest.map_structure(tf.add, total, values), count + 1


def add_batch(sums: Sums, means: Structure, examples: tf.Tensor) -> Sums:
    """Adds a batch's means, times its examples."""
    # The mean of a batch without examples is NaN, and must not enter the sum.
    weighted = tf.nest.map_structure(
        lambda x: tf.math.multiply_no_nan(x, tf.cast(examples, x.dtype)), means
    )
    total, count = sums
    return tf.nest.map_structure(tf.add, total, weighted), count + tf.cast(examples, tf.int64)


def mean(sums: Sums) -> Structure:
    """The sum divided by its count; zeros for an empty sum."""
    total, count = sums
    return tf.nest.map_structure(lambda x: tf.math.divide_no_nan(x, tf.cast(count, x.dtype)), total)
