"""Tables and pictures of the study, from its CSV.

python examples/study/report.py [--results FILE] [--pictures FOLDER]
"""

import argparse
import csv
import pathlib
from collections import defaultdict
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into files, with or without a screen

import matplotlib.pyplot as plt
import numpy as np

from tff_optim.interrupts import end_worker_at_exit
from tff_optim.simulation import plots

HERE = pathlib.Path(__file__).parent
PLAIN = "FedAvg"
LATE = 10
TARGET = 0.9
FAULTS = {
    "none": "no bad clients",
    "random labels": "random labels",
    "times -1": "updates times -1",
}
DRAWN = tuple(FAULTS)  # in curves, with SGD on the server
CELL = ("task", "server", "concentration", "corruption")


class Compared(NamedTuple):
    """One rule in one cell against FedAvg of the same seeds, in points of late accuracy.

    Attributes:
      late: Mean late accuracy of the rule.
      difference: Mean paired difference to FedAvg.
      error: Its standard error; NaN for one seed.
      seeds: How many seeds both have run.
    """

    late: float
    difference: float
    error: float
    seeds: int


Key = tuple[str, ...]
Curves = dict[Key, dict[str, dict[str, np.ndarray]]]


def read(path: pathlib.Path) -> Curves:
    """The accuracies of every run: by cell, rule and seed."""
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            accuracies = np.array([float(x) for x in row["accuracies"].split()])
            curves[tuple(row[name] for name in CELL)][row["rule"]][row["seed"]] = accuracies
    return {
        cell: {rule: dict(seeds) for rule, seeds in by_rule.items()}
        for cell, by_rule in curves.items()
    }


def late(accuracies: np.ndarray) -> float:
    """The mean accuracy of the last ten rounds."""
    return float(np.mean(accuracies[-LATE:]))


def compare(curves: Curves) -> dict[str, dict[Key, Compared]]:
    """Every rule in every cell that FedAvg has run with the same seeds."""
    found: dict[str, dict[Key, Compared]] = defaultdict(dict)
    for cell, by_rule in curves.items():
        for rule, by_seed in by_rule.items():
            seeds = sorted(set(by_seed) & set(by_rule.get(PLAIN, {})))
            if not seeds:
                continue
            pairs = [(late(by_seed[s]), late(by_rule[PLAIN][s])) for s in seeds]
            differences = 100.0 * np.array([mine - plain for mine, plain in pairs])
            error = np.std(differences, ddof=1) / np.sqrt(len(seeds)) if len(seeds) > 1 else np.nan
            mean = float(np.mean([mine for mine, _ in pairs]))
            found[rule][cell] = Compared(mean, float(differences.mean()), float(error), len(seeds))
    return dict(found)


def whole(curves: Curves) -> Curves:
    """The cells that every rule has run, with the seeds that every rule has run there."""
    rules = {rule for by_rule in curves.values() for rule in by_rule}
    kept: Curves = {}
    for cell, by_rule in curves.items():
        seeds = set.intersection(*(set(by_rule.get(rule, {})) for rule in rules))
        if seeds:
            kept[cell] = {r: {s: by_seed[s] for s in seeds} for r, by_seed in by_rule.items()}
    return kept


def rounds_to_target(by_rule: dict[str, dict[str, np.ndarray]], rule: str, clean: float) -> float:
    """Median over seeds of the first round at 90 % of a late accuracy; infinite if never."""
    found = []
    for accuracies in by_rule[rule].values():
        reached = np.flatnonzero(accuracies >= TARGET * clean)
        found.append(float(reached[0] + 1) if len(reached) else np.inf)
    return float(np.median(found))


