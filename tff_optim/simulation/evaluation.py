"""Evaluates the model after a round, by the caller's function and on single clients."""

from collections.abc import Callable, Hashable, Mapping, Sequence

import tensorflow_federated as tff

from tff_optim.core.messages import shown
from tff_optim.core.types import ClientDataset, ClientId, Record, Weights
from tff_optim.simulation import calls, metrics, per_client, same_run
from tff_optim.simulation.arguments import Plan
from tff_optim.simulation.cohorts import Cohorts, clients_by_id

COLUMN = tff.simulation.EVALUATION_METRICS_PREFIX
_CLIENTS = "clients/"


class Evaluation:
    """The evaluation of one run; true if there is any.

    Args:
      plan: The arguments that all runs share.
      cohorts: The run's clients.
      process: The name of its process.
      seed: Its seed.

    Attributes:
      ids: The ids of held-out clients.
    """

    def __init__(self, plan: Plan, cohorts: Cohorts, process: str, seed: int):
        self._plan, self._run = plan, {"process": process, "seed": seed}
        self._of_client: Callable[[ClientId], ClientDataset] = cohorts.of_client
        self.ids: list[Hashable] = []
        given = plan.per_client
        if given is not None:
            with plan.lock:
                self._per_client = given.function()
                if given.clients is not None:
                    clients = given.clients(seed) if callable(given.clients) else given.clients
                    self.ids, self._of_client = clients_by_id(clients)

    def __bool__(self) -> bool:
        return self._plan.evaluate is not None or self._plan.per_client is not None

    def described(self) -> Record:
        """The parts that must not change between runs; see `same_run`."""
        plan, given = self._plan, self._plan.per_client
        found: Record = {
            "evaluate": same_run.of_function(plan.evaluate),
            "rounds_per_evaluation": plan.rounds_per_evaluation if self else None,
        }
        if given is not None:
            found["per_client"] = same_run.of_function(given.evaluate)
            if self.ids:
                found["per_client_ids"] = same_run.of_ids(self.ids)
        return found

    def __call__(
        self, weights: Weights, number: int, cohort: Sequence[Hashable]
    ) -> tuple[Record, dict[Hashable, Record]]:
        """Evaluates a model.

        Args:
          weights: The model weights.
          number: The round.
          cohort: The clients of the round.

        Returns:
          Numbers by name, and the columns of single clients by id.
        """
        with self._plan.lock:
            found = self._central(weights, number)
            if self._plan.per_client is None:
                return found, {}
            rows = {one: self._on(one, weights, number) for one in self.ids or cohort}
        sums = per_client.summary(list(rows.values()))
        metrics.check_names(found, "evaluate", (_CLIENTS,))
        found |= {_CLIENTS + name: value for name, value in sums.items()}
        return found, {
            one: {COLUMN + name: value for name, value in row.items()} for one, row in rows.items()
        }

    def _central(self, weights: Weights, number: int) -> Record:
        if self._plan.evaluate is None:
            return {}
        found = calls.call(self._plan.evaluate, weights, round=number, **self._run)
        if not isinstance(found, Mapping):
            raise TypeError(
                f"`evaluate` must return a mapping from names to numbers; found {shown(found)}."
            )
        flat = metrics.flatten(found)
        metrics.check_names(flat, "evaluate", (tff.simulation.EVALUATION_TIME_KEY,))
        for name, value in flat.items():
            if not isinstance(value, int | float | str):
                raise TypeError(
                    f"`evaluate` must return a mapping from names to numbers; found {shown(value)} "
                    f"at {name!r}."
                )
        return flat

    def _on(self, client: Hashable, weights: Weights, number: int) -> Record:
        found = calls.call(
            self._per_client,
            *(weights, self._of_client(client)),
            client=client,
            round=number,
            **self._run,
        )
        return per_client.numbers_of(found, client)
