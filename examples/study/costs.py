"""What a round of each rule costs: processor seconds, in turn in one process.

python examples/study/costs.py     writes costs.csv

Two cohorts of the same model, 64-32-10, clients trained one by one: ten clients of digits, and task A
of the benchmarks, 100 clients of ten batches of 20.
"""

import csv
import statistics
import time
from collections.abc import Callable
from typing import Any

import bad_clients
import numpy as np
import results
import run
import tasks
import tensorflow_federated as tff

import tff_optim
from tff_optim.simulation import ClientArrays

COLUMNS = ("rule", "cohort", "cpu_seconds")
TURNS = 7


def cohorts() -> dict[str, Callable[[int], Any]]:
    """The clients of a round, by its number."""
    digits = bad_clients.make_clients(tasks.load("digits"), 20, 0.5, "none", 9000)
    rng = np.random.default_rng(0)
    flags = np.tile(np.float32([1.0, 0.0, 0.0, 0.0, 0.0]), (200, 1))
    made = [
        {
            "x": np.concatenate([rng.random((200, 64), np.float32), flags], 1),
            "y": rng.integers(0, 10, 200).astype(np.int32),
        }
        for _ in range(100)
    ]
    few = ClientArrays(digits.arrays, batch_size=tasks.BATCH)
    many = ClientArrays(made, batch_size=20)
    return {
        "digits": lambda number: few.cohort(list(range(10)), number),
        "task A": lambda number: many.cohort(list(range(100)), number),
    }


def rounds_of(
    process: tff_optim.ResidentProcess, cohort: Callable[[int], Any]
) -> Callable[[int], float]:
    """A function that runs the next round, and says its processor seconds."""
    state = [process.initialize()]

    def turn(number: int) -> float:
        clients = cohort(number)
        start = time.process_time()
        state[0] = process.next(state[0], clients).state
        return time.process_time() - start

    return turn


def main() -> None:
    """Measures and writes."""
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        processes = {
            name: run.build_process("digits", "sgd", name, vectorize=False) for name in run.RULES
        }
        rows = []
        for cohort, clients in cohorts().items():
            turns = {name: rounds_of(process, clients) for name, process in processes.items()}
            seconds: dict[str, list[float]] = {name: [] for name in turns}
            for number in range(TURNS + 1):
                for name, turn in turns.items():
                    spent = turn(number)
                    if number:  # the first one prepares its graphs
                        seconds[name].append(spent)
            for name, spent_in_all in seconds.items():
                rows.append((name, cohort, f"{statistics.median(spent_in_all):.4f}"))
    finally:
        tff.test.set_no_default_context()
    with results.COSTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
