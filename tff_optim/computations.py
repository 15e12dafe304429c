"""An optimizer as a pair of TFF computations, for rounds that are written by hand."""

from typing import NamedTuple

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core.types import Gradients, State, Weights


class OptimizerComputations(NamedTuple):
    """An optimizer as TFF computations.

    Attributes:
      initialize: `( -> S)`, the state before the first step.
      next: `(<state=S,weights=W,gradients=W> -> <S,W>)`, one step.
    """

    initialize: tff.Computation
    next: tff.Computation


def build_optimizer_computations(
    optimizer: tff.learning.optimizers.Optimizer, weights_type: tff.Type
) -> OptimizerComputations:
    """Makes a pair of `tff.tensorflow.computation`s of an optimizer.

    Use them with `tff.federated_eval` and `tff.federated_map`, at the server or at the clients.

    Args:
      optimizer: A `tff.learning.optimizers.Optimizer`.
      weights_type: The `tff.Type` of the weights, without placement, or what `tff.to_type` takes.

    Returns:
      An `OptimizerComputations`, which unpacks as `initialize, next`.

    Raises:
      TypeError: If `optimizer` is not a TFF optimizer, or `weights_type` is not a structure of
        tensors.

    Example:
      >>> import numpy as np
      >>> import tensorflow_federated as tff
      >>> import tff_optim
      >>> initialize, step = tff_optim.build_optimizer_computations(
      ...     tff_optim.build_keras_optimizer("sgd"), tff.TensorType(np.float32, [2])
      ... )
      >>> str(step.type_signature.result[1])
      'float32[2]'
    """
    if not isinstance(optimizer, tff.learning.optimizers.Optimizer):
        raise TypeError(
            "`optimizer` must be a `tff.learning.optimizers.Optimizer`; found "
            f"{type(optimizer).__name__}. Wrap a Keras optimizer with `build_keras_optimizer`."
        )
    weights_type = tff.to_type(weights_type)
    if not tff.types.is_structure_of_tensors(weights_type):
        raise TypeError(
            f"`weights_type` must be a structure of tensors without placement; found {weights_type}."
        )
    specs = tff.types.type_to_tf_tensor_specs(weights_type)

    @tff.tensorflow.computation
    def initialize() -> State:
        return optimizer.initialize(specs)

    @tff.tensorflow.computation(initialize.type_signature.result, weights_type, weights_type)
    @tf.function
    def step(state: State, weights: Weights, gradients: Gradients) -> tuple[State, Weights]:
        return optimizer.next(state, weights, gradients)

    return OptimizerComputations(initialize, step)
