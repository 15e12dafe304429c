"""Tables, sentences and the picture of the study, from its CSVs.

python examples/study/report.py            prints what the page's made parts are
python examples/study/report.py --write    writes them into README.md, and draws the picture
"""

import argparse
import itertools
import pathlib
import re
import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files, with or without a screen

import matplotlib.pyplot as plt
import numpy as np
import results
from matplotlib.colors import LinearSegmentedColormap
from results import PLAIN, RULES, Cell, Runs, is_main, mean, of, signed, summary, table

from tff_optim.interrupts import end_worker_at_exit
from tff_optim.simulation import plots

HERE = pathlib.Path(__file__).parent
PAGE = HERE / "README.md"
MORE = ("KL far", "next jury, held-out votes")  # run in some cells
OTHERS = (PLAIN, "KL near", "next jury")  # beside which they are shown
STUDENT_95 = 2.132  # what a mean of five differs by at most, in standard errors, one-sided
# Vermilion, white and blue of Okabe and Ito.
COLOURS = LinearSegmentedColormap.from_list("points", ["#D55E00", "#FFFFFF", "#0072B2"])


def by_corruption(runs: Runs) -> str:
    """A row per corruption, a column per rule: the mean over its cells, in points."""
    compared = results.compare(runs)
    rules = [rule for rule in compared if rule != PLAIN]
    kinds = dict.fromkeys(cell.corruption for cell in runs)
    rows = []
    for kind in kinds:
        cells = [cell for cell in runs if cell.corruption == kind]
        plain = statistics.fmean(compared[PLAIN][cell].mean for cell in cells)
        row = [mean([compared[rule][cell].difference for cell in cells]) for rule in rules]
        rows.append([kind, str(len(cells)), f"{plain:.1f}", *row])
    return table(["bad clients", "cells", PLAIN, *rules], rows)


def by_cell(runs: Runs) -> str:
    """A row per cell, a column per rule."""
    compared = results.compare(runs)
    rules = [rule for rule in compared if rule != PLAIN]
    rows = [
        [
            str(cell),
            f"{compared[PLAIN][cell].mean:.1f}",
            *(signed(compared[rule][cell].difference) for rule in rules),
        ]
        for cell in runs
    ]
    return table(["cell", PLAIN, *rules], rows)


def by_rate(runs: Runs) -> str:
    """A row per cell that was run at several client rates: each rule's best, and at which rate."""
    cells, best = results.best_rates(runs)
    if not cells:
        return ""
    rows = [
        [
            f"{cell.task}, {cell.concentration}, {cell.corruption}",
            *(f"{best[rule][cell][1]:.1f} ({best[rule][cell][0]})" for rule in best),
        ]
        for cell in cells
    ]
    return table(["cell", *best], rows)


def by_measure(runs: Runs) -> str:
    """A row per rule: worst and mean difference by late, last and whole-curve accuracy."""
    measures = (results.late, results.last, results.whole_curve)
    compared = [results.compare(runs, measure) for measure in measures]
    rows = []
    for rule in compared[0]:
        if rule != PLAIN:
            row = [rule]
            for one in compared:
                differences = [cell.difference for cell in one[rule].values()]
                row += [signed(min(differences)), mean(differences)]
            rows.append(row)
    head = [
        f"{name}, {what}" for name in ("late", "last", "all rounds") for what in ("worst", "mean")
    ]
    return table(["rule", *head], rows)


