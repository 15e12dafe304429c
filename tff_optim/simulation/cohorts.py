"""The clients of a round, and their data."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeAlias

import attrs
import numpy as np
import tensorflow_federated as tff

from tff_optim.core.checks import check_number, check_whole, whole
from tff_optim.core.messages import shown
from tff_optim.core.numbers import Interval
from tff_optim.core.types import ClientDataset, ClientId, Value
from tff_optim.resident.client_data import ClientData, data_of_client
from tff_optim.simulation import client_fingerprints
from tff_optim.simulation.client_arrays import ClientArrays

Draw: TypeAlias = Callable[[int, Sequence[Hashable], np.random.Generator], Sequence[Hashable]]

_RATE = Interval("a number in (0, 1]", 0.0, 1.0, open_lower=True)


def clients_by_id(clients: Value) -> tuple[list[Hashable], Callable[[ClientId], ClientDataset]]:
    """The ids of clients, and a function from an id to its data.

    Raises:
      TypeError: If `clients` has none of the four forms.
      ValueError: If there is no client.
    """
    get: Value
    if isinstance(clients, ClientArrays):
        ids, get = clients.ids, clients.data_set
    elif isinstance(clients, tff.simulation.datasets.ClientData):
        ids, get = list(clients.client_ids), clients.create_tf_dataset_for_client
    elif isinstance(clients, Mapping):
        ids, get = list(clients), clients.__getitem__
    elif isinstance(clients, list | tuple):
        ids, get = list(range(len(clients))), clients.__getitem__
    else:
        raise TypeError(
            "`clients` must be a mapping from ids to data, a list of data, a `ClientArrays`, a "
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
      size: The number of clients in a round, or a function of the round's number; None with `draw`.
      draw: See `run`; None for `tff.simulation.build_uniform_sampling_fn`.
      seed: The seed of the draws.
      data_type: The type of one client's data in the process.

    Attributes:
      ids: The ids of all clients.
      varies: Whether rounds may differ in their number of clients.
      keeps_states: Whether clients keep a state, whose paths come with their data.
    """

    def __init__(
        self, clients: Value, size: Value, draw: Draw | None, seed: int, data_type: tff.Type
    ):
        self.ids, self._get = clients_by_id(clients)
        self._size, self._draw, self._seed = size, draw, seed
        self.varies = draw is not None or callable(size)
        self._sample = tff.simulation.build_uniform_sampling_fn(
            range(len(self.ids)), random_seed=seed
        )
        of_client, self.keeps_states = data_of_client(data_type)
        self._taken = ClientData(of_client)
        self._arrays = clients if isinstance(clients, ClientArrays) else None
        if self._arrays is not None:
            self._taken.check_arrays(self._arrays.element_spec, self.ids[0])

    def draw(self, round_number: int) -> list[Hashable]:
        """The ids of a round's clients."""
        if self._draw is not None:
            rng = np.random.default_rng([self._seed, round_number])
            found = self._draw(round_number, list(self.ids), rng)
            return _as_drawn(found, self.ids, round_number)
        size = self._size
        if callable(size):
            size = whole(size(round_number))
            check_size(size, len(self.ids))
        return [self.ids[i] for i in self._sample(round_number, size)]

    def of_client(self, client: Hashable) -> ClientDataset:
        """The original data of a client."""
        return self._get(client)

    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of clients' data, of at most 100; see `of_data`."""
        some = client_fingerprints.chosen(self.ids)
        if self._arrays is not None:
            return {str(client): self._arrays.fingerprint(client) for client in some}
        return {str(client): client_fingerprints.of_data(self._get(client)) for client in some}

    def data(self, drawn: Sequence[Hashable], round_number: int) -> list[ClientDataset]:
        """The data of some clients in a round, for the process."""
        if self._arrays is not None:
            return self._arrays.cohort(drawn, round_number)
        return [self._taken(self._get(client), client) for client in drawn]


@attrs.frozen
class _Poisson:
    """The function that `poisson` returns."""

    rate: float

    def __attrs_post_init__(self) -> None:
        check_number("rate", self.rate, _RATE)

    def __call__(
        self, number: int, ids: Sequence[Hashable], rng: np.random.Generator
    ) -> list[Hashable]:
        """The clients of one round, in the order of the ids."""
        del number  # all rounds are drawn in the same way
        return [one for one, hit in zip(ids, rng.random(len(ids)) < self.rate) if hit]


def poisson(rate: float) -> Draw:
    """Draws each client with probability `rate`, independently of all others, for `draw` of `run`.

    This is the sampling that `aggregators.privacy.epsilon` accounts for. A cohort has `rate` times
    the number of clients on average. It may be empty: the round counts, and the model stays. Under
    differential privacy such a round adds no noise, which an observer notices, so the probability of an
    empty cohort, `(1 - rate) ** clients`, must be far below `delta`.

    Example:
      >>> draw = poisson(0.5)
      >>> ids = ["ann", "bob", "eve", "zoe"]
      >>> [draw(number, ids, np.random.default_rng([0, number])) for number in (1, 2, 3)]
      [[], ['ann', 'bob', 'zoe'], ['eve', 'zoe']]

    Args:
      rate: Above 0, at most 1.

    Raises:
      ValueError: If it is out of range.
    """
    return _Poisson(rate)


def _as_drawn(found: Value, ids: Sequence[Hashable], number: int) -> list[Hashable]:
    """The result of `draw`, checked, as ids of the run."""
    if isinstance(found, str) or not isinstance(found, Sequence | np.ndarray):
        raise TypeError(f"`draw` must return a list of ids of clients; found {shown(found)}.")
    known = {one: one for one in ids}
    odd = [one for one in found if not isinstance(one, Hashable) or one not in known]
    if odd or len(set(found)) < len(found):
        raise ValueError(
            "`draw` must return ids of clients, each once; found "
            f"{shown(odd[:3] if odd else list(found))} for round {number}."
        )
    return [known[one] for one in found]


def check_size(clients_per_round: Value, clients: int) -> None:
    """Raises `ValueError` unless a round can have this many clients."""
    check_whole("clients_per_round", clients_per_round, 1)
    if clients_per_round > clients:
        raise ValueError(
            f"`clients_per_round` must be at most the number of clients, {clients}; found "
            f"{clients_per_round}."
        )
