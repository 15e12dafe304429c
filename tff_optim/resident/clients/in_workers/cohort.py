"""The clients of a round in TFF's workers, where the server is somewhere else."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow_federated as tff

from tff_optim.resident.clients.in_workers import compiled
from tff_optim.resident.clients.in_workers.workers import Workers
from tff_optim.resident.in_worker import rounds
from tff_optim.resident.parts import RoundParts


class WorkerCohort:
    """Trains each worker's share of a cohort there, and merges what comes back.

    Args:
      parts: The round.
      workers: Where the clients are trained.
      clients_per_step: The largest number of clients that a worker runs at once, or None.
      merge: `<A, A> -> A` on the leaves of two aggregates, where the server is.
    """

    def __init__(
        self,
        parts: RoundParts,
        workers: Workers,
        clients_per_step: int | None,
        merge: Callable[[list[Any]], list[Any]],
    ):
        self._round = compiled.compile_round(parts)
        self._workers = workers
        self._at_once = clients_per_step or rounds.clients_at_once(self._round)
        self._merge = merge

    def add_up(self, context: list[Any], client_data: Sequence[Any]) -> list[Any]:
        """Returns the leaves of the aggregate of a cohort, given what the clients are sent."""
        sent = [tensor.numpy() for tensor in context]
        data = tff.tensorflow.transform_args(list(client_data))
        shares = compiled.split(data, len(self._workers))

        def attempt() -> list[list[Any]]:
            hosts = [self._workers.host(i) for i in range(len(shares))]
            return rounds.aggregates(self._round, sent, shares, hosts, self._at_once)

        # Nothing lives in the workers between two rounds: a lost one costs only time.
        total, *others = self._workers.run_round(attempt)
        for other in others:
            total = self._merge([*total, *other])
        return total