def draw(runs: Runs, path: pathlib.Path) -> None:
    """What each attack does to each rule, and what each rule costs at worst and on the mean."""
    compared = results.compare(runs)
    rules = [rule for rule in compared if rule != PLAIN]
    kinds = list(dict.fromkeys(cell.corruption for cell in runs))
    names = sorted({cell.task for cell in runs})
    figure, panels = plt.subplots(
        1,
        len(names) + 1,
        figsize=(15.0, 2.6 + 0.27 * len(kinds)),
        layout="constrained",
        width_ratios=[*[1.0] * len(names), 0.8],
    )
    image = None
    for axes, task in zip(panels, names):
        shown = np.full((len(kinds), len(rules)), np.nan)
        for (i, kind), (j, rule) in itertools.product(enumerate(kinds), enumerate(rules)):
            found = [
                one.difference
                for cell, one in compared[rule].items()
                if (cell.task, cell.corruption) == (task, kind)
            ]
            shown[i, j] = np.mean(found) if found else np.nan
        image = axes.imshow(shown, cmap=COLOURS, vmin=-20.0, vmax=20.0, aspect="auto")
        for (i, j), value in np.ndenumerate(shown):
            if np.isfinite(value):
                axes.text(j, i, f"{value:+.0f}", ha="center", va="center", fontsize=7)
        axes.set_yticks(range(len(kinds)), kinds if axes is panels[0] else [], fontsize=8)
        axes.set_xticks(range(len(rules)), rules, rotation=45, ha="left", fontsize=8)
        axes.xaxis.tick_top()
        axes.set_xlabel(f"{task}: late accuracy less that of FedAvg, in points")
    figure.colorbar(image, ax=panels[: len(names)], extend="both", label="points", shrink=0.6)
    _draw_rules(panels[-1], runs)
    plots.panel_letters(panels)
    plots.save(figure, path)
    plt.close(figure)


def _draw_rules(axes: Any, runs: Runs) -> None:
    compared = results.compare(runs)
    rules = list(compared)
    regret = results.regrets(compared)
    places = np.arange(len(rules))[::-1]
    marks = (
        ("worst cell without lies, against FedAvg", "o", "#0072B2", False),
        ("worst cell with lies, against FedAvg", "X", "#D55E00", True),
    )
    for label, marker, colour, lies in marks:
        worst = [
            min(
                (
                    one.difference
                    for cell, one in compared[rule].items()
                    if results.is_lie(cell) == lies
                ),
                default=np.nan,
            )
            for rule in rules
        ]
        axes.plot(worst, places, marker, color=colour, label=label)
    mean_regret = [-statistics.fmean(regret[rule].values()) for rule in rules]
    axes.plot(
        mean_regret, places, "|", color="#000000", markersize=12, label="mean regret, negative"
    )
    axes.axvline(0.0, color="0.5", linewidth=0.8)
    axes.set_yticks(places, rules, fontsize=8)
    axes.set_xlabel("points of late accuracy")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.12))


