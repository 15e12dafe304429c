"""Runs the study of rules that are safe to use: rows of a CSV, one for each run, which it goes on from.

python examples/study/run.py               the plan, in its order, until it is stopped
python examples/study/run.py --minutes 50  no block starts after these
python examples/study/run.py --list        how many runs each part of the plan has
python examples/study/report.py            tables and pictures of what is there

The plan is in blocks: a setting, a seed and a rate of the clients, in which every rule is run. Blocks
that tell most come first, so that a part of the plan is a study too.
"""

import argparse
import csv
import itertools
import os
import pathlib
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import bad_clients
import numpy as np
import tasks
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
import tff_optim
from aggregators import rules, scores, weighting
from tff_optim.interrupts import end_worker_at_exit
from tff_optim.simulation import ClientArrays

HERE = pathlib.Path(__file__).parent
ROUNDS = 50
PER_ROUND = 10
RATE = 0.3
RATES = (0.3, 0.1, 1.0)
SERVER_ADAM_RATE = 0.03
SEEDS = (7000, 7001, 7002)  # used by nobody before
LATE = 10  # rounds of which the accuracy is a run's late accuracy


class Cell(NamedTuple):
    """One setting with one seed and one rate of the clients: every rule is run in it.

    Attributes:
      task: A name of `tasks.NAMES`.
      clients: How many there are in all.
      unit: In what the weights are counted: with 0.1 updates have ten times the norm, and nothing
        else is changed, since rates are divided by its square.
      server: `sgd` or `adam`.
      concentration: Of the Dirichlet split.
      corruption: A name of `bad_clients.CORRUPTIONS`.
      seed: Of split, start, cohorts and noise.
      client_rate: The clients' learning rate, before it is divided.
    """

    task: str
    clients: int
    unit: float
    server: str
    concentration: float
    corruption: str
    seed: int
    client_rate: float


COLUMNS = (*Cell._fields, "rule", "late", "last", "whole", "cpu_seconds", "tff", "accuracies")

TWO = [("loss", weighting.softmax()), (scores.kl_divergence, weighting.softmax())]
THREE = [*TWO, ("loss", weighting.uniform(times_examples=False))]


def next_jury(**options: Any) -> aggregators.Rule:
    """Three voices, a longer look-ahead, a smaller margin, and a vote on how far to go."""
    return rules.jury_mean(
        THREE,
        layers="tensor",
        gap_decay=0.8,
        margin=0.2,
        stride_step=0.05,
        initial_norm=None,
        **options,
    )


