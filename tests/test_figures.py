"""Every table of figures says what made it, and the program that renews them finds what has moved."""

import importlib
import pathlib
import re
import shlex
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BENCHMARKS = ROOT / "examples/benchmarks"


def module(name):
    """A program of the benchmarks, imported and not run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


renew = module("renew")

PAGES = [path.relative_to(ROOT).as_posix() for path in renew.pages()]
for name in ("README.md", "tables.md"):  # `test_study.py` compares their tables with the CSVs
    PAGES.remove(f"examples/study/{name}")
FIGURE = re.compile(r"^[+-]?\d[\d.,e+-]*( \(.*\)| ± [\d.]+| %)?$")


def is_of_figures(table):
    """Whether most cells of a table, but for its first column, are numbers."""
    cells = [cell for row in table.splitlines()[2:] for cell in renew.split_row(row)[1:]]
    return 2 * sum(bool(FIGURE.match(cell)) for cell in cells) > len(cells)


@pytest.mark.parametrize("page", PAGES)
def test_every_table_of_figures_names_its_command_machine_and_commit(page):
    text = (ROOT / page).read_text() + "\n"
    found = [table for table in re.findall(renew.TABLE, text, re.M) if is_of_figures(table)]
    named = [figures.table for figures in renew.figures_of(ROOT / page)]
    assert [table.splitlines()[0] for table in found if table not in named] == []


def test_there_are_tables_of_figures_and_their_programs():
    figures = [one for page in PAGES for one in renew.figures_of(ROOT / page)]
    assert len(figures) > 8
    commands = {one.command for one in figures if one.command}
    targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands:
        program, what, *_ = shlex.split(command)
        assert program in ("python", "make")
        exists = (ROOT / what).is_file() if program == "python" else what in " ".join(targets)
        assert exists, command


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path):
    if path.stem == "declearn_vectors":
        pytest.importorskip("declearn")
    module(path.stem)


OLD = """| rule | seconds | ratio |
|---|---|---|
| a | 2.00 | 1.0 |
| b | 1,000 (4) | 2e-8 |
"""


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("2.00", "2.00", []),
        ("2.00", "2.19", []),  # noise
        ("2.00", "2.25", ["a / seconds: 2.00 -> 2.25"]),
        ("1,000 (4)", "1,200 (4)", ["b / seconds: 1,000 (4) -> 1,200 (4)"]),
        ("1,000 (4)", "1,000 (6)", ["b / seconds: 1,000 (4) -> 1,000 (6)"]),
        ("2e-8", "2.1e-8", []),
        ("2e-8", "3e-8", ["b / ratio: 2e-8 -> 3e-8"]),
        ("1.0", "failed", ["a / ratio: 1.0 -> failed"]),
        ("1.0", "-1.0", ["a / ratio: 1.0 -> -1.0"]),
        ("| ratio |", "|", ["a / ratio: gone", "b / ratio: gone"]),
        ("| b |", "| c |", [f"{row} / {n}" for row in "bc" for n in ("ratio", "seconds")]),
    ],
)
def test_figures_that_moved_are_named(before, after, said):
    found = sorted(renew.moved(OLD, OLD.replace(before, after), noise=0.1))
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said))


def test_rows_that_share_their_first_cell_are_told_apart_by_the_next():
    table = "| loop | process | s |\n|---|---|---|\n| x | a | 1.0 |\n| x | b | 2.0 |\n"
    assert renew.cells_of(table) == {("x, a", "s"): "1.0", ("x, b", "s"): "2.0"}


def test_a_table_is_renewed_from_the_output_of_its_command(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    command = r"printf '%s\n' '| a | b |' '|-|-|' '| x | 2.0 |'"
    line = f"Figures of `{command}` at 1234567, on two cores. Noise: 10%."
    before = f"# T\n\n{line}\n\n| a | b |\n|-|-|\n| x | 1.0 |\n\nend\n"
    page.write_text(before)
    monkeypatch.setattr(renew, "ROOT", tmp_path)
    monkeypatch.setattr(renew, "head", lambda: "7654321")
    monkeypatch.setattr(sys, "argv", ["renew.py", "--write"])
    with pytest.raises(SystemExit) as stop:
        renew.main()
    assert stop.value.code == 1
    assert "x / b: 1.0 -> 2.0" in capsys.readouterr().out
    after = page.read_text()
    assert after == before.replace("| x | 1.0 |", "| x | 2.0 |").replace("1234567", "7654321")
    with pytest.raises(SystemExit) as stop:
        renew.main()
    assert stop.value.code == 0
    assert "nothing has moved" in capsys.readouterr().out
