"""Checks of values that are known only where a graph is run."""

from collections.abc import Sequence
from typing import Any, TypeVar

import tensorflow as tf

_T = TypeVar("_T")


def only_if(condition: tf.Tensor, message: Sequence[Any], value: _T) -> _T:
    """A structure of tensors as it is; where the condition is false, the computation ends.

    Args:
      condition: A bool.
      message: Texts and tensors, which the error shows.
      value: What must not be used otherwise. Operations made of anything else do not wait.

    Returns:
      The structure, of tensors that depend on the check.

    Example:
      >>> int(only_if(tf.constant(True), ["`n` must be 1; found", 1], tf.constant(1)))
      1
    """
    # The bare operation: TensorFlow's function around it builds a branch for the message.
    check = tf.raw_ops.Assert(condition=condition, data=message)
    with tf.control_dependencies([check]):
        return tf.nest.map_structure(tf.identity, value)
