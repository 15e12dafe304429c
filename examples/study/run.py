"""Runs the study of rules that are safe to use: rows of a CSV, one for each run, which it goes on from.

python examples/study/run.py            all of the plan
python examples/study/run.py --quick    a first look: two settings, two seeds
python examples/study/report.py         tables and pictures of what is there
"""

import argparse
import csv
import itertools
import os
import pathlib
import time
from collections import OrderedDict
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tasks
import tensorflow_federated as tff
import tqdm

import aggregators
import tff_optim
from aggregators import rules, scores, weighting

HERE = pathlib.Path(__file__).parent
ROUNDS = 50
PER_ROUND = 10
CLIENT_RATE = 0.3
SERVER_ADAM_RATE = 0.03
SEEDS = (1000, 1001, 1002, 1003, 1004)
SPLITS = (0.05, 0.5, 0.1, 5.0)
COLUMNS = (
    "task",
    "server",
    "concentration",
    "corruption",
    "seed",
    "rule",
    "late_accuracy",
    "seconds",
    "tff",
    "accuracies",
)

JURY = [("loss", weighting.softmax()), (scores.kl_divergence, weighting.softmax())]
# All defaults of the package, fixed before the first run.
RULES: dict[str, Any] = {
    "FedAvg": rules.plain_mean,
    "redescending": rules.redescending_mean,
    "jury": rules.jury_mean,
    "jury, direction": lambda: rules.jury_mean(votes="direction"),
    "jury, three voices": lambda: rules.jury_mean(JURY, layers="tensor"),
    "KL near": lambda: rules.adaptive_mean(scores.kl_divergence, weighting.softmax()),
    "loss near": lambda: rules.adaptive_mean("loss", weighting.softmax()),
    "TFF robust": None,
}


class Cell(NamedTuple):
    """One setting with one seed: every rule is run in it."""

    task: str
    server: str
    concentration: float
    corruption: str
    seed: int


def plan() -> list[Cell]:
    """All cells, those that tell most first, so that a part of the plan is a study too."""
    first, kinds = SEEDS[:3], ("none", "random labels", "times -10")
    cells: dict[Cell, None] = {}
    for server, seeds, splits, corruptions in (
        ("sgd", first, SPLITS[:2], kinds),
        ("sgd", first, SPLITS[:2], tasks.CORRUPTIONS),
        ("sgd", first, SPLITS, tasks.CORRUPTIONS),
        ("sgd", SEEDS, SPLITS, tasks.CORRUPTIONS),
        ("adam", SEEDS, SPLITS[:2], tasks.CORRUPTIONS),
    ):
        for seed, kind, split, task in itertools.product(
            seeds, corruptions, splits, ("digits", "topics")
        ):
            cells[Cell(task, server, split, kind, seed)] = None
    return list(cells)


def quick_plan() -> list[Cell]:
    """Four cells of two seeds each."""
    product = itertools.product(SEEDS[:2], SPLITS[:2], ("none", "random labels"))
    return [Cell("digits", "sgd", split, kind, seed) for seed, split, kind in product]


def build_process(task: str, server: str, rule: str) -> tff_optim.ResidentProcess:
    """One process for a task, a server's optimizer and a rule, run where its rounds are fastest."""
    return tff_optim.ResidentProcess(_plain_process(task, server, rule), device="CPU:0")


def _plain_process(task: str, server: str, rule: str) -> tff.learning.templates.LearningProcess:
    model = tasks.make_model(tasks.load(task))
    client = tasks.FlaggedSGD(CLIENT_RATE)
    if server == "adam":
        optimizer = tff.learning.optimizers.build_adam(SERVER_ADAM_RATE)
    else:
        optimizer = tff.learning.optimizers.build_sgdm(1.0)
    if RULES[rule] is None:
        return tff.learning.algorithms.build_weighted_fed_avg(
            model,
            client,
            optimizer,
            model_aggregator=tff.learning.robust_aggregator(),
            loop_implementation=tff.learning.LoopImplementation.DATASET_ITERATOR,
        )
    return aggregators.build_fed_avg(model, client, optimizer, rule=RULES[rule]())


def run(process: tff_optim.ResidentProcess, cell: Cell, clients: Any) -> list[float]:
    """The test accuracy after every round. Every rule sees the same start and the same cohorts."""
    task = tasks.load(cell.task)
    rng = np.random.default_rng(2_000_000 + cell.seed)
    weights = tff.learning.models.ModelWeights(tuple(tasks.initial_weights(task, cell.seed)), ())
    state = process.set_model_weights(process.initialize(), weights)
    found = []
    for _ in range(ROUNDS):
        cohort = rng.choice(tasks.CLIENTS, PER_ROUND, replace=False)
        state = process.next(state, [clients[k] for k in cohort]).state
        found.append(tasks.accuracy(task, process.get_model_weights(state).trainable))
    return found


def done_before(path: pathlib.Path) -> set[tuple[str, ...]]:
    """The runs that a CSV holds. A last line that was cut off by a kill is taken out."""
    if not path.exists():
        return set()
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return {tuple(row[name] for name in COLUMNS[:6]) for row in csv.DictReader(whole.splitlines())}


def main() -> None:
    """Runs what is not in the CSV yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a first look")
    parser.add_argument("--output", type=pathlib.Path, help="the CSV")
    parser.add_argument("--minutes", type=float, default=np.inf, help="no run starts after these")
    options = parser.parse_args()
    path = options.output or HERE / ("quick.csv" if options.quick else "results.csv")
    done, began = done_before(path), time.monotonic()
    cells = quick_plan() if options.quick else plan()
    todo = [
        (cell, rule)
        for cell in cells
        for rule in RULES
        if (*(str(x) for x in cell), rule) not in done
    ]
    tff.backends.native.set_sync_local_cpp_execution_context()
    processes: dict[tuple[str, str, str], Any] = {}
    data: tuple[Any, Any] = (None, None)
    try:
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            for cell, rule in tqdm.tqdm(todo, unit="run"):
                if time.monotonic() - began > 60.0 * options.minutes:
                    break
                if data[0] != cell:
                    task = tasks.load(cell.task)
                    made = tasks.make_clients(task, cell.concentration, cell.corruption, cell.seed)
                    data = cell, made
                key = (cell.task, cell.server, rule)
                if key not in processes:
                    processes[key] = build_process(*key)
                start = time.monotonic()
                found = run(processes[key], cell, data[1])
                row = OrderedDict(cell._asdict(), rule=rule)
                row.update(
                    late_accuracy=f"{np.mean(found[-10:]):.5f}",
                    seconds=f"{time.monotonic() - start:.1f}",
                    tff=tff.__version__,
                    accuracies=" ".join(f"{accuracy:.4f}" for accuracy in found),
                )
                writer.writerow(row)
                file.flush()
    finally:
        tff.test.set_no_default_context()  # ends the worker


if __name__ == "__main__":
    main()