def held_out_error(predictions: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`1 - p(true label)`, and which examples count: those that were held out."""
    true = labels % tasks.HELD_OUT
    shown = tf.gather(tf.nn.softmax(predictions), true, axis=1, batch_dims=1)
    return 1.0 - shown, labels >= tasks.HELD_OUT


class Entry(NamedTuple):
    """A rule of the study.

    Attributes:
      make: The rule; None for TFF's robust aggregator.
      momentum: Of the server, whose rate is 1 less it, so that steady steps have one length.
      vectorize: Whether that is faster for it, after what it costs to build.
      held_out: Whether clients keep a tenth of their data from training, to vote on.
    """

    make: Any
    momentum: float = 0.0
    vectorize: bool = False
    held_out: bool = False


# Numbers fixed before the first run: the package's defaults, or those of the papers and the issue.
RULES = OrderedDict(
    [
        ("FedAvg", Entry(rules.plain_mean)),
        ("FedAvgM", Entry(rules.plain_mean, momentum=0.9)),
        ("redescending", Entry(rules.redescending_mean)),
        ("jury", Entry(rules.jury_mean)),
        ("three voices", Entry(lambda: rules.jury_mean(TWO, layers="tensor"))),
        ("next jury", Entry(next_jury, vectorize=True)),
        ("KL near", Entry(lambda: rules.adaptive_mean(scores.kl_divergence, weighting.softmax()))),
        ("loss near", Entry(lambda: rules.adaptive_mean("loss", weighting.softmax()))),
        ("TFF robust", Entry(None)),
        ("geometric median", Entry(rules.geometric_median)),
        ("multi-Krum", Entry(lambda: rules.multi_krum(2, 8))),
        ("centered clipping", Entry(lambda: rules.centered_clipping(1.0))),
    ]
)
MORE_RULES = OrderedDict(
    [
        (
            "KL far",
            Entry(
                lambda: rules.adaptive_mean(scores.kl_divergence, weighting.softmax(prefer="far"))
            ),
        ),
        (
            "next jury, held-out votes",
            Entry(lambda: next_jury(votes=held_out_error), vectorize=True, held_out=True),
        ),
    ]
)
ALL_RULES = OrderedDict([*RULES.items(), *MORE_RULES.items()])

# From here on the order in which corruptions are run.
_GOOD_FAITH = ("none", "random labels", "times -1", "flipped labels")
_LIARS = (
    "flipped labels, lies, 20 %",
    "times -1, lies, 20 %",
    "ipm, lies, 20 %",
    "alie, lies, 20 %",
    "random labels, lies, 20 %",
    "inside, lies, 20 %",
)
_CRUDE = ("fresh noise", "times -10")
_MANY = tuple(name for name in bad_clients.CORRUPTIONS if name.endswith("40 %"))
_PAIRS = ((("digits", 0.1), ("topics", 0.5)), (("topics", 0.1), ("digits", 0.5)))


def plan() -> Iterator[tuple[str, Cell, tuple[str, ...]]]:
    """The blocks in their order: the part's name, the cell and the rules. Some come up twice."""
    first = SEEDS[0]
    every, few = tuple(RULES), ("FedAvg", "next jury", *MORE_RULES)

    def cell(task: str, concentration: float, corruption: str, seed: int, **changed: Any) -> Cell:
        usual = Cell(task, 20, 1.0, "sgd", concentration, corruption, seed, RATE)
        return usual._replace(**changed)

    for kind in (*_GOOD_FAITH, *_LIARS):
        for task, split in _PAIRS[0]:
            yield "attacks, one split of each task", cell(task, split, kind, first), every
    for kind, rate in itertools.product(("none", "random labels"), RATES[1:]):
        yield "client rates", cell("digits", 0.1, kind, first, client_rate=rate), every
        yield "client rates", cell("topics", 0.5, kind, first, client_rate=rate), every
    for kind in ("none", "times -1"):
        yield "another scale of updates", cell("digits", 0.1, kind, first, unit=0.1), every
    for kind in ("none", "random labels"):
        yield "60 clients", cell("digits", 0.1, kind, first, clients=60), every
    for kind in ("none", "flipped labels", "times -1, lies, 20 %"):
        yield "made", cell("made", 0.1, kind, first), every
    for kind in _GOOD_FAITH:
        yield "KL far and held-out votes", cell("digits", 0.1, kind, first), few
    for kind in (*_CRUDE, *_MANY):
        for task, split in _PAIRS[0]:
            yield "attacks, one split of each task", cell(task, split, kind, first), every
    for kind in ("none", "random labels"):
        yield "cnn", cell("cnn", 0.1, kind, first), every
    for kind in (*_GOOD_FAITH, *_LIARS, *_CRUDE, *_MANY):
        for task, split in _PAIRS[1]:
            yield "attacks, the other split", cell(task, split, kind, first), every
    for seed in SEEDS[1:]:
        for kind, pair in itertools.product((*_GOOD_FAITH, *_LIARS, *_CRUDE, *_MANY), _PAIRS):
            for task, split in pair:
                yield "more seeds", cell(task, split, kind, seed), every
    for seed, kind, rate in itertools.product(SEEDS, (*_GOOD_FAITH, *_CRUDE), RATES):
        for task, split in itertools.product(("digits", "topics"), (0.05, 0.1, 0.5, 5.0)):
            yield "all splits and rates", cell(task, split, kind, seed, client_rate=rate), every
    for seed, kind, split in itertools.product(SEEDS, (*_GOOD_FAITH, *_LIARS), (0.1, 0.5)):
        yield "made", cell("made", split, kind, seed), every
        yield "60 clients", cell("digits", split, kind, seed, clients=60), every
        if not bad_clients.CORRUPTIONS[kind].sends:
            yield "cnn", cell("cnn", split, kind, seed), every
    for seed, kind, split in itertools.product(SEEDS, (*_GOOD_FAITH, *_CRUDE), (0.05, 0.5)):
        for task in ("digits", "topics"):
            yield "Adam on the server", cell(task, split, kind, seed, server="adam"), every


def blocks() -> OrderedDict[tuple[Cell, tuple[str, ...]], str]:
    """Each block of the plan once, where it comes first, with its part's name."""
    found: OrderedDict[tuple[Cell, tuple[str, ...]], str] = OrderedDict()
    for part, cell, names in plan():
        found.setdefault((cell, names), part)
    return found


def build_process(
    task: str,
    server: str,
    rule: str,
    client_rate: float = RATE,
    vectorize: bool | None = None,
) -> tff_optim.ResidentProcess:
    """One process for a task, a server's optimizer and a rule, run where its rounds are fastest."""
    model, entry = tasks.make_model(tasks.load(task)), ALL_RULES[rule]
    client = bad_clients.FlaggedSGD(client_rate)
    if server == "adam":
        optimizer = tff.learning.optimizers.build_adam(SERVER_ADAM_RATE)
    else:
        momentum = entry.momentum or None
        optimizer = tff.learning.optimizers.build_sgdm(1.0 - entry.momentum, momentum)
    if entry.make is None:
        plain = tff.learning.algorithms.build_weighted_fed_avg(
            model,
            client,
            optimizer,
            model_aggregator=tff.learning.robust_aggregator(),
            loop_implementation=tff.learning.LoopImplementation.DATASET_ITERATOR,
        )
    else:
        told = bad_clients.deceived(entry.make())
        plain = aggregators.build_fed_avg(model, client, optimizer, rule=told)
    beside = entry.vectorize if vectorize is None else vectorize
    return tff_optim.ResidentProcess(plain, device="CPU:0", vectorize=beside)


def run(
    process: tff_optim.ResidentProcess, cell: Cell, held_out: bool = False, rounds: int = ROUNDS
) -> list[float]:
    """The test accuracy after every round. Every rule sees the same start and the same cohorts."""
    task = tasks.load(cell.task)
    what = bad_clients.CORRUPTIONS[cell.corruption]
    federation = bad_clients.make_clients(
        task, cell.clients, cell.concentration, cell.corruption, cell.seed, held_out
    )
    clients = ClientArrays(federation.arrays, batch_size=tasks.BATCH)
    rate = cell.client_rate / cell.unit**2
    rng, noise = (np.random.default_rng(start + cell.seed) for start in (2_000_000, 3_000_000))

    def loaded(state: Any, weights: Any, payloads: np.ndarray) -> Any:
        untrained = (payloads, np.float32(cell.unit))
        model_weights = tff.learning.models.ModelWeights(tuple(weights), untrained)
        return process.set_model_weights(state, model_weights)

    weights = tasks.initial_weights(task, cell.seed, cell.unit)
    nothing = np.zeros([tasks.ROWS, task.size], np.float32)
    state = loaded(process.initialize(), weights, nothing)
    if process.get_hparams(state)["client_work"]:  # TFF's own client work has none
        state = process.set_hparams(state, {"client_work": {"learning_rate": rate}})
    found = []
    for number in range(rounds):
        cohort = [int(client) for client in rng.choice(cell.clients, PER_ROUND, replace=False)]
        if what.sends and set(cohort) & set(federation.bad):
            honest = nothing[:1]
            if what.sends != "noise":
                good = [client for client in cohort if client not in federation.bad]
                honest = np.stack(
                    [
                        bad_clients.honest_update(
                            task, weights, cell.unit, federation.arrays[client], rate
                        )
                        for client in good
                    ]
                )
            deviation = bad_clients.GAUSSIAN_DEVIATION / cell.unit
            sent = bad_clients.payloads(what.sends, honest, deviation, noise)
            state = loaded(state, weights, sent)
        state = process.next(state, clients.cohort(cohort, number)).state
        weights = process.get_model_weights(state).trainable
        found.append(tasks.accuracy(task, weights, cell.unit))
    return found


def row_of(cell: Cell, rule: str, found: list[float], seconds: float) -> dict[str, Any]:
    """A row of the CSV."""
    return OrderedDict(
        cell._asdict(),
        rule=rule,
        late=f"{np.mean(found[-LATE:]):.5f}",
        last=f"{found[-1]:.5f}",
        whole=f"{np.mean(found):.5f}",
        cpu_seconds=f"{seconds:.2f}",
        tff=tff.__version__,
        accuracies=" ".join(f"{accuracy:.4f}" for accuracy in found),
    )


def done_before(path: pathlib.Path) -> set[tuple[str, ...]]:
    """The runs that a CSV holds. A last line that was cut off by a kill is taken out."""
    if not path.exists():
        return set()
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    names = (*Cell._fields, "rule")
    return {tuple(row[name] for name in names) for row in csv.DictReader(whole.splitlines())}


def processor_seconds() -> float:
    """Of this process and of the children that ended."""
    return sum(os.times()[:4])


def main() -> None:
    """Runs what is not in the CSV yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results.csv", help="the CSV")
    parser.add_argument("--minutes", type=float, default=np.inf, help="no block starts after these")
    parser.add_argument("--only", help="the blocks of this part of the plan alone")
    parser.add_argument("--list", action="store_true", help="the parts of the plan, and no more")
    options = parser.parse_args()
    end_worker_at_exit()
    if options.list:
        for part, number in Counter(blocks().values()).items():
            print(f"{number:4} blocks  {part}")
        return
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tff.backends.native.set_sync_local_cpp_execution_context()
    done, began = done_before(options.output), time.monotonic()
    processes: dict[tuple[str, str, str, float], tff_optim.ResidentProcess] = {}
    try:
        with options.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            for (cell, names), part in blocks().items():
                todo = [n for n in names if (*(str(x) for x in cell), n) not in done]
                if not todo or options.only not in (None, part):
                    continue
                if time.monotonic() - began > 60.0 * options.minutes:
                    break
                print(f"{time.strftime('%H:%M:%S')} {part}: {tuple(cell)}", flush=True)
                for rule in todo:
                    # Where a rate is built in, one process for each.
                    is_built_in = ALL_RULES[rule].make is None
                    rate = cell.client_rate / cell.unit**2 if is_built_in else RATE
                    key = cell.task, cell.server, rule, rate
                    if key not in processes:
                        processes[key] = build_process(*key)
                    start = processor_seconds()
                    found = run(processes[key], cell, ALL_RULES[rule].held_out)
                    writer.writerow(row_of(cell, rule, found, processor_seconds() - start))
                    file.flush()
                    done.add((*(str(x) for x in cell), rule))
    finally:
        tff.test.set_no_default_context()  # ends the worker


if __name__ == "__main__":
    main()
