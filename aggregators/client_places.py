"""Where a client's state is, in the graph that trains the client: what `ClientStates` sends it."""

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from aggregators import client_memory
from aggregators.checks import only_if


def input_type(data_type: Any) -> Any:
    """TFF type of what a client that keeps a state takes: its data, and where its state is."""
    place = [("load", np.str_), ("save", np.str_), ("round", np.int32), ("number", np.int32)]
    return tff.to_type(OrderedDict(data=data_type, client=tff.to_type(OrderedDict(place))))


class Place(NamedTuple):
    """Where one client's state is, in the graph that trains it.

    Attributes:
      client: `load` and `save`, paths (`load` empty for a client without a state), `round`, how many
        rounds the states have seen, and `number`, the client's own.
      round: How many rounds the server has seen.
    """

    client: Any
    round: tf.Tensor

    def load(self, fresh: client_memory.State) -> client_memory.State:
        """The client's state, or this one if it has none."""
        ours, theirs = tf.cast(self.round, tf.int32), self.client["round"]
        message = [
            "`cohort` must be of client states of the server's round,",
            ours,
            "; found those of round",
            theirs,
            ". Go back with `ClientStates.restore(round)`, or load the other server state.",
        ]
        path = only_if(tf.equal(ours, theirs), message, self.client["load"])
        return client_memory.load(path, fresh)

    def save(self, state: client_memory.State) -> tf.Operation:
        """Writes the client's state for its next round."""
        return client_memory.save(self.client["save"], state)
