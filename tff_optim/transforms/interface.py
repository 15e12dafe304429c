"""The interface of gradient transforms."""

import abc
from collections.abc import Mapping

from tff_optim import hyperparameters
from tff_optim.core.types import Gradients, Hparams, Number, Specs, State, Transformed, Weights


class GradientTransform(abc.ABC):
    """Turns gradients into other gradients, with a state.

    To write one, subclass this and implement two pure functions, `initialize` and `next`, which TFF
    traces. They must not make or use a `tf.Variable`, and the state's structure, shapes and dtypes stay
    the same from step to step. If the class is immutable, as `attrs.frozen` makes it, transforms can be
    compared and shared. AutoGraph converts Python's `if` and `for` over tensors to operations.

    A leaf whose gradient is `None` has no update in this step: keep it `None`, and keep its state.

    Example:
      Signs of gradients, scaled.

      >>> import tensorflow as tf
      >>> class Sign(GradientTransform):
      ...     def initialize(self, specs):
      ...         return ()
      ...
      ...     def next(self, state, weights, gradients):
      ...         sign = lambda g: None if g is None else tf.sign(g)
      ...         return state, tf.nest.map_structure(sign, gradients)
      >>> Sign().next((), [0.0], [tf.constant(-3.0)])[1][0].numpy()
      -1.0
    """

    @abc.abstractmethod
    def initialize(self, specs: Specs) -> State:
        """Returns the state before the first step.

        Args:
          specs: A structure of `tf.TensorSpec`s, those of the weights.

        Returns:
          A structure of tensors, and of Python or NumPy numbers.
        """

    @abc.abstractmethod
    def next(self, state: State, weights: Weights, gradients: Gradients) -> Transformed:
        """Takes one step.

        Args:
          state: The result of `initialize` or of the step before.
          weights: The weights before the step; a structure of tensors.
          gradients: A structure like `weights` of dense tensors, or `None` for a leaf without.

        Returns:
          The new state and the new gradients, nested, shaped and typed like the old ones.
        """

    def get_hparams(self, state: State) -> Hparams:
        """The numbers in `state` that may be changed between rounds, by name.

        Args:
          state: A state of this transform.

        Returns:
          An `OrderedDict`; empty unless fields were declared with `tff_optim.hyperparameters`.
        """
        return hyperparameters.get_hparams(self, state)

    def set_hparams(self, state: State, hparams: Mapping[str, Number]) -> State:
        """Returns `state` with the numbers in `hparams`.

        Args:
          state: A state of this transform.
          hparams: Some of the numbers of `get_hparams`; the others stay as they are.

        Raises:
          TypeError: If a value is neither a number nor a tensor.
          ValueError: If a name is unknown, a number is out of range, or a tensor is not a scalar.
        """
        return hyperparameters.set_hparams(self, state, hparams) if hparams else state
