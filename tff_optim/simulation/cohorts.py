"""Who takes part in a round, and the data of those clients."""

import numbers
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import tensorflow_federated as tff

from tff_optim.core.messages import shown
from tff_optim.resident.client_data import ClientData, data_of_client
from tff_optim.simulation import client_fingerprints


def clients_by_id(clients: Any) -> tuple[list[Hashable], Callable[[Hashable], Any]]:
    """The ids of clients, and the data of one of them.

    Raises:
      TypeError: `clients` is not one of the three forms.
      ValueError: There is no client.
    """
    get: Any
    if isinstance(clients, tff.simulation.datasets.ClientData):
        ids, get = list(clients.client_ids), clients.create_tf_dataset_for_client
    elif isinstance(clients, Mapping):
        ids, get = list(clients), clients.__getitem__
    elif isinstance(clients, list | tuple):
        ids, get = list(range(len(clients))), clients.__getitem__
    else:
        raise TypeError(
            "`clients` must be a mapping from ids to data, a list of data, a "
            "`tff.simulation.datasets.ClientData`, or a function from a seed to one of these; found "
            f"{shown(clients)}."
        )
    if not ids:
        raise ValueError("`clients` must hold at least one client; found none.")
    return ids, get


class Cohorts:
    """Draws the clients of a round by its number alone, so that a resumed run draws the same.

    Args:
      clients: See `clients_by_id`.
      size: How many take part in a round.
      seed: Of `tff.simulation.build_uniform_sampling_fn`.
      data_type: What the process takes of one client.

    Attributes:
      ids: Of all clients.
      keeps_states: Whether clients keep a state, whose place is handed over with their data.
    """

    def __init__(self, clients: Any, size: int, seed: int, data_type: tff.Type):
        self.ids, self._get = clients_by_id(clients)
        self._size = size
        self._sample = tff.simulation.build_uniform_sampling_fn(
            range(len(self.ids)), random_seed=seed
        )
        of_client, self.keeps_states = data_of_client(data_type)
        self._taken = ClientData(of_client)

    def draw(self, round_number: int) -> list[Hashable]:
        """The ids of a round's clients."""
        return [self.ids[i] for i in self._sample(round_number, self._size)]

    def fingerprints(self) -> dict[str, str]:
        """What the data of clients, of 100 where there are more, begin with; see `of_data`."""
        some = client_fingerprints.chosen(self.ids)
        return {str(client): client_fingerprints.of_data(self._get(client)) for client in some}

    def data(self, round_number: int) -> list[Any]:
        """The data of a round's clients, as the process takes them."""
        return [self._taken(self._get(client), client) for client in self.draw(round_number)]


def check_size(clients_per_round: Any, clients: int) -> None:
    """Raises `ValueError` unless so many clients can be drawn."""
    check_whole("clients_per_round", clients_per_round, 1)
    if clients_per_round > clients:
        raise ValueError(
            f"`clients_per_round` must be at most the number of clients, {clients}; found "
            f"{clients_per_round}."
        )


def whole(value: Any) -> Any:
    """A whole number as Python's, NumPy's too; anything else as it is."""
    is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if is_number else value


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises `ValueError` unless this is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"`{name}` must be a whole number of at least {least}; found {shown(value)}."
        )
