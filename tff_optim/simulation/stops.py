"""When a run ends before its last round: functions for `stop` of `run`."""

from collections.abc import Callable

from tff_optim.simulation import cohorts
from tff_optim.simulation.history import Table


def no_better(name: str, rounds: int, *, larger_is_better: bool = False) -> Callable[[Table], bool]:
    """Ends a run whose metric has had no new best value for a number of rounds.

    Example:
      >>> stop = no_better("evaluation/loss", rounds=2)
      >>> losses = [0.5, 0.4, 0.45, 0.41]
      >>> records = [{"round": i, "evaluation/loss": loss} for i, loss in enumerate(losses)]
      >>> [stop(Table(records[:n])) for n in (1, 2, 3, 4)]
      [False, False, False, True]

    Args:
      name: Of the metric. Rounds without it, or where it is not finite, are no new best.
      rounds: How many rounds may pass.
      larger_is_better: As for an accuracy.

    Returns:
      A function for `stop` of `run`.
    """
    cohorts.check_whole("rounds", cohorts.whole(rounds), 1)
    sign = 1.0 if larger_is_better else -1.0

    def stop(table: Table) -> bool:
        values = [(record["round"], sign * record[name]) for record in table if name in record]
        if not values and len(table) > rounds:
            raise ValueError(
                f"`name` must be a metric of the run; found {name!r}, and there are {table.columns}."
            )
        finite = [(number, value) for number, value in values if abs(value) < float("inf")]
        first = table[0]["round"] if len(table) else 0
        best = max(finite, key=lambda pair: pair[1])[0] if finite else first
        return len(table) > 0 and table[-1]["round"] - best >= rounds

    return stop
