"""An optax transformation as a gradient transform."""

from collections.abc import Mapping

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.backends.optax.optimizer import OptaxOptimizer, build_optax_optimizer
from tff_optim.core.tracing import eager_world
from tff_optim.core.types import (
    Gradients,
    Hparams,
    Number,
    Specs,
    State,
    Transformed,
    Value,
    Weights,
)
from tff_optim.transforms.interface import GradientTransform

_STEPS = 3


def _of_gradients(given: Value) -> OptaxOptimizer:
    """The transformation, which depends on gradients alone and does not turn them round."""
    optimizer = given if isinstance(given, OptaxOptimizer) else build_optax_optimizer(given)
    with eager_world():  # values are needed now, even while TFF traces
        at_zero, elsewhere = (_tried(optimizer, scale) for scale in (0.0, 3.0))
    if not np.allclose(at_zero, elsewhere, rtol=1e-6, atol=1e-9):
        raise ValueError(
            "`optimizer` of `OptaxTransform` must depend on gradients alone; found a transformation "
            "whose updates depend on the values of the weights. Use the pipeline's weight decay, or "
            "`tff_optim.build_optax_optimizer` on its own."
        )
    if np.all(np.sum(at_zero, axis=1) < 0):  # along a gradient of ones
        raise ValueError(
            "`optimizer` of `OptaxTransform` must keep the sign of gradients, as "
            "`optax.scale_by_adam()` does; found a transformation that reverses it, as whole "
            "optimizers do. Leave its learning rate out: the pipeline has its own."
        )
    return optimizer


def _tried(optimizer: OptaxOptimizer, scale: float) -> np.ndarray:
    """The updates of some steps along one gradient, from weights of this size."""
    shapes = [(2, 3), (4,)]
    weights = [tf.constant(scale * np.linspace(-1, 1, np.prod(s)).reshape(s)) for s in shapes]
    state = optimizer.initialize([tf.TensorSpec(s, tf.float64) for s in shapes])
    updates = []
    for _ in range(_STEPS):
        gradients = [tf.ones(s, tf.float64) for s in shapes]
        state, new = optimizer.next(state, weights, gradients)
        updates.append(np.concatenate([np.ravel(n - w) for n, w in zip(new, weights)]))
        weights = list(new)
    return np.stack(updates)


@attrs.frozen
class OptaxTransform(GradientTransform):
    """Replaces gradients by what an optax transformation makes of them, as `optax.chain` does.

    So one pipeline has parts of Keras, of optax and of this package. The state is that of
    `tff_optim.build_optax_optimizer`, in the gradients' dtypes, and so are the hparams.
    A transformation whose updates depend on the values of the weights is refused, and so is a whole
    optimizer such as `optax.adam(0.1)`, whose rate would be a second one; both are found out by
    trying some steps.

    Attributes:
      optimizer: An `optax.GradientTransformation`, a callable without arguments that returns one, or
        what `tff_optim.build_optax_optimizer` returns: then the factory's numbers are hparams.

    Example:
      >>> import optax, tff_optim
      >>> belief = tff_optim.build_optax_optimizer(optax.scale_by_belief, b1=0.8)
      >>> part = OptaxTransform(belief)
      >>> state = part.initialize([tf.TensorSpec([])])
      >>> list(part.get_hparams(state))
      ['b1', 'b2', 'eps', 'eps_root']
      >>> clip = OptaxTransform(optax.clip(2.0))
      >>> _, gradients = clip.next(clip.initialize([tf.TensorSpec([])]), [5.0], [tf.constant(-7.0)])
      >>> gradients[0].numpy()
      -2.0
    """

    optimizer: OptaxOptimizer = attrs.field(converter=_of_gradients)

    def initialize(self, specs: Specs) -> State:
        """See base class."""
        return self.optimizer.initialize(specs)

    def next(self, state: State, weights: Weights, gradients: Gradients) -> Transformed:
        """See base class."""
        # At zero, where an update loses no digits to the weights.
        origin = tf.nest.map_structure(tf.zeros_like, weights)
        state, updates = self.optimizer.next(state, origin, gradients)
        handed_on = tf.nest.map_structure(lambda g, u: None if g is None else u, gradients, updates)
        return state, handed_on

    def get_hparams(self, state: State) -> Hparams:
        """See base class."""
        return self.optimizer.get_hparams(state)

    def set_hparams(self, state: State, hparams: Mapping[str, Number]) -> State:
        """See base class."""
        return self.optimizer.set_hparams(state, hparams)
