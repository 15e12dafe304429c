"""The base of gradient transforms that apply a rule to each tensor by itself."""

import abc
import functools
from collections.abc import Mapping
from typing import ClassVar, TypeAlias

import tensorflow as tf

from tff_optim import hyperparameters
from tff_optim.core import leaves
from tff_optim.core.tracing import converted
from tff_optim.core.types import Gradients, Number, Specs, State, Transformed, Weights
from tff_optim.transforms.interface import GradientTransform

Scalars: TypeAlias = Mapping[str, tf.Tensor]
Tensors: TypeAlias = tuple[tf.Tensor, ...]


class ElementwiseTransform(GradientTransform):
    """A transform of each tensor by itself, with slots of its shape and dtype.

    Write `rule`, declare hyper-parameters with `tff_optim.hyperparameters`, and name the slots. The
    state is an `OrderedDict` of the hyper-parameters that are numbers, `step` if a schedule needs it
    or `counts_steps` is set, and the slots, each a structure like the weights, 0 at first.

    Attributes:
      counts_steps: Whether `step` is in the state without a schedule, too.

    Example:
      Signs of an average of gradients.

      >>> import attrs, tff_optim
      >>> @attrs.frozen
      ... class AverageSign(ElementwiseTransform):
      ...     beta: float = tff_optim.hyperparameters.fraction(0.9)
      ...     slots = ("average",)
      ...
      ...     def rule(self, scalars, gradient, average):
      ...         average += (1 - scalars["beta"]) * (gradient - average)
      ...         return tf.sign(average), average
      >>> part = AverageSign(beta=0.5)
      >>> state = part.initialize([tf.TensorSpec([])])
      >>> state, gradients = part.next(state, [tf.constant(0.0)], [tf.constant(-4.0)])
      >>> float(gradients[0]), float(state["average"][0])
      (-1.0, -2.0)
    """

    counts_steps: ClassVar[bool] = False

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of the slots, in the order of `rule`; a subclass may set an attribute instead."""
        return ()

    def scalars(
        self, values: Mapping[str, Number], step: tf.Tensor | None, dtype: tf.DType
    ) -> Scalars:
        """The scalars of `rule`, computed once for each dtype of the weights.

        Args:
          values: The hyper-parameters of this step, by name.
          step: The number of this step, from 1, as a float64; None if steps are not counted.
          dtype: The dtype of the gradients.

        Returns:
          Scalars of `dtype` by name: the hyper-parameters, unless overridden.
        """
        del step  # Few rules depend on it.
        return {name: leaves.number(value, dtype) for name, value in values.items()}

    @abc.abstractmethod
    def rule(self, scalars: Scalars, gradient: tf.Tensor, *slots: tf.Tensor) -> Tensors:
        """One step of one tensor.

        Args:
          scalars: The result of `scalars` for the dtype of the gradient.
          gradient: The gradient.
          *slots: The slots of this tensor.

        Returns:
          The new gradient, and the new slots.
        """

    def initialize(self, specs: Specs) -> State:
        """See base class."""
        state = hyperparameters.initialize(self, self.counts_steps)
        names = [*{*state, hyperparameters.STEP}, *self.slots]
        if len(set(names)) < len(names):
            raise ValueError(
                f"`slots` of `{type(self).__name__}` must have names of their own in the state, beside "
                f"`step` and the hyper-parameters {list(state)}; found {self.slots}. Rename a slot."
            )
        return state | {name: leaves.zeros(specs) for name in self.slots}

    def next(self, state: State, weights: Weights, gradients: Gradients) -> Transformed:
        """See base class."""
        del weights  # The rule looks at gradients alone.
        hyperparameters.check_state(self, state, self.slots, self.counts_steps)
        values = hyperparameters.current(self, state)
        carried = hyperparameters.advance(self, state)
        step = carried.get(hyperparameters.STEP)
        counted = None if step is None else tf.cast(step, tf.float64)
        scalars = functools.cache(functools.partial(converted(self.scalars), values, counted))
        rule = converted(self.rule)

        def apply(gradient: tf.Tensor, *slots: tf.Tensor) -> Tensors:
            return rule(scalars(gradient.dtype), gradient, *slots)

        old = {name: state[name] for name in self.slots}
        gradients, new = leaves.map_leaves(apply, gradients, old)
        return carried | new, gradients
