"""What one client's training is asked for, is given and gives, for models of both kinds."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.client.example_clipping import ExampleClipping
from aggregators.core import client_memory
from aggregators.core.autograph import with_autograph
from aggregators.core.candidates import Error
from aggregators.core.client_memory import ClientMemory, Finished
from aggregators.core.needs import LossAt

Loop: TypeAlias = tff.learning.LoopImplementation


@attrs.frozen
class Task:
    """How a client trains, and what is measured while it does.

    Attributes:
      optimizer: The client's optimizer.
      loss_at: `"training"`: the loss of each batch before its own step, free of cost. `"initial"`: the
        loss of the weights that training starts from, one more forward pass. None: no loss.
      loop: `dataset.reduce` or a loop over the dataset's iterator.
      clipping: How each example's gradient is clipped; None takes the batch's as it is.
      error: What candidates are scored by; see `aggregators.core.candidates.Candidates`.
      memory: What the client does with its state, which is in its context; None for no state.
    """

    optimizer: tff.learning.optimizers.Optimizer
    loss_at: LossAt | None
    loop: Loop
    clipping: ExampleClipping | None = None
    error: Error | None = None
    memory: ClientMemory | None = None

    def start(self, trainable: tuple[Any, ...], hparams: Any, context: Any) -> Any:
        """The optimizer's state at the first step."""
        fresh = initial_state(self.optimizer, trainable, hparams)
        if self.memory is None:
            return fresh
        start = with_autograph(self.memory.start)(fresh, context)
        return self.optimizer.set_hparams(start, hparams)

    def next(self, state: Any, trainable: tuple[Any, ...], gradients: Any) -> tuple[Any, Any]:
        """A step of the optimizer."""
        return with_autograph(self.optimizer.next)(state, trainable, gradients)

    def correction(self, context: Any) -> Callable[[Any, Any], Any]:
        """What makes of `(gradients, weights)` the gradients that the optimizer takes."""
        return client_memory.correction(self.memory, context)

    def finish(self, context: Any, done: Finished) -> Any:
        """What the client keeps and sends; empty without a memory."""
        return () if self.memory is None else with_autograph(self.memory.finish)(context, done)


class Given(NamedTuple):
    """What one client has before it trains.

    Attributes:
      weights: The model's weights.
      dataset: Its data.
      hparams: Its optimizer's hyperparameters.
      models: Candidates for the trainable weights, to be scored.
      context: What it has of its own; None without a memory.
      moment: Where in a run it trains, for noise that a seed decides: int32, such as round and client.
    """

    weights: Any
    dataset: tf.data.Dataset
    hparams: Any
    models: Any
    context: Any
    moment: Any


class Trained(NamedTuple):
    """What one client's training gives.

    Attributes:
      initial: Tuple of trainable weights before.
      trained: The same after.
      loss: float32: mean loss per example; 0 without examples. None if not asked for. Of a loss that
        is no scalar, the mean over its elements stands for the batch.
      steps: int32: optimizer steps.
      examples: int64: examples seen while training; with clipping, those that counted.
      metrics: The model's unfinalized metrics.
      fresh_metrics: The same, of no example at all.
      counts: Of clipping, see `example_clipping.Clipped`; empty without.
      errors: Of candidates, float32 of shape `[number]`: their mean errors; and a bool, whether these
        are losses. None if there are none.
      remembered: What `ClientMemory.finish` gives; empty without one.
    """

    initial: Any
    trained: Any
    loss: Any
    steps: Any
    examples: Any
    metrics: Any
    fresh_metrics: Any
    counts: Any
    errors: Any
    remembered: Any


Training = Callable[[Given], Trained]


def initial_state(
    optimizer: tff.learning.optimizers.Optimizer, trainable: tuple[Any, ...], hparams: Any
) -> Any:
    """The state of an optimizer that knows of no step."""
    specs = tuple(tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in trainable)
    return optimizer.set_hparams(optimizer.initialize(specs), hparams)


def fold(
    loop: Loop,
    dataset: tf.data.Dataset,
    state: Any,
    step: Callable[[Any, Any], Any],
    after: Any = (),
) -> Any:
    """Folds a dataset's batches into a state: `step(state, batch) -> state`.

    Args:
      loop: How.
      dataset: The batches.
      state: What is there before the first.
      step: One batch.
      after: Tensors of earlier folds of the dataset. A dataset that shuffles draws an order for each
        iterator when it is made: made in no order of their own, they would get another in each run.
    """
    with tf.control_dependencies(tf.nest.flatten(after)):
        return _fold(loop, dataset, state, step)


def _fold(loop: Loop, dataset: tf.data.Dataset, state: Any, step: Callable[[Any, Any], Any]) -> Any:
    if loop is Loop.DATASET_REDUCE:
        return dataset.reduce(state, tf.autograph.experimental.do_not_convert(step))
    iterator = iter(dataset)
    _, state = tf.while_loop(
        lambda batch, state: batch.has_value(),
        lambda batch, state: (iterator.get_next_as_optional(), step(state, batch.get_value())),
        (iterator.get_next_as_optional(), state),
    )
    return state
