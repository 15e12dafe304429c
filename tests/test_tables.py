"""Tables for pages and papers hold every name as it is, whatever its characters mean there."""

import html.parser
import re

import markdown
import pytest

from tff_optim.simulation import History, Table, plots

NAMES = [
    r"a_b & 5% | $x$ and $y$ \n #1 {x} ~^ <b> `c` *d* **e** [f](g)",
    "__init__",
    "_x_ and y_",
    r"\|\\|",
    "[0]",
    "*",
    "evaluation/accuracy",
    "&amp; <!-- -->",
]


class Cells(html.parser.HTMLParser):
    """The texts of the cells of a page's tables, and every tag."""

    def __init__(self):
        super().__init__()
        self.cells, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if data.strip():
            self.cells[-1] += data


def tables():
    """One with the names as columns, one with them as values: a row each, as `summary` has them."""
    yield Table([{name: i for i, name in enumerate(NAMES)}]), [*NAMES, *map(str, range(len(NAMES)))]
    rows = [{"process": name, "mean": 0.5} for name in NAMES]
    yield Table(rows), ["process", "mean", *(text for name in NAMES for text in (name, "0.5"))]


@pytest.mark.parametrize(("table", "expected"), list(tables()), ids=["columns", "values"])
def test_markdown_shows_names_as_they_are(table, expected):
    page = Cells()
    page.feed(markdown.markdown(table.to_markdown(), extensions=["tables"]))
    assert page.cells == expected
    assert page.tags == {"table", "thead", "tbody", "tr", "th", "td"}


WORDS = {
    "textbackslash": "\\",
    "textasciitilde": "~",
    "textasciicircum": "^",
    "textasciigrave": "`",
    "textless": "<",
    "textgreater": ">",
    "textbar": "|",
}
TOKEN = re.compile(
    r"\\(?P<word>[a-z]+)\{\}|\\(?P<symbol>[&%$#_{}])|\{(?P<group>[\[*])\}|(?P<plain>[^\\&%$#_{}~^<>|`\[*])"
)


def read_by_tex(cell):
    """What TeX sets of a cell; fails for a character that has a meaning there."""
    text, at = "", 0
    while at < len(cell):
        match = TOKEN.match(cell, at)
        assert match, f"{cell[at:]!r} in {cell!r}"
        text += WORDS[match["word"]] if match["word"] else match[match.lastgroup]
        at = match.end()
    return text


@pytest.mark.parametrize(("table", "expected"), list(tables()), ids=["columns", "values"])
def test_latex_shows_names_as_they_are(table, expected):
    first, *rows, last = table.to_latex().split("\n")
    width = len(table.columns)
    kinds = "r" * width if width == len(NAMES) else "lr"
    assert (first, last) == (rf"\begin{{tabular}}{{{kinds}}}", r"\end{tabular}")
    assert rows.pop(1) == r"\hline"
    cells = [cell for row in rows for cell in row.removesuffix(r" \\").split(" & ")]
    assert [read_by_tex(cell) for cell in cells] == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda h: h.summary("loss", target="low"),
            "`target` must be a finite number; found 'low'",
        ),
        (lambda h: h.summary("loss", last=0), "`last` must be a whole number of at least 1"),
        (
            lambda h: h.summary("max process"),
            "`metric` must be a metric of the history; found 'pro",
        ),
        (lambda h: h.best("los"), "must be a metric of which it is known whether more is better"),
        (lambda h: plots.learning_curves(h, "process"), "history, of numbers; found 'process'"),
        (
            lambda h: plots.learning_curves(h, "loss", target="x"),
            "`target` must be a finite number",
        ),
    ],
)
def test_what_cannot_be_summed_up_or_drawn_is_said(call, message):
    history = History(
        Table([{"process": "a", "seed": 0, "round": 1, "loss": 0.5}]), Table(), {}, {}
    )
    with pytest.raises(ValueError, match=message):
        call(history)


def test_tables_of_summaries_keep_the_names_of_processes():
    rounds = [{"process": r"KL_{near} | 5%", "seed": s, "round": 1, "loss": 0.5} for s in (0, 1)]
    summary = History(Table(rounds), Table(), {}, {}).summary("loss", target=0.1)
    assert r"| KL\_{near} \| 5% | 2 | 0.5 | 0 | inf |" in summary.to_markdown()
    assert r"KL\_\{near\} \textbar{} 5\% & 2 & 0.5 & 0 & inf \\" in summary.to_latex()
