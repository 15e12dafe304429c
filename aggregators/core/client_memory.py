"""What a client keeps from round to round, and what it does with it in training."""

from collections.abc import Callable
from typing import NamedTuple

import attrs
import tensorflow as tf

from aggregators.core import checks
from aggregators.core.autograph import with_autograph
from aggregators.core.checks import asserted
from aggregators.core.types import (
    Gradients,
    Metrics,
    OptimizerState,
    State,
    Structure,
    Tensors,
    Weights,
)


class Context(NamedTuple):
    """What a client has before it trains.

    Attributes:
      state: Its own state.
      shared: The rule's state, broadcast with the model.
      weights: The trainable weights that it starts from, flat.
    """

    state: State
    shared: State
    weights: Weights


class Trained(NamedTuple):
    """What a client has after it has trained.

    Attributes:
      weights: The trained weights, flat.
      steps: int32: optimizer steps.
      mean_gradient: Mean over steps of the gradients before any correction; empty unless asked for.
      initial_gradient: Gradient of the mean loss over the client's examples at the weights that it
        started from, not in training mode; empty unless asked for.
      optimizer_state: Of the client's optimizer; empty where clients keep nothing.
      examples: int64: examples seen while training; with clipping, those that counted.
      loss: float32: mean loss per example; 0 without examples. None if not asked for. Of a loss that
        is no scalar, the mean over its elements stands for the batch.
      errors: Of candidates, float32 of shape `[number]`: their mean errors; and a bool, whether these
        are losses. None if there are none.
      metrics: The model's unfinalized metrics.
      fresh_metrics: The same, of no example at all.
      counts: Of clipping, see `example_clipping.Clipped`; empty without.
    """

    weights: Weights
    steps: tf.Tensor
    mean_gradient: Tensors
    initial_gradient: Tensors
    optimizer_state: OptimizerState
    examples: tf.Tensor
    loss: tf.Tensor | None
    errors: tuple[tf.Tensor, tf.Tensor] | None
    metrics: Metrics
    fresh_metrics: Metrics
    counts: Structure


Correction = Callable[[Tensors, Weights], Tensors]


def _same(context: Context) -> Correction:
    del context
    return lambda gradients, weights: gradients


def _fresh(optimizer_state: OptimizerState, context: Context) -> OptimizerState:
    del context
    return optimizer_state


def _optional_number(value: object) -> int | None:
    return None if value is None else checks.whole("num_clients", value, 1)


@attrs.frozen
class ClientMemory:
    """State that belongs to a client, as part of a rule's `Needs`.

    All are functions of TensorFlow operations. A client whose update is not finite, or that trained on
    nothing, keeps the state that it had.

    Attributes:
      initial_state: `(weights, optimizer state) -> state`, an `OrderedDict` of tensors or of flat
        sequences of them: what a client has that never took part.
      finish: `(context, trained) -> (state, sent)`: its state for the next round, and flat tensors for
        the rule, found under `sent` in `ClientUpdate`.
      correction: `context -> (gradients, weights) -> gradients`: called once, before training; what it
        returns is called in every step, before the optimizer.
      start: `(optimizer state, context) -> optimizer state`. Hyperparameters stay those of the process.
      mean_gradient: Whether `finish` looks at `mean_gradient`: an addition per step.
      initial_gradient: Whether it looks at `initial_gradient`: one more pass over the client's data.
      num_clients: How many clients the rule counts on; clients of a `ClientStates` for more or fewer
        refuse to train. None if the rule need not know.

    Example: a client that counts its rounds

      >>> memory = ClientMemory(
      ...     lambda weights, optimizer_state: OrderedDict(rounds=tf.constant(0)),
      ...     lambda context, done: (OrderedDict(rounds=context.state["rounds"] + 1), ()),
      ... )
      >>> memory.mean_gradient
      False
    """

    initial_state: Callable[[Weights, OptimizerState], State] = attrs.field(
        validator=checks.validated(checks.function, "(weights, optimizer_state)")
    )
    finish: Callable[[Context, Trained], tuple[State, Tensors]] = attrs.field(
        validator=checks.validated(checks.function, "(context, trained)")
    )
    correction: Callable[[Context], Correction] = attrs.field(
        default=_same, validator=checks.validated(checks.function, "(context)")
    )
    start: Callable[[OptimizerState, Context], OptimizerState] = attrs.field(
        default=_fresh, validator=checks.validated(checks.function, "(optimizer_state, context)")
    )
    mean_gradient: bool = attrs.field(default=False, validator=checks.validated(checks.flag))
    initial_gradient: bool = attrs.field(default=False, validator=checks.validated(checks.flag))
    num_clients: int | None = attrs.field(default=None, converter=_optional_number)


