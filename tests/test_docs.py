"""The documentation shows every public name once, and what it takes from the source is right."""

import collections
import importlib.util
import pathlib
import re

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
    shown = collections.Counter(
        name for page in MADE.values() for name in re.findall(r"^::: (\S+)$", page, re.M)
    )
    assert [name for name, times in shown.items() if times > 1] == []
    # A class that two modules offer is shown with one of them.
    by_object = collections.defaultdict(set)
    for name, member in PUBLIC.items():
        by_object[id(member)].add(name)
    missing = [names for names in by_object.values() if not names & shown.keys()]
    assert missing == []


def test_every_rule_has_a_page_with_its_study():
    pages = {path for path in MADE if path.startswith("rules/")}
    assert pages == {"rules/index.md", *(f"rules/{name}.md" for name in rules.__all__)}
    assert (
        "| jury | -0.5 | digits, adam, Dirichlet 0.05, none | -0.1 | +5.9 |"
        in MADE["rules/jury_mean.md"]
    )
    assert "did not run this rule" in MADE["rules/fed_att.md"]


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
            assert path in {*MADE, *WRITTEN} or (ROOT / path).is_file(), (page, target)
