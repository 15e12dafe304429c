"""Functions that end a run before its last round, for `stop` of `run`."""

import math
from collections.abc import Callable, Mapping

import attrs

from tff_optim.core.checks import check_number, check_whole, whole
from tff_optim.core.types import Json
from tff_optim.simulation.goals import Goal, goal
from tff_optim.simulation.history import Table


@attrs.frozen
class _Stop:
    """A function for `stop` of `run`, and the metric that it needs."""

    goal: Goal
    function: Callable[[Table], bool]

    def __call__(self, rounds: Table) -> bool:
        return self.function(rounds)


def no_better(metric: str, rounds: int) -> Callable[[Table], bool]:
    """Ends a run whose metric has had no new best value for a number of rounds.

    Example:
      >>> stop = no_better("evaluation/loss", rounds=2)
      >>> losses = [0.5, 0.4, 0.45, 0.41]
      >>> records = [{"round": i, "evaluation/loss": loss} for i, loss in enumerate(losses)]
      >>> [stop(Table(records[:n])) for n in (1, 2, 3, 4)]
      [False, False, False, True]

    Args:
      metric: `"max NAME"` or `"min NAME"`, or the name of an accuracy or a loss. Rounds in which it is
        missing or not finite are no new best.
      rounds: How many rounds may pass without a new best.

    Returns:
      A function for `stop` of `run`.
    """
    wanted = goal("metric", metric)
    check_whole("rounds", whole(rounds), 1)

    def stop(table: Table) -> bool:
        if not len(table):
            return False
        best, *_ = table.running(newer, (table[0]["round"], False, -math.inf))
        return bool(table[-1]["round"] - best >= rounds)

    def newer(
        so_far: tuple[int, bool, float], record: Mapping[str, Json]
    ) -> tuple[int, bool, float]:
        best, seen, value = so_far
        if not seen:
            wanted.check("metric", record)
        seen, now = seen or wanted.name in record, wanted.value(record)
        return (record["round"], seen, now) if now > value else (best, seen, value)

    return _Stop(wanted, stop)


def reached(metric: str, value: float) -> Callable[[Table], bool]:
    """Ends a run as soon as a metric reaches a target.

    Example:
      >>> stop = reached("evaluation/accuracy", 0.9)
      >>> [stop(Table([{"round": 1, "evaluation/accuracy": a}])) for a in (0.89, 0.9)]
      [False, True]

    Args:
      metric: `"max NAME"` or `"min NAME"`, or the name of an accuracy or a loss.
      value: The target.

    Returns:
      A function for `stop` of `run`.
    """
    wanted = goal("metric", metric)
    check_number("value", value)

    def stop(table: Table) -> bool:
        table.running(seen, False)
        return len(table) > 0 and wanted.value(table[-1]) >= wanted.sign * value

    def seen(so_far: bool, record: Mapping[str, Json]) -> bool:
        if not so_far:
            wanted.check("metric", record)
        return so_far or wanted.name in record

    return _Stop(wanted, stop)