def first_sentences(runs: Runs) -> str:
    """What the first study found, in sentences."""
    compared = results.compare(runs)

    def gain(rule: str, wanted: Any) -> str:
        return mean([one.difference for cell, one in compared[rule].items() if wanted(cell)])

    def single(rule: str, wanted: Any) -> tuple[float, Cell]:
        return min(
            (results.late(curve) - results.late(runs[cell][PLAIN][seed]), cell)
            for cell in runs
            if wanted(cell)
            for seed, curve in runs[cell][rule].items()
        )

    def flipped(task: str) -> Any:
        return lambda cell: (cell.task, cell.corruption) == (task, "flipped labels")

    def is_clean(cell: Cell) -> bool:
        return cell.corruption == "none"

    def mild(kind: str) -> Any:
        return lambda cell: float(cell.concentration) >= 0.5 and cell.corruption == kind

    def strong(kind: str) -> Any:
        return lambda cell: float(cell.concentration) < 0.5 and cell.corruption == kind

    worst = {
        rule: min(cells.values(), key=lambda one: one.difference)
        for rule, cells in compared.items()
    }
    lost, where = single("jury", lambda cell: True)
    bound = worst["jury"].difference - STUDENT_95 * worst["jury"].error
    direction, voices = "jury, direction", "jury, three voices"
    kinds = ("random labels", "flipped labels", "times -1")
    near, near_strong = ([gain("KL near", at(kind)) for kind in kinds] for at in (mild, strong))
    heard, heard_strong = ([gain(voices, at(kind)) for kind in kinds] for at in (mild, strong))
    safe = ("redescending", "jury", direction, voices)
    lines = [
        "The worst cells are "
        + ", ".join(f"{worst[rule].difference:.2f} ({rule})" for rule in safe)
        + f", all with nobody bad. One-sided, with 95 %, the jury's is above {bound:.1f}.",
        f"The worst single run of the jury is {lost:.1f} ({where}). With nobody bad it is "
        f"{single('jury', is_clean)[0]:.1f}.",
        f"Votes by direction gain under flipped labels {gain(direction, flipped('digits'))} on digits, "
        f"where the jury gains {gain('jury', flipped('digits'))}, and "
        f"{gain(direction, flipped('topics'))} on topics ({gain('jury', flipped('topics'))}).",
        "KL near, where splits are mild (Dirichlet 0.5 and 5), gains "
        f"{near[0]} with random labels, {near[1]} with flipped ones and {near[2]} with updates times "
        f"-1; with nobody bad {gain('KL near', mild('none'))}.",
        f"KL near, at strong splits (0.05 and 0.1), has {near_strong[0]}, {near_strong[1]} and "
        f"{near_strong[2]} there; with nobody bad {gain('KL near', strong('none'))}.",
        f"As a voice of the jury it has {heard[0]}, {heard[1]}, {heard[2]} and "
        f"{gain(voices, mild('none'))} at mild splits, and {heard_strong[0]}, {heard_strong[1]}, "
        f"{heard_strong[2]} and {gain(voices, strong('none'))} at strong ones.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def claims() -> list[str]:
    """What the repository's first page says of the study."""
    first = results.read(results.FIRST_STUDY)
    main = of(results.read(results.RESULTS, RULES), is_main)
    compared, new = results.compare(first), results.compare(main)
    worst = {
        rule: min(one.difference for one in cells.values()) for rule, cells in compared.items()
    }
    gains = [
        one.difference
        for cell, one in compared["jury"].items()
        if cell.corruption == "random labels"
    ]
    lying = {
        rule: min(one.difference for cell, one in new[rule].items() if results.is_lie(cell))
        for rule in ("jury", "next jury")
    }
    runs = sum(len(by_seed) for by_rule in first.values() for by_seed in by_rule.values())
    return [
        f"of {runs:,} runs in {len(first)} settings",
        f"costs at most {-worst['jury']:.1f} points",
        f"gains {min(gains):.1f} to {max(gains):.1f} points where labels are random",
        f"costs up to {-worst['KL near']:.1f} points",
        f"up to {-lying['jury']:.0f} points",
    ]


def made() -> dict[str, str]:
    """The parts of the page that are made of the CSVs, by their names."""
    every = results.read(results.RESULTS)
    runs = results.read(results.RESULTS, RULES)
    main = of(runs, is_main)
    first = results.read(results.FIRST_STUDY)
    number = sum(len(by_seed) for by_rule in runs.values() for by_seed in by_rule.values())
    more = {cell: by_rule for cell, by_rule in every.items() if set(MORE) <= set(by_rule)}
    parts = {
        "extent": f"**{len(runs)} cells in which all {len(RULES)} rules have run, {number} runs**",
        "summary": summary(main, cost=results.costs(results.RESULTS)),
        "corruptions": by_corruption(main),
        "measures": by_measure(main),
        "first": summary(first),
        "first sentences": first_sentences(first),
    }
    rates = by_rate(of(runs, lambda cell: cell.unit == "1.0" and cell.clients == "20"))
    if rates:
        parts["rates"] = rates
    further = of(runs, lambda cell: not is_main(cell) and cell.client_rate == "0.3")
    if further:
        parts["further"] = by_cell(further)
    if more:
        parts["more rules"] = by_cell(
            {
                cell: {name: by_rule[name] for name in (*OTHERS, *MORE)}
                for cell, by_rule in more.items()
            }
        )
    return parts


def written(page: str, parts: Mapping[str, str]) -> str:
    """A page with its made parts made anew."""

    def part(found: re.Match) -> str:
        return f"<!-- made: {found[1]} -->\n{parts[found[1]]}\n<!-- end -->"

    return re.sub(r"<!-- made: ([\w ]+) -->\n.*?<!-- end -->", part, page, flags=re.S)


def main() -> None:
    """Prints the parts, or writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md, and the picture")
    options = parser.parse_args()
    end_worker_at_exit()
    parts = made()
    if not options.write:
        print("\n\n".join(f"## {name}\n\n{text}" for name, text in parts.items()))
        return
    PAGE.write_text(written(PAGE.read_text(), parts))
    draw(of(results.read(results.RESULTS, RULES), is_main), HERE / "regret")


if __name__ == "__main__":
    main()