def summary(curves: Curves) -> str:
    """A row per rule: worst regret, mean gain where clients are bad, worst single seed."""
    compared = compare(curves)
    lines = [
        "| rule | worst cell | where | clean cells, mean | gain under corruption | worst single run |",
        "|---|---|---|---|---|---|",
    ]
    for rule, cells in compared.items():
        if rule == PLAIN:
            continue
        worst = min(cells, key=lambda cell: cells[cell].difference)
        clean = [c.difference for cell, c in cells.items() if cell[3] == "none"]
        # An update of -10 times ruins FedAvg; a gain there says little about the others.
        bad = [c.difference for cell, c in cells.items() if cell[3] not in ("none", "times -10")]
        single = min(
            100.0 * (late(curves[cell][rule][seed]) - late(curves[cell][PLAIN][seed]))
            for cell in cells
            for seed in curves[cell][rule]
        )
        numbers = [np.mean(part) if part else np.nan for part in (clean, bad)]
        place = f"{worst[0]}, {worst[1]}, Dirichlet {worst[2]}, {worst[3]}"
        lines.append(
            f"| {rule} | {cells[worst].difference:+.1f} | {place} | {numbers[0]:+.1f} | "
            f"{numbers[1]:+.1f} | {single:+.1f} |"
        )
    return "\n".join(lines)


def by_cell(curves: Curves) -> str:
    """A row per cell: FedAvg's late accuracy, and each rule's difference with its standard error."""
    compared = compare(curves)
    rules = [rule for rule in compared if rule != PLAIN]
    lines = [
        "| cell | seeds | FedAvg | " + " | ".join(rules) + " |",
        "|---|---|---|" + "---|" * len(rules),
    ]
    for cell in sorted(curves):
        plain = compared[PLAIN][cell]
        row = []
        for rule in rules:
            one = compared[rule].get(cell)
            if one is None:
                row.append("")
                continue
            error = "" if np.isnan(one.error) else f" ± {one.error:.1f}"
            row.append(f"{one.difference:+.1f}{error}")
        name = f"{cell[0]}, {cell[1]}, {cell[2]}, {cell[3]}"
        lines.append(
            f"| {name} | {plain.seeds} | {100 * plain.late:.1f} | " + " | ".join(row) + " |"
        )
    return "\n".join(lines)


