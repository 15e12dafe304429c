"""What an optimizer does with weights and gradients, found out by trying some steps."""

import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tff_optim.backends.common import PureOptimizer
from tff_optim.core.tracing import eager_world

_SHAPES = [(2, 3), (4,)]  # a matrix too: some optimizers treat it in another way than a vector
_STEPS = 3


class Probed(NamedTuple):
    """What some steps have shown.

    Attributes:
      depends_on_weights: Whether the same gradients move different weights differently.
      is_descent: Whether every step goes against its gradient.
    """

    depends_on_weights: bool
    is_descent: bool


@functools.lru_cache(maxsize=128)
def probe(optimizer: PureOptimizer) -> Probed:
    """Takes some steps along the same gradients, from weights of zero and from others."""
    rng = np.random.default_rng(0)
    gradients, start = ([rng.normal(size=shape) for shape in _SHAPES] for _ in range(2))
    moves = []
    with eager_world():  # values are needed now, even while TFF traces
        for scale in (0.0, 3.0):
            weights = [tf.constant(scale * w) for w in start]
            state = optimizer.initialize([tf.TensorSpec(s, tf.float64) for s in _SHAPES])
            for _ in range(_STEPS):
                state, new = optimizer.next(state, weights, [tf.constant(g) for g in gradients])
                moves.append(np.concatenate([np.ravel(n - w) for n, w in zip(new, weights)]))
                weights = list(new)
    at_zero, elsewhere = moves[:_STEPS], moves[_STEPS:]
    along = np.array(at_zero) @ np.concatenate([np.ravel(g) for g in gradients])
    return Probed(
        not np.allclose(at_zero, elsewhere, rtol=1e-6, atol=1e-9), bool(np.all(along < 0))
    )
