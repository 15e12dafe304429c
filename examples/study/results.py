"""The study's runs, read from a CSV and compared; of Python's own library alone.

What says something about runs, the report, the tests and the site's pages, says it by this module.
"""

import csv
import math
import pathlib
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results.csv"
FIRST_STUDY = HERE / "first_study.csv"
COSTS = HERE / "costs.csv"
MAIN = (("digits", "0.1"), ("topics", "0.5"), ("digits", "0.5"), ("topics", "0.1"))
PLAIN = "FedAvg"
RULES = (
    PLAIN,
    "FedAvgM",
    "redescending",
    "jury",
    "three voices",
    "next jury",
    "KL near",
    "loss near",
    "TFF robust",
    "geometric median",
    "multi-Krum",
    "centered clipping",
)
LATE = 10  # rounds


class Cell(NamedTuple):
    """A setting: what a CSV says of it, as it stands there."""

    task: str
    server: str
    concentration: str
    corruption: str
    clients: str = "20"
    unit: str = "1.0"
    client_rate: str = "0.3"

    def __str__(self) -> str:
        more = [] if self.server == "sgd" else ["Adam"]
        more += [] if self.clients == "20" else [f"{self.clients} clients"]
        more += [] if self.unit == "1.0" else [f"norms times {1.0 / float(self.unit):.0f}"]
        more += [] if self.client_rate == "0.3" else [f"rate {self.client_rate}"]
        return ", ".join([self.task, self.concentration, self.corruption, *more])


Curve = tuple[float, ...]
Runs = dict[Cell, dict[str, dict[str, Curve]]]
Measure = Callable[[Curve], float]


def late(curve: Curve) -> float:
    """The mean accuracy of the last ten rounds, in points."""
    return 100.0 * statistics.fmean(curve[-LATE:])


def last(curve: Curve) -> float:
    """The accuracy after the last round, in points."""
    return 100.0 * curve[-1]


def whole_curve(curve: Curve) -> float:
    """The mean accuracy of all rounds, in points."""
    return 100.0 * statistics.fmean(curve)


class Compared(NamedTuple):
    """One rule in one cell against FedAvg of the same seeds, in points.

    Attributes:
      mean: Of the rule.
      difference: Mean paired difference to FedAvg.
      error: Its standard error; NaN for one seed.
      seeds: How many both have run.
    """

    mean: float
    difference: float
    error: float
    seeds: int


def read(path: pathlib.Path, names: Sequence[str] = ()) -> Runs:
    """The accuracies of every run: by cell, rule and seed.

    Args:
      path: A CSV of this study, or of the first, whose rates are not part of a cell.
      names: Rules; with them, only cells and seeds in which all of these have run, and no other rule.
    """
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            known = {name: row[name] for name in Cell._fields if name in row}
            if "clients" not in row:
                del known["client_rate"]  # each rule had one
            curve = tuple(float(x) for x in row["accuracies"].split())
            runs[Cell(**known)][row["rule"]][row["seed"]] = curve
    kept: Runs = {}
    for cell, by_rule in runs.items():
        wanted = names or tuple(by_rule)
        seeds = set.intersection(*(set(by_rule.get(name, ())) for name in wanted))
        if seeds:
            kept[cell] = {
                name: {seed: by_rule[name][seed] for seed in sorted(seeds)} for name in wanted
            }
    return kept


def compare(runs: Runs, measure: Measure = late) -> dict[str, dict[Cell, Compared]]:
    """Every rule in every cell, against FedAvg there."""
    found: dict[str, dict[Cell, Compared]] = defaultdict(dict)
    for cell, by_rule in runs.items():
        for rule, by_seed in by_rule.items():
            mine = [measure(curve) for curve in by_seed.values()]
            pairs = zip(mine, (measure(by_rule[PLAIN][seed]) for seed in by_seed), strict=True)
            differences = [one - plain for one, plain in pairs]
            seeds = len(differences)
            error = statistics.stdev(differences) / math.sqrt(seeds) if seeds > 1 else math.nan
            found[rule][cell] = Compared(
                statistics.fmean(mine), statistics.fmean(differences), error, seeds
            )
    return dict(found)


def regrets(compared: Mapping[str, Mapping[Cell, Compared]]) -> dict[str, dict[Cell, float]]:
    """By how much the best rule of each cell is better, in points."""
    cells = compared[PLAIN]
    best = {cell: max(of_rule[cell].mean for of_rule in compared.values()) for cell in cells}
    return {
        rule: {cell: best[cell] - of_rule[cell].mean for cell in cells}
        for rule, of_rule in compared.items()
    }


