"""What README.md shows runs as shown."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECTIONS = {
    section.splitlines()[0]: re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    for section in re.split(r"^## ", README, flags=re.M)[1:]
}


@pytest.mark.parametrize("section", [name for name, blocks in SECTIONS.items() if blocks])
def test_code_blocks_of_a_section_run_in_order(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    namespace: dict = {}
    for block in SECTIONS[section]:
        exec(compile(block, f"README.md, {section}", "exec"), namespace)


def test_there_are_code_blocks():
    assert sum(bool(blocks) for blocks in SECTIONS.values()) >= 2


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake (\w+)", README))
    assert {"example", "test"} <= named <= targets


def test_every_file_named_exists():
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
