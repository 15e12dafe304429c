"""The documentation shows every public name once, and what it takes from the source is right."""

import ast
import collections
import importlib.util
import os
import pathlib
import re

import pytest
from test_docstrings import PUBLIC

from aggregators import rules
from tff_optim import projections, regularizers, transforms

ROOT = pathlib.Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("made_pages", ROOT / "docs/made_pages.py")
made_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made_pages)
MADE = made_pages.made()
WRITTEN = {
    path.relative_to(ROOT / "docs/pages").as_posix(): path.read_text()
    for path in sorted((ROOT / "docs/pages").rglob("*.md"))
}
CONFIG = (ROOT / "docs/mkdocs.yml").read_text()


def test_every_public_name_is_shown_once():
    names = [n for page in MADE.values() for n in re.findall(r"^::: (\S+)$", page, re.M)]
    # A function in a file of its own name is public one level above.
    shown = collections.Counter(re.sub(r"\.(\w+)\.\1$", r".\1", name) for name in names)
    assert [name for name, times in shown.items() if times > 1] == []
    # A class that two modules offer is shown with one of them.
    by_object = collections.defaultdict(set)
    for name, member in PUBLIC.items():
        by_object[id(member)].add(name)
    missing = [names for names in by_object.values() if not names & shown.keys()]
    assert missing == []


def test_what_a_docstring_runs_is_under_the_heading_that_the_site_shows_as_code():
    for path in sorted(
        p for package in made_pages.PACKAGES for p in (ROOT / package).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                shown = re.search(r"^Example:.*\n(?:.*\n)*?  >>> ", text, re.M)
                assert shown or ">>> " not in text, (path.name, node)
                assert not re.search(r"^>>> ", text, re.M), (path.name, node)


def test_every_rule_has_a_page_with_its_study_and_its_cost():
    pages = {path for path in MADE if path.startswith("rules/")}
    assert pages == {"rules/index.md", *(f"rules/{name}.md" for name in rules.__all__)}
    assert "\n| jury |" in MADE["rules/jury_mean.md"]
    assert "\n| digits, 0.1, none | 1 |" in MADE["study_cells.md"]
    assert "\n| TFF robust |" not in MADE["rules/jury_mean.md"]
    assert "did not run this rule" in MADE["rules/fed_att.md"]
    for name in rules.__all__:
        cost = MADE[f"rules/{name}.md"].partition("## What it costs")[2]
        assert "python examples/benchmarks/rules.py" in cost
        # A round that does more is no cheaper than plain averaging, but for noise.
        assert re.findall(rf"^\| {name}[, a-zKL]* *\| \d\.\d+ *\| (\d\.\d+) *\|$", cost, re.M), name


# What users ask first, and where the site answers it: a page and its heading, with words that answer.
ASKED = {
    "how do I clip per example": ("guides/privacy.md", "clip-each-example", "ExampleClipping("),
    "how do I resume": ("guides/checkpoints.md", "", "goes on where the last one was killed"),
    "my own score": ("guides/own.md", "a-score", "@scores.score("),
    "run on a GPU": ("guides/gpu.md", "what-it-needs", "450.80.02"),
    "old TFF code": ("guides/older_tff.md", "", "build_federated_averaging_process"),
    "declearn JSON": ("guides/declearn.md", "configurations", "json.loads"),
}


def links_of(page):
    """The pages of the site that a page links to."""
    text = (MADE | WRITTEN)[page]
    text = text if page in MADE else made_pages.linked(text, f"docs/pages/{page}", page)
    folder = os.path.dirname(page)
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text)
    return {(os.path.normpath(os.path.join(folder, p)) if p else page, a) for p, a in links}


@pytest.mark.parametrize("question", ASKED)
def test_what_users_ask_is_answered_within_two_clicks_of_the_first_page(question):
    page, heading, words = ASKED[question]
    first = links_of("index.md")
    second = set().union(*(links_of(p) for p, _ in first if p in MADE | WRITTEN))
    there = {a for p, a in first | second if p == page}
    assert there, page
    text = (MADE | WRITTEN)[page]
    if heading:  # the second click: from another page, or on the page's own table of contents
        title = re.search(rf"^## ({heading.replace('-', '.')})$", text, re.M | re.I)
        assert title, heading
        text = text[title.end() :]
    assert words in text


def test_the_list_of_parts_has_every_part_of_a_pipeline():
    page = WRITTEN["guides/pipelines.md"]
    (parts,) = re.findall(r"^## Parts$.*?(?=^```)", page, re.M | re.S)
    named = set(re.findall(r"\b[A-Z]\w+", " ".join(re.findall(r"`([^`]+)`", parts))))
    public = {*transforms.__all__, *regularizers.__all__, *projections.__all__}
    assert named == public


def test_every_page_is_reached_from_the_navigation():
    named = set(re.findall(r": (\S+\.md)$", CONFIG, re.M))
    sections = set(re.findall(r": (\w+/)$", CONFIG, re.M))
    for path in {*WRITTEN, *MADE}:
        assert path in named or path.startswith(tuple(sections)), path


def test_every_link_leads_to_a_page_or_a_file():
    for page, text in MADE.items():
        for target in re.findall(
            r"\]\((?!https?:|#)([^)#\s]+)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        ):
            path = (ROOT / page).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
            files = (ROOT / path, ROOT / "docs/pages" / path)
            assert path in {*MADE, *WRITTEN} or any(f.is_file() for f in files), (page, target)
