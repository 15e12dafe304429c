"""Evaluation on single clients, and numbers that summarise it."""

import math
from collections.abc import Callable, Mapping, Sequence

import attrs
import numpy as np

from tff_optim.core.messages import shown
from tff_optim.core.types import (
    ClientDataset,
    ClientId,
    Function,
    Json,
    Metrics,
    Process,
    Record,
    Value,
    Weights,
)
from tff_optim.resident.client_data import ClientData
from tff_optim.simulation import calls, cohorts, metrics

OFFERED = ("client", "round", "process", "seed")


def _evaluate(per_client: Value, attribute: attrs.Attribute, value: Value) -> None:
    del per_client
    if not _is_process(value):
        calls.check(attribute.name, value, ["weights", "data"], OFFERED, optional=False)


def _clients(per_client: Value, attribute: attrs.Attribute, value: Value) -> None:
    del per_client, attribute
    if value is not None and not callable(value):
        cohorts.clients_by_id(value)  # raises


@attrs.frozen
class PerClient:
    """An evaluation of the model on single clients, for `per_client` of `run`.

    Its numbers are columns `evaluation/NAME` of `History.clients`. `History.rounds` summarises each
    number over clients, which all count alike, as `evaluation/clients/NAME/...`: `mean`;
    `lowest_decile` and `highest_decile`, the means over the tenth of clients (at least one) with the
    lowest and highest numbers; and `spread`, the standard deviation. The worst decile of an accuracy is
    the lowest, that of a loss the highest.

    Example:
      >>> def error(weights, data):
      ...     return {"error": float(abs(weights - data))}
      >>> PerClient(error, {"ann": 1.0, "bob": 3.0}).clients
      {'ann': 1.0, 'bob': 3.0}

    Attributes:
      evaluate: A function of the model weights and the data of one client that returns numbers by
        name; it may also have parameters named `client` (the id), `round`, `process` and `seed`. Or
        the result of `tff.learning.algorithms.build_fed_eval`, which is called for one client at a
        time.
      clients: The clients to evaluate on, as for `run`, such as the same ids with held-out data, or
        other clients. A column `drawn` then says who took part in the round. None for the round's
        clients and their training data.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If there is no client.
    """

    evaluate: Value = attrs.field(validator=_evaluate)
    clients: Value = attrs.field(default=None, validator=_clients)

    def function(self) -> Function:
        """The function of weights and data that `calls.call` calls."""
        return _by_process(self.evaluate) if _is_process(self.evaluate) else self.evaluate


def _is_process(value: Value) -> bool:
    return hasattr(value, "next") and hasattr(value, "set_model_weights")


def _by_process(process: Process) -> Callable[[Weights, ClientDataset, ClientId], Metrics]:
    """An evaluation process of TFF as a function."""
    initial = process.initialize()
    wrapped = getattr(process, "process", process)
    taken = ClientData(wrapped.next.type_signature.parameter[1].member)

    def evaluate(weights: Weights, data: ClientDataset, client: ClientId) -> Metrics:
        state = process.set_model_weights(initial, weights)
        found = process.next(state, [taken(data, client)]).metrics
        try:
            return found["client_work"]["eval"]["current_round_metrics"]
        except (KeyError, TypeError):
            raise ValueError(
                "`evaluate` must be a function, or a process of `tff.learning.algorithms."
                f"build_fed_eval`; found a process that shows {shown(found)}."
            ) from None

    return evaluate


def summary(rows: Sequence[Mapping[str, Json]]) -> dict[str, float]:
    """Mean, deciles and spread over clients of each number.

    Example:
      >>> summary([{"accuracy": i / 20} for i in range(20)])["accuracy/lowest_decile"]
      0.025
    """
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = np.sort([float(row[name]) for row in rows if name in row])  # nan comes last
        tenth = math.ceil(len(values) / 10)
        whole = bool(np.all(np.isfinite(values)))
        found[f"{name}/mean"] = float(np.mean(values))
        found[f"{name}/lowest_decile"] = float(np.mean(values[:tenth])) if whole else math.nan
        found[f"{name}/highest_decile"] = float(np.mean(values[-tenth:])) if whole else math.nan
        found[f"{name}/spread"] = float(np.std(values)) if whole else math.nan
    return found


def numbers_of(found: Value, client: ClientId) -> Record:
    """The checked result of an evaluation on a client."""
    if not isinstance(found, Mapping):
        raise TypeError(
            "`per_client` must return a mapping from names to numbers; found "
            f"{shown(found)} for client {client!r}."
        )
    flat = metrics.flatten(found)
    if not flat:
        raise ValueError(
            "`per_client` must return at least one number; found none for client "
            f"{client!r}. A functional model shows none unless it has a `metrics_constructor`."
        )
    for name, value in flat.items():
        if not isinstance(value, int | float):
            raise TypeError(
                f"`per_client` must return a mapping from names to numbers; found {shown(value)} at "
                f"{name!r} for client {client!r}."
            )
    return flat
