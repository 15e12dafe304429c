"""What the pages show runs as shown, and where they are short."""

import ast
import pathlib
import re

import matplotlib
import pytest

matplotlib.use("Agg")

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for pattern in (
        "README.md",
        "tff_optim/**/README.md",
        "aggregators/**/README.md",
        "examples/**/README.md",
        "docs/pages/**/*.md",
    )
    for path in sorted(ROOT.glob(pattern))
}


BLOCKS = {
    page: re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) for page, text in PAGES.items()
}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_code_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    namespace: dict = {}
    for block in BLOCKS[page]:
        exec(compile(block, page, "exec"), namespace)


def test_code_blocks_import_what_there_is():
    for name, blocks in BLOCKS.items():
        for block in blocks:
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    exec(compile(ast.unparse(node), name, "exec"), {})


def test_every_guide_shows_code():
    without = {"index", "older_tff", "torch"}  # the last two: tables, and another Python
    guides = {pathlib.Path(p).stem for p in PAGES if p.startswith("docs/pages/guides/")}
    assert len(guides) > 10
    assert {g for g in guides if not BLOCKS[f"docs/pages/guides/{g}.md"]} == without


def test_the_first_page_is_short_and_begins_with_code():
    assert len(README.splitlines()) <= 120
    first, comparison, *_ = BLOCKS["README.md"]
    assert len(first.splitlines()) <= 18
    assert "rule=rules.jury_mean()" in first
    assert "simulation.run(" in comparison


FOLDERS = [page for page in PAGES if "/" in page and page.endswith("README.md")]
FOLDERS.remove("examples/study/README.md")  # the study itself, which is long


@pytest.mark.parametrize("page", FOLDERS)
def test_the_page_of_a_folder_is_short(page):
    assert len(PAGES[page].splitlines()) <= 60


def test_every_make_target_named_exists():
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.M)
    targets = {target for rule in rules for target in rule.split()}
    named = set(re.findall(r"`make ([\w-]+)|^make ([\w-]+)", README, re.M))
    named = {name for pair in named for name in pair if name}
    assert {"example", "test"} <= named <= targets


def anchors(text):
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_heading_linked_exists(page):
    for name, heading in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", PAGES[page]):
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), name
        if heading:
            assert heading in anchors(path.read_text()), (name, heading)
