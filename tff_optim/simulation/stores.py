"""Stores of clients' states in a run: opened for it, at its round, handed out by client id."""

import contextlib
import os
from collections.abc import Iterator, Sequence

from tff_optim.core.types import ClientId, Function, Value

FOLDER = "client_states"


@contextlib.contextmanager
def opened(
    factory: Function, ids: Sequence[ClientId], folder: str | None, keep: int, done: int
) -> Iterator[Value]:
    """A run's store, brought to the round of the server's state.

    Args:
      factory: Such as `aggregators.ClientStates`.
      ids: Of all clients.
      folder: The run's; None for a store in memory.
      keep: How many rounds lie between two checkpoints.
      done: The round of the server's state.

    Raises:
      ValueError: The store does not reach back, or up, to that round.
    """
    path = None if folder is None else os.path.join(folder, FOLDER)
    store = factory([str(client) for client in ids], path, keep=keep)
    try:
        if store.round != done:
            try:
                store.restore(done)
            except ValueError as error:
                raise ValueError(
                    f"`directory` must hold clients' states of round {done}, which the server's state "
                    f"has; found those of round {store.round} in {path}, kept for {keep} rounds "
                    f"({error}). Take another directory."
                ) from error
        yield store
    finally:
        store.close()
