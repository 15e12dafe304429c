"""How many clients are trained at once."""

import os
from collections.abc import Iterable

import tensorflow_federated as tff

from tff_optim.resident import leaves

_SMALL = 16 << 20
_MOST = 512 << 20


def at_once(context_type: tff.Type, per_core: int, small: int) -> int:
    """Chooses how many clients a place trains at once.

    Args:
      context_type: What a client is sent, and about what it returns.
      per_core: How many to a processor core that this process may use.
      small: How many of a small model, such that all take 16 MB: they share what has to be done for
        each step, and the wait for its slowest client.

    Returns:
      As many, but no more than are sent 512 MB together; at least one.

    Example:
      >>> import numpy as np
      >>> model = tff.TensorType(np.float32, [11_000_000])  # a ResNet-18
      >>> at_once(model, per_core=64, small=128)
      12
    """
    size = max(leaves.num_bytes(context_type), 1)
    wanted = max(per_core * cores(), min(small, _SMALL // size))
    return max(min(wanted, _MOST // size), 1)


def cores() -> int:
    """Counts the processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def of_function(clients: int, most: int, made: Iterable[int]) -> int:
    """Chooses the size of the function that trains a cohort, some clients in each call.

    A function trains as many clients or fewer, and costs a second to make where the model is large.
    So it is one that is there, or else one that will do for cohorts of about this size too.

    Args:
      clients: Clients in the cohort.
      most: The largest size.
      made: The sizes of the functions that are there.

    Returns:
      The smallest of those made that take all clients, or as many as any; else a power of two that
      does, or `most`.

    Example:
      >>> of_function(10, 32, made=[]), of_function(100, 32, made=[]), of_function(10, 32, made=[32])
      (16, 32, 32)
    """
    needed = min(clients, most)
    fitting = [size for size in made if size >= needed]
    return min(fitting, default=min(most, 1 << (needed - 1).bit_length()))