def costs(path: pathlib.Path) -> dict[str, dict[str, float]]:
    """By cohort and rule: processor seconds of a round over those of FedAvg."""
    seconds: dict[str, dict[str, float]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            seconds[row["cohort"]][row["rule"]] = float(row["cpu_seconds"])
    return {
        cohort: {rule: number / by_rule[PLAIN] for rule, number in by_rule.items()}
        for cohort, by_rule in seconds.items()
    }


def best_rates(runs: Runs) -> tuple[list[Cell], dict[str, dict[Cell, tuple[str, float]]]]:
    """Cells that were run at several client rates, and each rule's best rate there.

    Returns:
      The cells, without their rate; and by rule and cell the best rate and its mean late accuracy.
    """
    rates: dict[Cell, dict[str, Cell]] = defaultdict(dict)
    for cell in runs:
        rates[cell._replace(client_rate="")][cell.client_rate] = cell
    several = {bare: by_rate for bare, by_rate in rates.items() if len(by_rate) > 1}
    found: dict[str, dict[Cell, tuple[str, float]]] = defaultdict(dict)
    for bare, by_rate in several.items():
        seeds = set.intersection(*(set(runs[cell][PLAIN]) for cell in by_rate.values()))
        for rule in runs[next(iter(by_rate.values()))]:
            means = {
                rate: statistics.fmean(late(runs[cell][rule][seed]) for seed in seeds)
                for rate, cell in by_rate.items()
            }
            best = max(means, key=lambda rate: means[rate])
            found[rule][bare] = best, means[best]
    return list(several), dict(found)


def is_lie(cell: Cell) -> bool:
    """Whether its bad clients lie about loss, distance and votes."""
    return "lies" in cell.corruption


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def signed(number: float) -> str:
    """A number of points with its sign; none for what rounds to nothing."""
    text = f"{number:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def is_main(cell: Cell) -> bool:
    """Whether a cell is one of the splits that are run with every kind of bad clients."""
    usual = Cell(cell.task, "sgd", cell.concentration, cell.corruption)
    return cell == usual and (cell.task, cell.concentration) in MAIN


def of(runs: Runs, wanted: Callable[[Cell], bool]) -> Runs:
    """The runs of some cells."""
    return {cell: by_rule for cell, by_rule in runs.items() if wanted(cell)}


def mean(numbers: Sequence[float]) -> str:
    """With its sign; nothing if there is none."""
    return signed(statistics.fmean(numbers)) if numbers else ""


def _kind(wanted: Callable[[str], bool], cells: Mapping[Cell, Compared]) -> str:
    return mean([one.difference for cell, one in cells.items() if wanted(cell.corruption)])


def summary(
    runs: Runs, shown: Sequence[str] = (), cost: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """A row per rule, or for those named: worst cells, regret, gains by kind of cell, and cost."""
    compared, found = compare(runs), regrets(compare(runs))
    has_liars = any(map(is_lie, runs))
    rows = []
    for rule in shown or compared:
        cells = compared[rule]
        honest = [cell for cell in cells if not is_lie(cell)]
        worst = min(honest, key=lambda cell: cells[cell].difference)
        row = [rule, signed(cells[worst].difference), str(worst) if rule != PLAIN else ""]
        row += [f"{statistics.fmean(found[rule].values()):.1f}", f"{max(found[rule].values()):.1f}"]
        row += [_kind(lambda kind: kind == "none", cells), _kind(_is_usual, cells)]
        if has_liars:
            lying = [cells[cell].difference for cell in cells if is_lie(cell)]
            row += [_kind(lambda kind: kind.endswith("20 %"), cells)]
            row += [_kind(lambda kind: kind.endswith("40 %"), cells)]
            row += [signed(min(lying))]
        row += [f"{by_rule[rule]:.1f}" for by_rule in (cost or {}).values()]
        rows.append(row)
    head = [
        "rule",
        "worst cell",
        "where",
        "mean regret",
        "largest",
        "nobody bad",
        "bad data, updates",
    ]
    head += ["20 % lie", "40 % lie", "worst with liars"] if has_liars else []
    return table([*head, *(f"cost, {cohort}" for cohort in cost or {})], rows)


def _is_usual(kind: str) -> bool:
    """Bad data or updates, but those of -10 times, which ruin FedAvg."""
    return "lies" not in kind and kind not in ("none", "times -10")


def every_cell(runs: Runs) -> str:
    """A row per cell: FedAvg's late accuracy, and each rule's difference with its standard error."""
    compared = compare(runs)
    rules = [rule for rule in compared if rule != PLAIN]
    rows = []
    for cell in sorted(runs):
        plain = compared[PLAIN][cell]
        row = [str(cell), str(plain.seeds), f"{plain.mean:.1f}"]
        for rule in rules:
            one = compared[rule][cell]
            error = "" if math.isnan(one.error) else f" ± {one.error:.1f}"
            row.append(signed(one.difference) + error)
        rows.append(row)
    return table(["cell", "seeds", PLAIN, *rules], rows)
