"""How many clients train at once."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import tensorflow_federated as tff

from tff_optim.resident import leaves

_SMALL = 16 << 20
_MOST = 512 << 20


def at_once(context_type: tff.Type, per_core: int, small: int) -> int:
    """Chooses how many clients train at once.

    Args:
      context_type: The type of a client's context, whose size is about that of its update.
      per_core: How many clients train on each processor core that this process may use.
      small: How many clients with a small model train at once, if their contexts take at most 16 MB
        together. They share the fixed cost of each step, and the wait for its slowest client.

    Returns:
      The number: at least 1, and at most as many as have contexts of 512 MB together.

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
    """Splits a cohort in order into at most `most` shares of about equal size, none of them empty.

    Example:
      >>> split("abcdefg", 3), split("ab", 3), split("", 3)
      (['ab', 'cd', 'efg'], ['a', 'b'], [])
    """
    shares = min(most, len(cohort))
    bounds = [len(cohort) * i // max(shares, 1) for i in range(shares + 1)]
    return [cohort[a:b] for a, b in itertools.pairwise(bounds)]
