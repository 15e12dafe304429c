"""A Keras optimizer as a gradient transform."""

import warnings
from collections.abc import Mapping

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import hyperparameters
from tff_optim.backends.keras import checks, copies
from tff_optim.backends.keras.optimizer import KerasOptimizer, resolve
from tff_optim.core import entries
from tff_optim.core.devices import select_device
from tff_optim.core.tracing import eager_world
from tff_optim.core.types import Gradients, Hparams, Number, State, Transformed, Value, Weights
from tff_optim.keras_objects import as_json as keras_objects
from tff_optim.transforms.from_optimizer import FromOptimizer, probe

_LEARNING_RATE = tff.learning.optimizers.LEARNING_RATE_KEY
_WEIGHT_DECAY = "weight_decay"


def _step_only(given: Value) -> KerasOptimizer:
    """The optimizer at learning rate 1, without decay and moving average of weights."""
    built = isinstance(given, KerasOptimizer)
    keras = given.keras_optimizer if built else resolve(given)
    name = type(keras).__name__
    dropped = []
    if not copies.has_rate_variable(keras):
        dropped.append("its learning-rate schedule (give it to the pipeline instead)")
    if keras.weight_decay:
        dropped.append("its weight decay (give it to the pipeline instead)")
    if keras.use_ema:
        dropped.append("its moving average of weights")
    if dropped:
        warnings.warn(f"`KerasTransform` of {name} leaves out {', '.join(dropped)}.", stacklevel=3)
    with eager_world():  # variables and values are needed now, even while TFF traces
        if not built:
            checks.check_arguments(keras)
        device = given.device if built else select_device()
        optimizer = KerasOptimizer(copies.with_unit_rate(keras), device)
    if probe(optimizer).depends_on_weights:
        raise ValueError(
            "`optimizer` of `KerasTransform` must take a step that depends on gradients alone; "
            f"found {name}, whose step depends on the values of the weights. Use "
            "`tff_optim.build_keras_optimizer` on its own instead."
        )
    return optimizer


@attrs.frozen
class KerasTransform(FromOptimizer):
    """Replaces gradients by the step that a Keras optimizer would take.

    The result is `-u(g)`, where `g` are the gradients and `u` is the step that the Keras optimizer takes
    from weights of 0 at a learning rate of 1. The state is that of `tff_optim.build_keras_optimizer`, in
    the gradients' dtypes. The Keras optimizer still clips. The pipeline has its own rate and decay, so
    the optimizer's learning rate is not used, and its schedule, weight decay and moving average of
    weights are left out with a warning. Optimizers whose step depends on the values of the weights, such
    as Ftrl and Adafactor, are refused after some trial steps.

    Attributes:
      optimizer: An argument of `tff_optim.build_keras_optimizer` (a Keras optimizer, its name, its
        config, or a callable without arguments) or its result.

    Example:
      >>> adam = KerasTransform("adam")
      >>> state = adam.initialize([tf.TensorSpec([])])
      >>> state, gradients = adam.next(state, [tf.constant(5.0)], [tf.constant(-7.0)])
      >>> round(float(gradients[0]), 4)
      -1.0
    """

    optimizer: KerasOptimizer = attrs.field(
        converter=_step_only, metadata={entries.READER: keras_objects.optimizer_from_json}
    )

    def next(self, state: State, weights: Weights, gradients: Gradients) -> Transformed:
        """See base class."""
        state, moved = super().next(state, weights, gradients)
        return state, tf.nest.map_structure(lambda u: None if u is None else -u, moved)

    def get_hparams(self, state: State) -> Hparams:
        """The Keras optimizer's hparams without the rates, which have no effect here."""
        hparams = super().get_hparams(state)
        for name in (_LEARNING_RATE, _WEIGHT_DECAY):
            hparams.pop(name, None)
        return hparams

    def set_hparams(self, state: State, hparams: Mapping[str, Number]) -> State:
        """See base class."""
        hyperparameters.check_names(hparams, self.get_hparams(state), "KerasTransform")
        return super().set_hparams(state, hparams)
