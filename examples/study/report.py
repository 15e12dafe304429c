"""Tables, sentences and the picture of the study, from its CSVs.

python examples/study/report.py            prints what the page's made parts are
python examples/study/report.py --write    writes them into its pages, and draws the picture
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
import run
from matplotlib.colors import LinearSegmentedColormap
from results import PLAIN, RULES, Cell, Runs, is_main, mean, of, signed, summary, table

from tff_optim.interrupts import end_worker_at_exit
from tff_optim.simulation import plots

HERE = pathlib.Path(__file__).parent
PAGES = (HERE / "README.md", HERE / "tables.md")
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
        figsize=(15.0, 3.2 + 0.27 * len(kinds)),
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
                text = "0" if abs(value) < 0.5 else f"{value:+.0f}"
                color = "white" if abs(value) > 14.0 else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
        axes.set_yticks(range(len(kinds)), kinds if axes is panels[0] else [], fontsize=8)
        axes.set_xticks(range(len(rules)), rules, rotation=45, ha="left", fontsize=8)
        axes.xaxis.tick_top()
        axes.set_xlabel(f"{task}: late accuracy less that of FedAvg, in points")
    figure.colorbar(image, ax=panels[: len(names)], extend="both", label="points", shrink=0.8)
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
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.01))


def findings(runs: Runs, further: Runs, more: Runs) -> str:
    """What the study found, in sentences.

    Args:
      runs: Of the cells that the page is about.
      further: Of other cells.
      more: Of the cells in which KL far and votes on held-out data have run, too.
    """
    compared = results.compare(runs)
    regret = results.regrets(compared)

    def honest(rule: str) -> str:
        return signed(min(x.difference for c, x in compared[rule].items() if not results.is_lie(c)))

    def lying(rule: str) -> str:
        return signed(min(x.difference for c, x in compared[rule].items() if results.is_lie(c)))

    def others(rule: str) -> str:
        lies = {c: x for c, x in compared[rule].items() if results.is_lie(c)}
        return signed(
            min(x.difference for c, x in lies.items() if not c.corruption.startswith("inside"))
        )

    def behind(rule: str, lies: bool) -> str:
        found = [x for cell, x in regret[rule].items() if results.is_lie(cell) == lies]
        return f"{statistics.fmean(found):.1f}"

    def left(rule: str) -> str:
        found = [x.mean for c, x in compared[rule].items() if c.corruption == "inside, lies, 20 %"]
        return f"{statistics.fmean(found):.0f}"

    clean = Cell("digits", "sgd", "0.1", "none", unit="0.1")
    scaled = {rule: cells[clean].difference for rule, cells in results.compare(further).items()}
    crowd = Cell("digits", "sgd", "0.1", "random labels", clients="60")
    pair = results.read(results.RESULTS, (PLAIN, "jury"))[crowd]
    many = [
        signed(results.late(curve) - results.late(pair[PLAIN][seed]))
        for seed, curve in pair["jury"].items()
    ]
    all_of_jury = results.compare(further)["jury"]
    aside = signed(
        min(
            one.difference
            for cell, one in all_of_jury.items()
            if not results.is_lie(cell) and cell != crowd
        )
    )
    few = results.compare(more)
    held, longest, far = few["next jury, held-out votes"], few["next jury"], few["KL far"]
    fewer = sum(held[cell].difference < longest[cell].difference for cell in more)
    ours, theirs = compared["next jury"], compared["jury"]
    better = sum(ours[cell].difference > theirs[cell].difference for cell in runs)
    lines = [
        "**Where clients tell the truth**, the worst cell is "
        f"{honest('redescending')} for the redescending mean, {honest('jury')} for the jury, "
        f"{honest('three voices')} for three voices and "
        f"{honest('next jury')} for the next jury; mean regret {behind('redescending', False)}, "
        f"{behind('jury', False)}, {behind('three voices', False)} and {behind('next jury', False)}. "
        f"FedAvgM's worst is {honest('FedAvgM')}, TFF's robust aggregator's {honest('TFF robust')}.",
        f"**Where clients lie, no jury is safe**: the worst cell is {lying('jury')} for the jury, "
        f"{lying('three voices')} for three voices and {lying('next jury')} for the next jury. A client "
        "that says it has a loss and a distance of 0 counts for most in what it then votes for. KL near "
        f"and low loss alone lose up to {lying('KL near')} and {lying('loss near')}.",
        "**Where clients may be hostile, no rule is safe.** At worst TFF's robust aggregator loses "
        f"least: {lying('TFF robust')}. The redescending mean has {lying('redescending')} against "
        f"colluders just inside its threshold, and {others('redescending')} at worst against all "
        f"others, where TFF's has {others('TFF robust')}. Centered clipping has "
        f"{lying('centered clipping')}, multi-Krum {lying('multi-Krum')}, the geometric median "
        f"{lying('geometric median')}.",
        "**Near plain averaging is not unharmed.** Colluders just inside the threshold, 20 % of the "
        f"clients, leave plain averaging {left(PLAIN)} % accuracy in the mean over tasks and splits, "
        f"and the redescending mean {left('redescending')} %; the geometric median has "
        f"{left('geometric median')} %, centered clipping {left('centered clipping')} %, multi-Krum "
        f"{left('multi-Krum')} %.",
        "**Rules over all updates gain most in some cells and lose most in others.** Where clients tell "
        f"the truth, the worst cell of multi-Krum is {honest('multi-Krum')}, of the geometric median "
        f"{honest('geometric median')}, of centered clipping {honest('centered clipping')}.",
        f"**The default of `jury_mean` stays.** The next jury is better than the jury in {better} of "
        f"{len(runs)} cells. But liars take it further below plain averaging than the half "
        "point that was asked of it, a round of it costs more, and one seed confirms nothing.",
        "**Votes on held-out data do not help**: the next jury whose clients keep a tenth of their "
        f"data from training to vote on is below the next jury in {fewer} of {len(more)} cells.",
        f"**One seed says little.** With 60 clients and random labels the jury has {many[0]}; on two "
        f"further seeds, {many[1]} and {many[2]}. That one aside, its worst cell where clients tell the "
        f"truth, of all tables, is {aside}.",
        "**Where norms may not be about 1, give `initial_norm=None`**: with norms ten times as long and "
        f"nobody bad the redescending mean has {signed(scaled['redescending'])}, the jury "
        f"{signed(scaled['jury'])}, and the next jury, which finds the norm in the first round, "
        f"{signed(scaled['next jury'])}.",
        "**KL far** has "
        + ", ".join(f"{signed(far[cell].difference)} ({cell.corruption})" for cell in more)
        + ": where clients differ, it hands the round to the longest updates.",
    ]
    return "\n".join(f"- {line}" for line in lines)


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

    def least(inside: bool) -> float:
        cells = {c: x for c, x in new["redescending"].items() if results.is_lie(c)}
        return min(
            x.difference for c, x in cells.items() if c.corruption.startswith("inside") == inside
        )

    runs = sum(len(by_seed) for by_rule in first.values() for by_seed in by_rule.values())
    return [
        f"of {runs:,} runs in {len(first)} settings",
        f"costs at most {-worst['jury']:.1f} points",
        f"gains {min(gains):.1f} to {max(gains):.1f} points where labels are random",
        f"costs up to {-worst['KL near']:.1f} points",
        f"up to {-lying['jury']:.0f} points",
        f"costs at most {-least(False):.1f} points, but {-least(True):.1f} against colluders",
    ]


def made() -> dict[str, str]:
    """The parts of the page that are made of the CSVs, by their names."""
    every = results.read(results.RESULTS)
    planned = run.blocks()
    done = run.done_before(results.RESULTS)
    parts_of_plan: dict[str, list[bool]] = {}
    for (cell, names), part in planned.items():
        is_done = all((*(str(x) for x in cell), name) in done for name in names)
        parts_of_plan.setdefault(part, []).append(is_done)
    runs = results.read(results.RESULTS, RULES)
    main = of(runs, is_main)
    kinds = dict.fromkeys(cell.corruption for cell in main)
    lacking = [
        f"{task}, {split}, {kind}"
        for (task, split), kind in itertools.product(results.MAIN, kinds)
        if Cell(task, "sgd", split, kind) not in main
    ]
    apart = f" but {'; '.join(lacking)}, which were not run" if lacking else ""
    first = results.read(results.FIRST_STUDY)
    number = sum(len(by_seed) for by_rule in runs.values() for by_seed in by_rule.values())
    more = {cell: by_rule for cell, by_rule in every.items() if set(MORE) <= set(by_rule)}
    few = {cell: {n: by_rule[n] for n in (*OTHERS, *MORE)} for cell, by_rule in more.items()}
    parts = {
        "findings": findings(main, runs, few),
        "more rules": by_cell(few),
        "extent": f"**{len(runs)} cells in which all {len(RULES)} rules have run, {number} runs.** This "
        f"table is of {len(main)} of them: digits and topics, each at splits 0.1 and 0.5, with every "
        f"kind of bad clients{apart}.",
        "plan": table(
            ["part of the plan", "blocks run", "planned"],
            [[part, str(sum(x)), str(len(x))] for part, x in parts_of_plan.items()],
        ),
        "summary": summary(main, cost=results.costs(results.COSTS)),
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
    return parts


def written(page: str, parts: Mapping[str, str]) -> str:
    """A page with its made parts made anew."""

    def part(found: re.Match) -> str:
        return f"<!-- made: {found[1]} -->\n{parts[found[1]]}\n<!-- end -->"

    return re.sub(r"<!-- made: ([\w ]+) -->\n.*?<!-- end -->", part, page, flags=re.S)


def main() -> None:
    """Prints the parts, or writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into the pages, and the picture")
    options = parser.parse_args()
    end_worker_at_exit()
    parts = made()
    if not options.write:
        print("\n\n".join(f"## {name}\n\n{text}" for name, text in parts.items()))
        return
    for page in PAGES:
        page.write_text(written(page.read_text(), parts))
    draw(of(results.read(results.RESULTS, RULES), is_main), HERE / "regret")


if __name__ == "__main__":
    main()
