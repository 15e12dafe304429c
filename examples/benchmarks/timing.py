"""Times contenders side by side in one run, so that a noisy machine is noisy for all of them."""

import statistics
import time
from collections.abc import Callable, Mapping


def time_side_by_side(
    contenders: Mapping[str, Callable[[], None]],
    *,
    rounds: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Returns the median seconds of each contender over rounds in which all take turns.

    Each round begins with another, so that none always comes after the same one, whose caches and
    garbage it finds.
    """
    for run in contenders.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            contenders[name]()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Formats rows as a table in Markdown with aligned columns."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )
