"""Prints values inside a federated computation."""

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core import checks
from aggregators.core.layers import names_in_type
from aggregators.core.types import Structure


def federated_print(value: tff.Value, message: str, *, summarize: int = 3) -> tff.Value:
    """Prints a value each time a federated computation runs, and returns it unchanged.

    For use inside a `tff.federated_computation`. A value at clients prints one line per client, in
    no particular order; a value at the server prints one line. Lines look like
    `message: name=tensor ...`, where names are the tensors' paths in the structure (a lone tensor has
    none). They go to the standard error of the TFF worker, which is the terminal that started Python.

    TFF runs only what the result depends on, so go on with the returned value, or nothing is printed.

    Args:
      value: A value placed at `tff.CLIENTS` or `tff.SERVER`.
      message: The text before the value.
      summarize: How many elements of each axis to show at either end; -1 for all.

    Returns:
      `value`.

    Raises:
      TypeError: If `value` is not placed, or `message` is no string.
      ValueError: If `summarize` is out of range.

    Example:
      >>> import numpy as np
      >>> @tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
      ... def mean(x):
      ...     return tff.federated_mean(federated_print(x, "client"))
      >>> str(mean.type_signature)
      '({float32}@CLIENTS -> float32@SERVER)'
    """
    checks.instance("message", message, str)
    summarize = checks.whole("summarize", summarize, -1)
    value, member = checks.placed("value", value, tff.CLIENTS, tff.SERVER)
    names = names_in_type(member)

    # TFF drops the side effects of a bare graph, but keeps those of a `tf.function`.
    @tf.function
    def show(tensors: Structure) -> Structure:
        shown = []
        for name, tensor in zip(names, tf.nest.flatten(tensors), strict=True):
            shown += [f" {name}=" if name else " ", tensor]
        tf.print(message + ":", *shown, summarize=summarize, sep="")
        return tf.nest.map_structure(tf.identity, tensors)

    return tff.federated_map(tff.tensorflow.computation(lambda member: show(member), member), value)
