"""Reads and writes a client's state within its training graph, at the paths of `ClientStates`."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core.checks import asserted
from aggregators.core.types import State


def input_type(data_type: tff.Type) -> tff.Type:
    """TFF type of the input of a client with a state: its data, and the paths of its state."""
    files = [("load", np.str_), ("save", np.str_)]
    positions = [(name, np.int32) for name in ("round", "number", "clients")]
    client = tff.to_type(OrderedDict([*files, *positions]))
    return tff.to_type(OrderedDict(data=data_type, client=client))


class ClientStateFiles(NamedTuple):
    """The files of one client's state, within its training graph.

    Attributes:
      client: The paths `load` (empty for a client without a state) and `save`, `round` (how many rounds
        the states have seen), `number` (the client's own) and `clients` (how many there are).
      round: How many rounds the server has seen.
      num_clients: The number of clients that the rule was built for; None if it does not matter.
    """

    client: Mapping[str, tf.Tensor]
    round: tf.Tensor
    num_clients: int | None

    def load(self, fresh: State) -> State:
        """The client's state, or the fresh one if it has none."""
        ours, theirs = tf.cast(self.round, tf.int32), self.client["round"]
        message = [
            "`cohort` must come from client states of the server's round,",
            ours,
            "; found those of round",
            theirs,
            ". Go back with `ClientStates.restore(round)`, or load the other server state.",
        ]
        path = asserted(tf.equal(ours, theirs), message, self.client["load"])
        if self.num_clients is not None:
            there = self.client["clients"]
            message = [
                f"`num_clients` must be the number of clients that `ClientStates` is for; found "
                f"{self.num_clients}, and client states for",
                there,
                ". Build the process with that number.",
            ]
            path = asserted(tf.equal(there, self.num_clients), message, path)
        return load(path, fresh)

    def save(self, state: State) -> tf.Operation:
        """Writes the client's state for its next round."""
        return save(self.client["save"], state)


def signature(state: State) -> str:
    """A state's names, dtypes and shapes as one line, which tells its files from others."""
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
    """Writes a state as one TensorFlow checkpoint that contains its own name."""
    names, tensors = zip(*_named(state), strict=True)
    return tf.raw_ops.SaveV2(
        prefix=path,
        tensor_names=["file", "signature", *names],
        shape_and_slices=[""] * (len(names) + 2),
        tensors=[_name(path), tf.constant(signature(state)), *tensors],
    )


def _name(path: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_replace(path, "(?s)^.*/", "")
