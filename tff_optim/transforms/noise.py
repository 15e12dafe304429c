"""Transforms that add noise."""

import math

import attrs
import tensorflow as tf

from tff_optim import hyperparameters
from tff_optim.core import leaves
from tff_optim.core.checks import check_whole, whole
from tff_optim.core.types import Gradients, Rate, Specs, State, Transformed, Weights
from tff_optim.transforms.interface import GradientTransform

# Named, because "auto_select" may give other numbers on another device.
_ALGORITHM = "philox"


@attrs.frozen
class GaussianNoise(GradientTransform):
    """Adds independent normal noise to each element.

    `g + stddev z`, with `g` the gradient and `z` drawn from N(0, 1). The numbers are a function of
    the seed, the number of the step and the position of the tensor, all of which a state
    carries (`seed`, int64[2], and `step`): a resumed run goes on with the noise that an
    uninterrupted one would have drawn.

    Without a seed, `initialize` draws one from the system. On clients, whose state is made anew
    each round, every client then has its own noise in every round. With a seed they would all
    have the same: give one only to an optimizer on the server, or in a test.

    The transform adds noise and nothing more: it accounts for no privacy, and TensorFlow's
    generator is not a cryptographic one (declearn's `safe_mode` has no counterpart).

    Attributes:
      stddev: The standard deviation; a number of at least 0 or a Keras schedule.
      seed: A non-negative integer, or `None` to draw one.

    Example:
      >>> noise = GaussianNoise(stddev=0.1, seed=1)
      >>> state = noise.initialize(tf.TensorSpec([1000]))
      >>> _, gradient = noise.next(state, tf.zeros([1000]), tf.zeros([1000]))
      >>> 0.09 < float(tf.math.reduce_std(gradient)) < 0.11
      True
    """

    stddev: Rate = hyperparameters.non_negative(1.0)
    seed: int | None = attrs.field(default=None, converter=whole)

    @seed.validator
    def _check_seed(self, attribute: attrs.Attribute, value: object) -> None:
        check_whole("`seed` of `GaussianNoise`", value, 0, 2**63 - 1, optional=True)

    def initialize(self, specs: Specs) -> State:
        """See base class."""
        del specs  # The noise is shaped when it is drawn.
        state = hyperparameters.initialize(self, counts_steps=True)
        if self.seed is None:
            # Not `tf.random.uniform`: after `tf.random.set_seed` its numbers are frozen into the
            # graph, and all clients would draw the same seed.
            state["seed"] = tf.raw_ops.NonDeterministicInts(shape=[2], dtype=tf.int64)
        else:
            state["seed"] = tf.constant([self.seed, 0], tf.int64)
        return state

    def next(self, state: State, weights: Weights, gradients: Gradients) -> Transformed:
        """See base class."""
        del weights  # The rule looks at gradients alone.
        hyperparameters.check_state(self, state, slots=("seed",), counts_steps=True)
        stddev = hyperparameters.current(self, state)["stddev"]
        seed = tf.random.experimental.stateless_fold_in(
            state["seed"], leaves.number(state[hyperparameters.STEP], tf.int64), alg=_ALGORITHM
        )
        noisy = []
        for position, g in enumerate(tf.nest.flatten(gradients)):
            if g is not None:
                own_seed = tf.random.experimental.stateless_fold_in(
                    seed, tf.constant(position, tf.int64), alg=_ALGORITHM
                )
                noise = _standard_normal(g.shape, g.dtype, own_seed)
                g = g + leaves.number(stddev, g.dtype) * noise
            noisy.append(g)
        new_state = hyperparameters.advance(self, state)
        new_state["seed"] = state["seed"]
        return new_state, tf.nest.pack_sequence_as(gradients, noisy)


def _standard_normal(shape: tf.TensorShape, dtype: tf.DType, seed: tf.Tensor) -> tf.Tensor:
    """Box and Muller's normal numbers, from random bits.

    TensorFlow's own normal numbers for one seed differ between XLA and its kernels; its bits do not.
    """
    size = shape.num_elements()
    bits = tf.random.stateless_uniform(
        [2, (size + 1) // 2], seed, minval=None, maxval=None, dtype=tf.uint32, alg=_ALGORITHM
    )
    uniform = (tf.cast(bits, dtype) + 0.5) * 2.0**-32  # in (0, 1]: its logarithm is finite
    radius, angle = tf.sqrt(-2 * tf.math.log(uniform[0])), 2 * math.pi * uniform[1]
    pairs = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], axis=0)
    return tf.reshape(pairs[:size], shape)
