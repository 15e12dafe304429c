"""How the graph that trains a client reads and writes its state: by what `ClientStates` sends it."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core import client_memory
from aggregators.core.checks import asserted


def input_type(data_type: tff.Type) -> tff.Type:
    """TFF type of what a client that keeps a state takes: its data, and where its state is."""
    numbers = [(name, np.int32) for name in ("round", "number", "clients")]
    files = [("load", np.str_), ("save", np.str_), *numbers]
    return tff.to_type(OrderedDict(data=data_type, client=tff.to_type(OrderedDict(files))))


class ClientStateFiles(NamedTuple):
    """The files of one client's state, in the graph that trains it.

    Attributes:
      client: `load` and `save`, paths (`load` empty for a client without a state), `round`, how many
        rounds the states have seen, `number`, the client's own, and `clients`, how many there are.
      round: How many rounds the server has seen.
      num_clients: How many clients the rule was told that there are; None if it need not know.
    """

    client: Mapping[str, tf.Tensor]
    round: tf.Tensor
    num_clients: int | None

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
        return client_memory.load(path, fresh)

    def save(self, state: client_memory.State) -> tf.Operation:
        """Writes the client's state for its next round."""
        return client_memory.save(self.client["save"], state)
