"""Draws the picture of the first page from the tables of other pages: `python docs/overview.py`.

Above: what each rule of the study gains and costs against plain averaging. Below: how long a round
takes here, in plain TFF and in other simulators.
"""

import pathlib
import re

import matplotlib

matplotlib.use("Agg")  # draws into a file, with or without a screen

import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parent.parent
STUDY = ROOT / "examples/study/README.md"
ROUNDS = ROOT / "docs/pages/benchmarks/rounds.md"
PICTURE = ROOT / "docs/pages/overview.png"
SHOWN = {
    "worst cell": "#c0392b",
    "nobody bad": "#7f8c8d",
    "bad data, updates": "#1e8449",
}
LABELS = ("worst setting without liars", "mean, nobody bad", "mean, some clients bad")
TASKS = {"A": "MLP, 100 clients", "B": "CNN, 10 clients", "C": "7.5e6 parameters, 4 clients"}
HERE = "`ResidentProcess`, on the CPU 0.1.0"


def table(path: pathlib.Path, first: str) -> dict[str, dict[str, str]]:
    """The first table of a page whose first column has this name: rows by their first cell."""
    text = re.search(rf"^\| {first} \|.*\n(?:\|.*\n)+", path.read_text() + "\n", re.M)[0]
    head, _, *rows = ([c.strip() for c in row.strip("|").split("|")] for row in text.splitlines())
    return {row[0]: dict(zip(head[1:], row[1:])) for row in rows}


def draw_rules(axes: plt.Axes) -> None:
    """A line for each rule, from its worst setting to what it gains."""
    rules = table(STUDY, "rule")
    del rules["FedAvg"]  # what the others are compared with
    order = sorted(rules, key=lambda rule: float(rules[rule]["worst cell"]))
    for place, rule in enumerate(order):
        points = [float(rules[rule][name]) for name in SHOWN]
        axes.plot([min(points), max(points)], [place, place], color="#d0d3d4", zorder=1)
        for point, color, label in zip(points, SHOWN.values(), LABELS):
            axes.scatter(point, place, color=color, zorder=2, label=None if place else label)
    axes.set_yticks(range(len(order)), order)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("points of accuracy against plain averaging")
    axes.set_title("What a rule gains and costs", loc="left")
    axes.legend(frameon=False, fontsize="small")


def draw_rounds(axes: plt.Axes) -> None:
    """A point for each simulator and task."""
    rounds = table(ROUNDS, "seconds of a round")
    # One run of each; the row of a worker is of an earlier version.
    rounds = {n: row for n, row in rounds.items() if "again" not in n and "workers=1" not in n}
    names = sorted(rounds, key=lambda name: -float(rounds[name]["A"].split()[0]))
    for (task, what), marker in zip(TASKS.items(), "os^"):
        seconds = [float(rounds[name][task].split()[0]) for name in names]
        axes.scatter(seconds, range(len(names)), marker=marker, label=what)
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 4], ["0.1", "0.2", "0.5", "1", "2", "4"])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), ["here" if name == HERE else name for name in names])
    axes.set_xlabel("seconds of a round, two CPU cores")
    axes.set_title("How long a round takes", loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", loc="upper right")


def main() -> None:
    """Draws both into one picture."""
    figure, (above, below) = plt.subplots(2, figsize=(7.5, 6.2), layout="constrained")
    draw_rules(above)
    draw_rounds(below)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