def correction(
    memory: ClientMemory | None, context: Context | None
) -> Callable[[Gradients, Weights], Gradients]:
    """What corrects gradients; None stays None, for a weight that the loss does not see."""
    if memory is None:
        return lambda gradients, weights: gradients
    given = with_autograph(with_autograph(memory.correction)(context))

    def correct(gradients: Gradients, weights: Weights) -> Gradients:
        dense = densify(gradients, weights)
        corrected = given(dense, [tf.convert_to_tensor(w) for w in weights])
        return tuple(
            None if before is None else after
            for before, after in zip(gradients, corrected, strict=True)
        )

    return correct


def densify(gradients: Gradients, weights: Weights) -> list[tf.Tensor]:
    """Gradients as tensors, zeros for None."""
    return [
        tf.zeros(w.shape, w.dtype) if g is None else tf.convert_to_tensor(g)
        for g, w in zip(gradients, weights, strict=True)
    ]


def signature(state: State) -> str:
    """A state's names, dtypes and shapes as one line, by which a file of another kind is known."""
    parts = [f"{name}:{x.dtype.name}{list(x.shape)}" for name, x in _named(state)]
    return " ".join(["client-state-1", *parts])


def _named(state: State) -> list[tuple[str, tf.Tensor]]:
    return [
        (f"{name}/{i}", tf.convert_to_tensor(tensor))
        for name, part in state.items()
        for i, tensor in enumerate(tf.nest.flatten(part))
    ]


def load(path: tf.Tensor, fresh: State) -> State:
    """Reads a state of this structure; the fresh one where the path is empty."""
    named, expected = _named(fresh), signature(fresh)

    def read() -> list[tf.Tensor]:
        name, found = tf.raw_ops.RestoreV2(
            prefix=path,
            tensor_names=["file", "signature"],
            shape_and_slices=["", ""],
            dtypes=[tf.string, tf.string],
        )
        message = ["The file of a client's state must be the one that was written as", path]
        known = asserted(tf.equal(name, _name(path)), [*message, "; found", name], path)
        message = [
            "The state of a client must be of this model and rule,",
            expected,
            "; found",
            found,
        ]
        tensors = tf.raw_ops.RestoreV2(
            prefix=asserted(tf.equal(found, expected), message, known),
            tensor_names=[name for name, _ in named],
            shape_and_slices=[""] * len(named),
            dtypes=[x.dtype for _, x in named],
        )
        return [tf.ensure_shape(x, y.shape) for x, (_, y) in zip(tensors, named, strict=True)]

    tensors = tf.cond(tf.equal(path, ""), lambda: [tf.identity(x) for _, x in named], read)
    return tf.nest.pack_sequence_as(fresh, tensors)


def save(path: tf.Tensor, state: State) -> tf.Operation:
    """Writes a state as one checkpoint of TensorFlow, which knows its own name."""
    names, tensors = zip(*_named(state), strict=True)
    return tf.raw_ops.SaveV2(
        prefix=path,
        tensor_names=["file", "signature", *names],
        shape_and_slices=[""] * (len(names) + 2),
        tensors=[_name(path), tf.constant(signature(state)), *tensors],
    )


def _name(path: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_replace(path, "(?s)^.*/", "")
