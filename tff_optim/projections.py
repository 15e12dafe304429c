"""Projections: what puts weights back into a set after each step."""

import math
from collections.abc import Callable, Iterable

import attrs
import tensorflow as tf

from tff_optim import hyperparameters
from tff_optim.core import comparison, leaves, selection
from tff_optim.core.messages import shown
from tff_optim.core.tracing import converted
from tff_optim.core.types import Specs
from tff_optim.keras_objects import arguments as keras_arguments
from tff_optim.keras_objects import as_json as keras_objects

__all__ = ["Ball", "Box", "Projection", "Simplex"]


def _check_where(instance: object, attribute: attrs.Attribute, value: object) -> None:
    del instance, attribute  # There is only one.
    selection.check("where` of `Projection", value)


@attrs.frozen
class Projection:
    r"""A function on single tensors of weights, and on which of them it is used.

    Attributes:
      function: A `tf.keras.constraints.Constraint`, or any function from a tensor to a tensor of
        the same shape and dtype.
      where: `None` for every tensor; a regular expression, searched for in the tensor's path
        (`dense/kernel` in nested dictionaries, `0` in a flat list) and read as RE2 does: without
        lookaround, and with `\w`, `\d` and `\b` for ASCII only; a whole number for tensors of at
        most that rank; or a function of the path and the `tf.TensorSpec` that tells whether the
        tensor is projected. In `tff.learning`, where models are flat lists, paths are positions:
        give `build_optimizer` the `weight_names`, or select by shape.

    Example:
      >>> only_matrices = Projection(
      ...     tf.keras.constraints.NonNeg(), where=lambda path, spec: spec.shape.rank == 2
      ... )
      >>> only_matrices.selects("0", tf.TensorSpec([3]))
      False
    """

    function: Callable[[tf.Tensor], tf.Tensor] = attrs.field(eq=comparison.key)
    where: selection.Where = attrs.field(default=None, validator=_check_where)

    @function.validator
    def _check_function(self, attribute: attrs.Attribute, value: object) -> None:
        del attribute  # There is only one.
        is_keras = keras_objects.is_keras_object(value)
        if is_keras and isinstance(value, tf.keras.constraints.Constraint):
            keras_arguments.check_object(value)
        elif is_keras or not callable(value):  # a schedule or regularizer can be called, too
            raise TypeError(
                "`function` of `Projection` must be a tf.keras.constraints.Constraint or a "
                f"function from a tensor to a tensor; found {shown(value)}."
            )

    def selects(self, path: str, spec: tf.TensorSpec) -> bool:
        """Whether the tensor at `path`, of shape and dtype `spec`, is projected."""
        return selection.selects(self.where, path, spec)

    def __call__(self, path: str, tensor: tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
        """The projected tensor, or `tensor` where it is not selected.

        Args:
          path: The path of the weights.
          tensor: Their values, in the dtype that they are computed in.
          spec: Their shape and own dtype, which `where` looks at.

        Returns:
          A tensor of the shape and dtype of `tensor`.
        """
        if not self.selects(path, spec):
            return tensor
        name = getattr(self.function, "__name__", type(self.function).__name__)
        where = f"`projection` {name} on the weights at '{path}'"
        try:
            projected = tf.convert_to_tensor(converted(self.function)(tensor))
        except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
            raise ValueError(
                f"{where} must be a function of such tensors; found that it fails for shape "
                f"{tensor.shape}, dtype {tensor.dtype.name}: {error} "
                "Select fitting tensors with `tff_optim.projections.Projection(..., where=...)`; "
                "some Keras constraints work for float32 only."
            ) from error
        if projected.shape != tensor.shape or projected.dtype != tensor.dtype:
            raise ValueError(
                f"{where} must keep shape and dtype: expected {tensor.shape} "
                f"{tensor.dtype.name}; found {projected.shape} {projected.dtype.name}."
            )
        return projected


def as_projections(given: object) -> tuple[Projection, ...]:
    """Reads the argument `projection`: none, one or a sequence, bare functions wrapped.

    Raises:
      TypeError: If something is neither a `Projection` nor callable.
    """
    items = given if isinstance(given, list | tuple) else () if given is None else (given,)
    projections = []
    for item in items:
        if not isinstance(item, Projection) and not callable(item):
            raise TypeError(
                "`projection` must be a tf.keras.constraints.Constraint, a function, a "
                f"tff_optim.projections.Projection or a sequence of these; found {shown(item)}."
            )
        projections.append(item if isinstance(item, Projection) else Projection(item))
    return tuple(projections)


def check_used(projections: Iterable[Projection], specs: Specs) -> None:
    """Raises `ValueError` if a projection with a selection selects none of the weights."""
    for projection in projections:
        selection.check_used("where` of `Projection", projection.where, specs)


@attrs.frozen
class Box:
    """Clips each element to [lower, upper].

    Attributes:
      lower: The smallest element; a number.
      upper: The greatest; a number above `lower`.

    Example:
      >>> Box(-1.0, 1.0)(tf.constant([-3.0, 0.5])).numpy()
      array([-1. ,  0.5], dtype=float32)
    """

    lower: float = hyperparameters.constant(hyperparameters.FINITE)
    upper: float = hyperparameters.constant(hyperparameters.FINITE)

    def __attrs_post_init__(self) -> None:
        if self.lower >= self.upper:
            raise ValueError(
                f"`upper` of `Box` must be greater than `lower`; found {shown(self.upper)} and "
                f"{self.lower!r}."
            )

    def __call__(self, tensor: tf.Tensor) -> tf.Tensor:
        """The nearest tensor in the box."""
        lower, upper = (leaves.number(x, tensor.dtype) for x in (self.lower, self.upper))
        return tf.clip_by_value(tensor, lower, upper)


@attrs.frozen
class Ball:
    """Shortens a tensor to a Euclidean norm of at most `radius`, all its elements as one vector.

    For a bound on single rows or columns take `tf.keras.constraints.MaxNorm`.

    Attributes:
      radius: The greatest norm; a number greater than 0, neither 0 nor infinite in float32.

    Example:
      >>> Ball(1.0)(tf.constant([3.0, 4.0])).numpy()
      array([0.6, 0.8], dtype=float32)
    """

    radius: float = hyperparameters.constant(hyperparameters.POSITIVE)

    def __call__(self, tensor: tf.Tensor) -> tf.Tensor:
        """The nearest tensor in the ball."""
        radius = leaves.number(self.radius, tensor.dtype)
        return tensor * (radius / tf.maximum(tf.norm(tensor), radius))


@attrs.frozen
class Simplex:
    """Moves each vector along the last axis to the nearest one of probabilities.

    The result `max(w - theta, 0)` has elements of at least 0 that sum to 1; `theta` is found from
    the sorted elements. A scalar becomes 1. There is no nearest point for a vector that holds NaN
    or infinity: all of it becomes NaN.

    Example:
      >>> Simplex()(tf.constant([2.0, 1.5, -1.0])).numpy()
      array([0.75, 0.25, 0.  ], dtype=float32)

    Duchi et al., "Efficient projections onto the l1-ball", 2008.
    """

    def __call__(self, tensor: tf.Tensor) -> tf.Tensor:
        """The nearest tensor of probabilities."""
        if tensor.shape.rank == 0:
            return tf.ones_like(tensor)
        # A common shift has no effect on the result; near 0 the threshold keeps its digits.
        shifted = tensor - tf.reduce_max(tensor, axis=-1, keepdims=True)
        descending = tf.sort(shifted, axis=-1, direction="DESCENDING")
        excess = tf.cumsum(descending, axis=-1) - 1
        count = tf.range(1, tensor.shape[-1] + 1)
        above = descending * tf.cast(count, tensor.dtype) > excess
        # The last position where the sorted elements stay above their threshold: at least the
        # first, unless it is not a number.
        last = tf.reduce_sum(tf.cast(above, tf.int32), axis=-1, keepdims=True) - 1
        last = tf.maximum(last, 0)
        theta = tf.gather(excess, last, axis=-1, batch_dims=tensor.shape.rank - 1)
        theta /= tf.cast(last + 1, tensor.dtype)
        finite = tf.reduce_all(tf.math.is_finite(tensor), axis=-1, keepdims=True)
        nowhere = leaves.number(math.nan, tensor.dtype)
        return tf.where(finite, tf.maximum(shifted - theta, 0), nowhere)