def speed(curves: Curves) -> str:
    """A row per cell: rounds to 90 % of the late accuracy of FedAvg without bad clients."""
    rules = list(dict.fromkeys(rule for by_rule in curves.values() for rule in by_rule))
    lines = ["| cell | " + " | ".join(rules) + " |", "|---|" + "---|" * len(rules)]
    for cell in sorted(curves):
        clean = curves.get((*cell[:3], "none"), {}).get(PLAIN)
        if clean is None:
            continue
        level = float(np.mean([late(one) for one in clean.values()]))
        found = [
            rounds_to_target(curves[cell], rule, level) for rule in rules if rule in curves[cell]
        ]
        row = ["never" if np.isinf(x) else f"{x:.0f}" for x in found]
        lines.append(f"| {cell[0]}, {cell[1]}, {cell[2]}, {cell[3]} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def mean_by_rate(path: pathlib.Path) -> dict[Key, dict[str, float]]:
    """Mean late accuracy of a task, a server's optimizer and a rule, by the clients' rate."""
    found: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["task"], row["server"], row["rule"]
            found[key][row["client_rate"]].append(float(row["late_accuracy"]))
    return {
        key: {rate: float(np.mean(accuracies)) for rate, accuracies in rates.items()}
        for key, rates in found.items()
    }


def rates(path: pathlib.Path) -> str:
    """A row per task, server and rule: late accuracy at each rate of the clients, in points."""
    found = mean_by_rate(path)
    names = sorted(next(iter(found.values())), key=float)
    lines = [
        "| setting | rule | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for (task, server, rule), by_rate in found.items():
        row = " | ".join(f"{100.0 * by_rate[name]:.1f}" for name in names)
        lines.append(f"| {task}, {server} | {rule} | {row} |")
    return "\n".join(lines)


def draw_heat_map(curves: Curves, path: pathlib.Path) -> None:
    """Differences to FedAvg: a panel per task, a row per cell, a column per rule."""
    compared = compare(curves)
    rules = [rule for rule in compared if rule != PLAIN]
    by_task: dict[str, list[Key]] = defaultdict(list)
    for cell in sorted(curves, key=lambda c: (c[3] != "none", c[3], c[1] == "adam", float(c[2]))):
        by_task[cell[0]].append(cell)
    rows = max(map(len, by_task.values()))
    figure, panels = plt.subplots(
        1, len(by_task), figsize=(13.0, 2.2 + 0.26 * rows), layout="constrained", squeeze=False
    )
    for axes, (task, cells) in zip(panels[0], sorted(by_task.items()), strict=True):
        table = np.full((len(cells), len(rules)), np.nan)
        for i, cell in enumerate(cells):
            for j, rule in enumerate(rules):
                if cell in compared[rule]:
                    table[i, j] = compared[rule][cell].difference
        image = axes.imshow(table, cmap="RdBu", vmin=-10.0, vmax=10.0, aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            if np.isfinite(value):
                color = "white" if abs(value) > 6.0 else "black"
                axes.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=color)
        names = [f"{c[3]}, {c[2]}" + (", Adam" if c[1] == "adam" else "") for c in cells]
        axes.set_yticks(range(len(cells)), names, fontsize=8)
        axes.set_xticks(range(len(rules)), rules, rotation=40, ha="left", fontsize=9)
        axes.xaxis.tick_top()
        axes.set_title(task)
    figure.suptitle(
        "Mean test accuracy of the last ten rounds, less that of FedAvg, in points.\n"
        "Rows: what is wrong with the bad clients, and the concentration of the Dirichlet split "
        "(0.05: clients of few labels; 5.0: clients alike)"
    )
    plots.panel_letters(panels[0])
    figure.colorbar(image, ax=panels, extend="both", label="points of accuracy", shrink=0.5)
    plots.save(figure, path)
    plt.close(figure)


def draw_curves(curves: Curves, path: pathlib.Path, shown: tuple[str, ...]) -> None:
    """Test accuracy over rounds: mean over seeds, with a band from the least to the largest."""
    drawn = [c for c in curves if c[1] == "sgd" and c[2] in ("0.05", "0.5") and c[3] in DRAWN]
    cells = sorted(drawn, key=lambda cell: (cell[0], DRAWN.index(cell[3]), cell[2]))
    columns = min(4, len(cells))
    rows = -(-len(cells) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.7 * rows), layout="constrained", squeeze=False
    )
    for axes, cell in zip(grid.flat, cells):
        for number, rule in enumerate(shown):
            if rule not in curves[cell]:
                continue
            found = np.array(list(curves[cell][rule].values()))
            rounds = np.arange(1, found.shape[1] + 1)
            style = plots.line_style(number, len(shown))
            axes.plot(rounds, found.mean(0), label=rule, **style)
            axes.fill_between(rounds, found.min(0), found.max(0), color=style["color"], alpha=0.1)
        axes.set_title(f"{cell[0]}, Dirichlet({cell[2]}), {FAULTS[cell[3]]}", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(cells) :]:
        axes.axis("off")
    plots.panel_letters(grid.flat[: len(cells)])
    for axes in grid[-1]:
        axes.set_xlabel("round of training")
    figure.supylabel("test accuracy")
    seeds = {len(curves[cell][PLAIN]) for cell in cells}
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(shown),
        title=f"mean, and range from least to largest, of {' or '.join(map(str, seeds))} seeds",
    )
    plots.save(figure, path)
    plt.close(figure)


def main() -> None:
    """Prints the tables and draws the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results.csv")
    parser.add_argument("--pictures", type=pathlib.Path, default=HERE)
    options = parser.parse_args()
    end_worker_at_exit()
    curves: Any = whole(read(options.results))
    runs = sum(len(seeds) for by_rule in curves.values() for seeds in by_rule.values())
    print(f"{len(curves)} cells that every rule has run, {runs} runs\n")
    for part in (summary, by_cell, speed):
        print(part(curves), "\n")
    print(rates(HERE / "tuning.csv"), "\n")
    options.pictures.mkdir(parents=True, exist_ok=True)
    draw_heat_map(curves, options.pictures / "regret")
    draw_curves(
        curves,
        options.pictures / "curves",
        (PLAIN, "KL near", "loss near", "redescending", "jury"),
    )


if __name__ == "__main__":
    main()
