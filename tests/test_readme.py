"""What the READMEs show runs as shown."""

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


def sections(page, text):
    """The parts of a page whose blocks belong together, by name: a guide is one, a README several."""
    if page.startswith("docs/"):
        return {page: text}
    return {
        f"{page}, {part.splitlines()[0]}": part for part in re.split(r"^## ", text, flags=re.M)[1:]
    }


SECTIONS = {
    name: re.findall(r"^```python\n(.*?)^```", part, re.M | re.S)
    for page, text in PAGES.items()
    for name, part in sections(page, text).items()
}


@pytest.mark.slow
@pytest.mark.parametrize("section", [name for name, blocks in SECTIONS.items() if blocks])
def test_code_blocks_of_a_section_run_in_order(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    namespace: dict = {}
    for block in SECTIONS[section]:
        exec(compile(block, section, "exec"), namespace)


def test_code_blocks_import_what_there_is():
    for name, blocks in SECTIONS.items():
        for block in blocks:
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    exec(compile(ast.unparse(node), name, "exec"), {})


def test_there_are_code_blocks_in_every_room():
    with_code = {name.split(",")[0] for name, blocks in SECTIONS.items() if blocks}
    rooms = {
        "docs/pages/guides/keras.md",
        "docs/pages/guides/optax.md",
        "docs/pages/guides/pipelines.md",
        "docs/pages/guides/loop.md",
        "docs/pages/guides/places.md",
        "docs/pages/guides/rules.md",
    }
    assert {"README.md", *rooms} <= with_code


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 160


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
