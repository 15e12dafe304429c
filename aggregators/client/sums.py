"""Means over the batches of one client: by examples or by steps, of a loss or of gradients."""

from typing import TypeAlias

import tensorflow as tf

from aggregators.core.types import Structure

# What was added up, and its count.
Sums: TypeAlias = tuple[Structure, tf.Tensor]

SCALAR = tf.TensorSpec([], tf.float32)


def loss_of_batch(loss: tf.Tensor) -> tf.Tensor:
    """A batch's loss, whatever its shape, as one float32."""
    loss = tf.cast(loss, tf.float32)
    return loss if loss.shape.rank == 0 else tf.reduce_mean(loss)


def no_sum(like: Structure) -> Sums:
    """The sum over nothing, of a structure of these shapes and dtypes; and its count."""
    return tf.nest.map_structure(lambda x: tf.zeros(x.shape, x.dtype), like), tf.constant(
        0, tf.int64
    )


def add_step(sums: Sums, values: Structure) -> Sums:
    """Adds what was found in one step."""
    total, count = sums
    return tf.nest.map_structure(tf.add, total, values), count + 1


def add_batch(sums: Sums, means: Structure, examples: tf.Tensor) -> Sums:
    """Adds a batch's means, times its examples."""
    # A batch without examples has a mean that is no number, and no part in the sum.
    weighted = tf.nest.map_structure(
        lambda x: tf.math.multiply_no_nan(x, tf.cast(examples, x.dtype)), means
    )
    total, count = sums
    return tf.nest.map_structure(tf.add, total, weighted), count + tf.cast(examples, tf.int64)


def mean(sums: Sums) -> Structure:
    """The structure divided by its count; zeros of none."""
    total, count = sums
    return tf.nest.map_structure(lambda x: tf.math.divide_no_nan(x, tf.cast(count, x.dtype)), total)
