"""How many clients are trained at once."""

import os

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


def pieces(clients: int, most: int) -> list[int]:
    """Splits a cohort into those who are trained at once.

    A function for each size is made when it is first needed, which takes a second where the model
    is large. Powers of two keep them few, whatever sizes of cohorts follow each other.

    Args:
      clients: Clients in the cohort.
      most: The largest size.

    Returns:
      As often as it goes `most`, then falling powers of two.

    Example:
      >>> pieces(100, 32), pieces(11, 32), pieces(15, 12), pieces(0, 12)
      ([32, 32, 32, 4], [8, 2, 1], [12, 2, 1], [])
    """
    full, rest = divmod(clients, most)
    return [most] * full + [
        1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1
    ]
