"""One dialect in the package: "`argument` must be RULE; found VALUE. What to do." """

import ast
import itertools
import pathlib
import re

import pytest

import aggregators
import tff_optim

HOMES = [pathlib.Path(package.__file__).parent for package in (aggregators, tff_optim)]
FILES = [path for home in HOMES for path in sorted(home.rglob("*.py"))]
# What is said of no argument.
OTHERS = (
    "it is not an object",  # words for a `CheckpointError`
    "its checksum does not match",
    "the keys {} occur twice",
    "A `ResidentProcess` cannot be copied or pickled",
    "A hyper-parameter that may change between steps has no truth value",
)
REFUSALS = ("ValueError", "TypeError", "KeyError")
SECTIONS = ("Args:", "Returns:", "Raises:", "Attributes:")


def name_of(path):
    return str(path.relative_to(HOMES[0].parent))


def text_of(node):
    """A literal text with `{}` for what is put into it; None if there is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            getattr(part, "value", None) if isinstance(part, ast.Constant) else "{}"
            for part in node.values
        )
    return None


def refusals(tree):
    """The messages of errors that are raised, with their lines: written out, or made by `refusal`."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        made_by, texts = ast.unparse(node.exc.func), [text_of(arg) for arg in node.exc.args]
        if made_by == "refusal" and len(texts) > 2:
            _, rule, found, advice = [*(text or "{}" for text in texts), ""][:4]
            parts = f"{rule} ", f"{found} "
            wrong = [part for part in parts if re.search(r"\bmust\b|; found|[.;] $", part)]
            assert not wrong, f"line {node.lineno}: {wrong}"
            yield node.lineno, f"`{{}}` must {rule}; found {found}. {advice}"
        # What begins with a name of the program is put together elsewhere.
        elif made_by in REFUSALS and not (texts[0] or "{}").startswith("{}"):
            yield node.lineno, texts[0]


def parsed(path):
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_refusal_says_what_must_be_and_what_was_found(path):
    for line, text in refusals(parsed(path)):
        if text.startswith(OTHERS):
            continue
        rule, _, found = text.partition("; found")
        assert " must " in rule, f"line {line}: {text}"
        assert found, f"line {line}: {text}"
        assert text.rstrip().endswith((".", "}", "?")), f"line {line}: {text}"


def test_the_guard_above_is_not_empty():
    for home in HOMES:
        found = sum(1 for path in FILES if home in path.parents for _ in refusals(parsed(path)))
        assert found > 80, home
    texts = [text for path in FILES for _, text in refusals(parsed(path))]
    assert [other for other in OTHERS if not any(text.startswith(other) for text in texts)] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_of_errors_and_indentation_of_docstrings_are_the_same_everywhere(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler) and node.name:
            assert len(node.name) > 1, f"line {node.lineno}"
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            lines = (ast.get_docstring(node) or "").splitlines()
            for heading, first in itertools.pairwise(lines):
                if heading in SECTIONS:
                    assert first.startswith("  "), first
                    assert first[2] != " ", f"two spaces below {heading} in {path}: {first}"
