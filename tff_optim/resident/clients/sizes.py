"""How many clients are trained at once."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

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


def split(cohort: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """Deals a cohort out in order, into at most so many shares of equal sizes, none of them empty.

    Example:
      >>> split("abcdefg", 3), split("ab", 3), split("", 3)
      (['ab', 'cd', 'efg'], ['a', 'b'], [])
    """
    shares = min(most, len(cohort))
    bounds = [len(cohort) * i // max(shares, 1) for i in range(shares + 1)]
    return [cohort[a:b] for a, b in itertools.pairwise(bounds)]
