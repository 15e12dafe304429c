"""Runs the study of rules that are safe to use: rows of a CSV, one for each run, which it goes on from.

python examples/study/run.py               all of the plan
python examples/study/run.py --part 1/2    every other setting, beside another process with --part 2/2
python examples/study/run.py --quick       a first look: four settings, two seeds
python examples/study/run.py --tune        the runs that the client rates below were chosen by
python examples/study/report.py            tables and pictures of what is there
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
CLIENT_RATE = 0.3  # of FedAvg and of the rules of ours
SERVER_ADAM_RATE = 0.03
SEEDS = (1000, 1001, 1002, 1003, 1004)
TUNING_SEEDS = (2000, 2001)
TUNING_RATES = (0.1, 0.3, 1.0)
SPLITS = (0.05, 0.5, 0.1, 5.0)
COLUMNS = (
    "task",
    "server",
    "concentration",
    "corruption",
    "seed",
    "rule",
    "client_rate",
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
TUNED = ("KL near", "loss near", "TFF robust")
# Client rates other than CLIENT_RATE at which these rules did best in tuning.csv.
RATES = {
    ("topics", "sgd", "KL near"): 1.0,
    ("topics", "adam", "KL near"): 1.0,
    ("topics", "sgd", "loss near"): 1.0,
    ("topics", "adam", "loss near"): 0.1,
    ("topics", "adam", "TFF robust"): 0.1,
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


def tuning_plan() -> list[Cell]:
    """The settings in which client rates are compared, with seeds that the study does not use."""
    product = itertools.product(
        ("digits", "topics"), ("sgd", "adam"), SPLITS[:2], ("none", "random labels"), TUNING_SEEDS
    )
    return [Cell(*names) for names in product]


def build_process(
    task: str, server: str, rule: str, client_rate: float = CLIENT_RATE
) -> tff_optim.ResidentProcess:
    """One process for a task, a server's optimizer and a rule, run where its rounds are fastest."""
    plain = _plain_process(task, server, rule, client_rate)
    return tff_optim.ResidentProcess(plain, device="CPU:0", clients_at_once=PER_ROUND)


def _plain_process(
    task: str, server: str, rule: str, client_rate: float
) -> tff.learning.templates.LearningProcess:
    model = tasks.make_model(tasks.load(task))
    client = tasks.FlaggedSGD(client_rate)
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
    return {tuple(row[name] for name in COLUMNS[:7]) for row in csv.DictReader(whole.splitlines())}


def planned(options: argparse.Namespace) -> list[tuple[Cell, str, float]]:
    """The runs that were asked for: a setting, a rule and the clients' learning rate."""
    if options.tune:
        rules_and_rates = list(itertools.product(("FedAvg", *TUNED), TUNING_RATES))
        return [(cell, *pair) for cell in tuning_plan() for pair in rules_and_rates]
    cells = quick_plan() if options.quick else plan()
    return [
        (cell, rule, RATES.get((cell.task, cell.server, rule), CLIENT_RATE))
        for cell in cells
        for rule in RULES
    ]


def part_of(text: str) -> tuple[int, int]:
    """Reads `1/2`."""
    part, parts = (int(x) for x in text.split("/"))
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"a part must be 1/n to n/n; found {text}")
    return part, parts


def main() -> None:
    """Runs what is not in the CSV yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a first look")
    which.add_argument("--tune", action="store_true", help="client rates, on other seeds")
    parser.add_argument("--part", type=part_of, default=(1, 1), help="1/2: every other setting")
    parser.add_argument("--output", type=pathlib.Path, help="the CSV")
    parser.add_argument("--minutes", type=float, default=np.inf, help="no run starts after these")
    options = parser.parse_args()
    name = "quick.csv" if options.quick else "tuning.csv" if options.tune else "results.csv"
    path = options.output or HERE / name
    done, began = done_before(path), time.monotonic()
    part, parts = options.part
    runs = planned(options)
    mine = set(list(dict.fromkeys(cell for cell, _, _ in runs))[part - 1 :: parts])
    todo = [
        (cell, rule, rate)
        for cell, rule, rate in runs
        if cell in mine and (*(str(x) for x in cell), rule, str(rate)) not in done
    ]
    tff.backends.native.set_sync_local_cpp_execution_context()
    processes: dict[tuple[str, str, str, float], Any] = {}
    data: tuple[Any, Any] = (None, None)
    try:
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            for cell, rule, rate in tqdm.tqdm(todo, unit="run"):
                if time.monotonic() - began > 60.0 * options.minutes:
                    break
                if data[0] != cell:
                    task = tasks.load(cell.task)
                    made = tasks.make_clients(task, cell.concentration, cell.corruption, cell.seed)
                    data = cell, made
                key = (cell.task, cell.server, rule, rate)
                if key not in processes:
                    processes[key] = build_process(*key)
                start = time.monotonic()
                found = run(processes[key], cell, data[1])
                row = OrderedDict(cell._asdict(), rule=rule, client_rate=rate)
                row.update(
                    late_accuracy=f"{np.mean(found[-10:]):.5f}",
                    seconds=f"{time.monotonic() - start:.1f}",
                    tff=tff.__version__,
                    accuracies=" ".join(f"{accuracy:.4f}" for accuracy in found),
                )
                writer.writerow(row)
                file.flush()  # one write: two parts may add to one file
    finally:
        tff.test.set_no_default_context()  # ends the worker


if __name__ == "__main__":
    main()
