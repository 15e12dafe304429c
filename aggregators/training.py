"""A client's training, with its loss and steps kept: TFF's own loops report neither per client."""

from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from aggregators.client_task import Task, Training
from aggregators.functional_training import build_functional_training
from aggregators.variable_training import build_variable_training


def build_training(model_fn: Any, task: Task) -> Training:
    """Builds the training of one client: `Given -> Trained`.

    One optimizer step per batch, as `tff.learning.templates.build_model_delta_client_work` takes.

    Args:
      model_fn: Function of nothing that makes a `tff.learning.models.VariableModel`, or a
        `tff.learning.models.FunctionalModel`.
      task: How the client trains, and what is measured.

    Returns:
      A function to be called while a graph is built.
    """
    if isinstance(model_fn, tff.learning.models.FunctionalModel):
        return build_functional_training(model_fn, task)
    return build_variable_training(model_fn, task)


def check_model_fn(model_fn: Any) -> None:
    """Raises `TypeError` for what is neither a functional model nor may make a variable model."""
    if isinstance(model_fn, tff.learning.models.FunctionalModel):
        return
    if not callable(model_fn) or isinstance(model_fn, tf.keras.Model):
        raise TypeError(
            "`model_fn` must be a function that makes a tff.learning.models.VariableModel, or a "
            f"tff.learning.models.FunctionalModel; found {model_fn!r}. Make the one of a Keras model "
            "with `tff.learning.models.from_keras_model`, in a function of no arguments, or the other "
            "with `tff.learning.models.functional_model_from_keras`."
        )


def check_optimizer(argument: str, optimizer: Any) -> None:
    """Raises `TypeError` for anything that is not TFF's kind of optimizer."""
    if not isinstance(optimizer, tff.learning.optimizers.Optimizer):
        raise TypeError(
            f"`{argument}` must be a tff.learning.optimizers.Optimizer; found {optimizer!r}. "
            "Make one of a Keras optimizer with `tff_optim.build_keras_optimizer`."
        )
