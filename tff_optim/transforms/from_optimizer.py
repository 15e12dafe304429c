"""Gradient transforms that take the steps of an optimizer."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tff_optim.backends.common import PureOptimizer
from tff_optim.core.tracing import eager_world
from tff_optim.core.types import Gradients, Hparams, Number, Specs, State, Transformed, Weights
from tff_optim.transforms.interface import GradientTransform

_SHAPES = [(2, 3), (4,)]  # some optimizers treat matrices and vectors differently
_STEPS = 3


class FromOptimizer(GradientTransform):
    """Replaces gradients by the steps of an optimizer, which must not depend on the weights."""

    optimizer: PureOptimizer

    def initialize(self, specs: Specs) -> State:
        """See base class."""
        return self.optimizer.initialize(specs)

    def next(self, state: State, weights: Weights, gradients: Gradients) -> Transformed:
        """See base class."""
        # At zero a step loses no digits to the weights, and no decay has an effect.
        origin = tf.nest.map_structure(tf.zeros_like, weights)
        state, moved = self.optimizer.next(state, origin, gradients)
        return state, tf.nest.map_structure(lambda g, u: None if g is None else u, gradients, moved)

    def get_hparams(self, state: State) -> Hparams:
        """See base class."""
        return self.optimizer.get_hparams(state)

    def set_hparams(self, state: State, hparams: Mapping[str, Number]) -> State:
        """See base class."""
        return self.optimizer.set_hparams(state, hparams)


class Probed(NamedTuple):
    """The behaviour of an optimizer in some trial steps.

    Attributes:
      depends_on_weights: Whether the same gradients move different weights differently.
      is_descent: Whether every step goes against the gradient.
    """

    depends_on_weights: bool
    is_descent: bool


@functools.lru_cache(maxsize=128)
def probe(optimizer: PureOptimizer) -> Probed:
    """Takes steps with the same gradients, from weights of zero and from others."""
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
