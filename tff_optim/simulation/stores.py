"""Stores of clients' states, opened at the round of a run."""

import contextlib
import os
from collections.abc import Iterator, Sequence

from tff_optim.core.types import ClientId, Function, Value

FOLDER = "client_states"


@contextlib.contextmanager
def opened(
    factory: Function, ids: Sequence[ClientId], folder: str | None, keep: int, done: int
) -> Iterator[Value]:
    """Opens a run's store, and restores the round of the server's state.

    Args:
      factory: A function such as `aggregators.ClientStates`.
      ids: The ids of all clients.
      folder: The folder of the run; None for a store in memory.
      keep: The number of rounds between two checkpoints.
      done: The round of the server's state.

    Raises:
      ValueError: If the store does not have the states of that round.
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
