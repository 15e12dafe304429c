"""Transforms that bound the length of gradients."""

import abc
import functools
from collections.abc import Sequence

import attrs
import tensorflow as tf

from tff_optim import hyperparameters
from tff_optim.core import leaves
from tff_optim.core.types import Gradients, Rate, Specs, State, Transformed, Weights
from tff_optim.transforms.interface import GradientTransform


@attrs.frozen
class _Clip(GradientTransform):
    """The base of both, which differ in the gradients that are measured together."""

    max_norm: Rate = hyperparameters.positive(1.0)

    @abc.abstractmethod
    def _clipped(self, gradients: Gradients, max_norm: tf.Tensor) -> Gradients:
        """The gradients, shortened; the norm is a float64."""

    def initialize(self, specs: Specs) -> State:
        """See base class."""
        del specs  # The state has no slots.
        return hyperparameters.initialize(self)

    def next(self, state: State, weights: Weights, gradients: Gradients) -> Transformed:
        """See base class."""
        del weights  # The rule looks at gradients alone.
        hyperparameters.check_state(self, state)
        max_norm = leaves.number(hyperparameters.current(self, state)["max_norm"], tf.float64)
        return hyperparameters.advance(self, state), self._clipped(gradients, max_norm)


@attrs.frozen
class ClipByNorm(_Clip):
    """Shortens each tensor that is longer than `max_norm`.

    `g min(1, max_norm / |g|)`, with `g` one tensor of gradients and `|g|` its Euclidean norm.

    Attributes:
      max_norm: The greatest norm; a number greater than 0 or a Keras schedule.

    Example:
      >>> clip = ClipByNorm(max_norm=1.0)
      >>> state = clip.initialize(tf.TensorSpec([2]))
      >>> clip.next(state, tf.zeros([2]), tf.constant([3.0, 4.0]))[1].numpy()
      array([0.6, 0.8], dtype=float32)
    """

    def _clipped(self, gradients: Gradients, max_norm: tf.Tensor) -> Gradients:
        def clip(g: tf.Tensor) -> tuple[tf.Tensor]:
            return (g * leaves.number(_factor(_norm([g]), max_norm), g.dtype),)

        return leaves.map_leaves(clip, gradients, {})[0]


@attrs.frozen
class ClipByGlobalNorm(_Clip):
    """Shortens all gradients by one factor if together they are longer than `max_norm`.

    `g min(1, max_norm / n)`, with `n` the square root of the sum of squares over all tensors of
    gradients. Tensors without a gradient do not count.

    Attributes:
      max_norm: The greatest norm; a number greater than 0 or a Keras schedule.

    Example:
      >>> clip = ClipByGlobalNorm(max_norm=1.0)
      >>> state = clip.initialize([tf.TensorSpec([]), tf.TensorSpec([])])
      >>> _, gradients = clip.next(state, [0.0, 0.0], [tf.constant(3.0), tf.constant(4.0)])
      >>> [round(float(g), 3) for g in gradients]
      [0.6, 0.8]

    Pascanu et al., "On the difficulty of training recurrent neural networks", 2013.
    """

    def _clipped(self, gradients: Gradients, max_norm: tf.Tensor) -> Gradients:
        present = [g for g in tf.nest.flatten(gradients) if g is not None]
        norm = _norm(present) if present else tf.zeros([], tf.float64)
        factor = functools.cache(functools.partial(leaves.number, _factor(norm, max_norm)))

        def clip(g: tf.Tensor) -> tuple[tf.Tensor]:
            return (g * factor(g.dtype),)

        return leaves.map_leaves(clip, gradients, {})[0]


def _norm(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """The Euclidean norm of all tensors as one vector, also where a dtype cannot hold its square."""
    norm = _root_of_squares(tensors)

    def scaled() -> tf.Tensor:
        greatest = tf.reduce_max([tf.cast(tf.reduce_max(tf.abs(g)), tf.float64) for g in tensors])
        return greatest * _root_of_squares([g / tf.cast(greatest, g.dtype) for g in tensors])

    # Scaling takes more passes than the norm itself: only where it is needed.
    return tf.cond(tf.math.is_inf(norm), scaled, lambda: norm)


def _root_of_squares(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    # Halves of sums of squares in one pass, where squares and their sum take two. One number per
    # tensor: float64 costs nothing from there on.
    halves = [tf.cast(tf.nn.l2_loss(g), tf.float64) for g in tensors]
    return tf.sqrt(2 * tf.add_n(halves))


def _factor(norm: tf.Tensor, max_norm: tf.Tensor) -> tf.Tensor:
    # min(1, max_norm / norm) without a division by zero, and exactly 1 where nothing is clipped.
    return max_norm / tf.maximum(norm, max_norm)
