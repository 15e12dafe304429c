"""Renews the tables of figures on the pages, and says which figures have moved.

    python examples/benchmarks/renew.py [WORD ...] [--list] [--write]

Above each table of figures stands a line such as

    Figures of `python examples/benchmarks/influence.py` at a362fb8, on any machine. Noise: 5%.

The command is run in the root of the repository. Among the Markdown tables that it prints is one with
the same names in its first row. Its numbers are compared with the page's, one by one. Words choose
tables whose command has one of them. `--write` puts the new tables and the commit into the pages.
The program ends with 1 if a figure has moved by more than the noise, or could not be renewed.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
LINE = (
    r"Figures of (?P<source>.+?) at (?P<commit>\w+), on (?P<machine>.+?)\. Noise: (?P<noise>\d+)%\."
)
TABLE = r"(?:^\|.*\n)+"
NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
Cells = dict[tuple[str, str], str]


class Figures(NamedTuple):
    """A table of figures on a page.

    Attributes:
      page: The page's file, from the root.
      source: What makes it: a command in backticks, or words.
      commit: What it was made at.
      machine: On what.
      noise: By which part of itself a figure may differ.
      table: The table in Markdown.
    """

    page: str
    source: str
    commit: str
    machine: str
    noise: float
    table: str

    @property
    def command(self) -> str | None:
        """The command, unless nothing in the repository makes the table."""
        return self.source.strip("`") if self.source.startswith("`") else None


def pages() -> list[pathlib.Path]:
    """Every page that may hold figures."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/pages/**/*.md")]
    for folder in ("aggregators", "tff_optim", "examples"):
        found += ROOT.glob(f"{folder}/**/*.md")
    return sorted(found)


def figures_of(path: pathlib.Path) -> list[Figures]:
    """The tables of figures of a page."""
    return [
        Figures(
            path.relative_to(ROOT).as_posix(),
            found["source"],
            found["commit"],
            found["machine"],
            int(found["noise"]) / 100.0,
            found["table"],
        )
        for found in re.finditer(rf"^{LINE}\n\n(?P<table>{TABLE})", path.read_text() + "\n", re.M)
    ]


def names_of(table: str) -> list[str]:
    """The cells of a table's first row."""
    return split_row(table.splitlines()[0])


def cells_of(table: str) -> Cells:
    """A table's cells, by their column and as many first cells of their row as tell it apart."""
    names, _, *rows = map(split_row, table.strip().splitlines())
    widths = (n for n in range(1, len(names)) if len({tuple(r[:n]) for r in rows}) == len(rows))
    width = next(widths, 1)
    return {
        (", ".join(row[:width]), name): cell
        for row in rows
        for name, cell in zip(names[width:], row[width:])
    }


def numbers_of(cell: str) -> list[float]:
    """The numbers in a cell."""
    return [float(number.replace(",", "")) for number in re.findall(NUMBER, cell)]


def moved(old: str, new: str, noise: float) -> Iterator[str]:
    """A line for each figure that has moved by more than the noise, is new, or is gone."""
    before, after = cells_of(old), cells_of(new)
    for key in before.keys() | after.keys():
        place = " / ".join(key)
        if key not in after or key not in before:
            yield f"{place}: {'gone' if key not in after else 'new'}"
        elif not _near(before[key], after[key], noise):
            yield f"{place}: {before[key]} -> {after[key]}"


def same_table(figures: Figures, output: str) -> str | None:
    """The table of a command's output that has most of the names in the first row of this one."""
    wanted = set(names_of(figures.table))
    tables = re.findall(TABLE, output + "\n", re.M)
    best = max(tables, key=lambda t: len(wanted & set(names_of(t))), default="")
    return best if best and 2 * len(wanted & set(names_of(best))) > len(wanted) else None


def run(command: str) -> str:
    """What a command writes to its standard output."""
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        executable="/bin/bash",
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout if done.returncode == 0 else ""


def head() -> str:
    """The commit of the checkout."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def write(figures: Figures, table: str) -> None:
    """Puts a new table and the commit of the checkout into the page."""
    path = ROOT / figures.page
    old = f"Figures of {figures.source} at {figures.commit}, "
    above, below = path.read_text().split(figures.table, 1)
    start = above.rindex(old)
    line = above[start:].replace(old, f"Figures of {figures.source} at {head()}, ", 1)
    path.write_text(above[:start] + line + table + below)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="renew tables whose command has one of these")
    parser.add_argument("--list", action="store_true", help="say what would be run")
    parser.add_argument("--write", action="store_true", help="write the new tables into the pages")
    options = parser.parse_args()
    chosen = [
        figures
        for page in pages()
        for figures in figures_of(page)
        if not options.words or any(word in figures.source for word in options.words)
    ]
    outputs: dict[str, str] = {}
    failed = False
    for figures in chosen:
        print(f"{figures.page}: {figures.source} at {figures.commit}", flush=True)
        if options.list:
            continue
        if figures.command is None:
            print("  cannot be renewed", flush=True)
            continue
        if figures.command not in outputs:
            outputs[figures.command] = run(figures.command)
        new = same_table(figures, outputs[figures.command])
        if new is None:
            failed = True
            print("  the command failed, or printed no such table", flush=True)
            continue
        lines = sorted(moved(figures.table, new, figures.noise))
        failed |= bool(lines)
        print(*(f"  {line}" for line in lines or ["nothing has moved"]), sep="\n", flush=True)
        if options.write:
            write(figures, new)
    sys.exit(int(failed))


def split_row(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def _near(old: str, new: str, noise: float) -> bool:
    """Whether two cells have the same words, and numbers that differ by no more than noise."""
    if re.sub(NUMBER, "#", old) != re.sub(NUMBER, "#", new):
        return False
    step = _last_place(old)
    pairs = zip(numbers_of(old), numbers_of(new))
    return all(abs(b - a) <= noise * abs(a) + step for a, b in pairs)


def _last_place(cell: str) -> float:
    """The unit of the last place of a cell's roughest number that is written in places."""
    places = [len(n.partition(".")[2]) for n in re.findall(NUMBER, cell) if "e" not in n]
    return 10.0 ** -min(places, default=99)


if __name__ == "__main__":
    main()
