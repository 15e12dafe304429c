"""Pages of the site that are made of the source: a page for each public module, one for each rule.

Names and docstrings are read from the files: nothing is imported, so this needs no TensorFlow.
"""

import ast
import functools
import importlib.util
import os
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("tff_optim", "aggregators")
# Public modules that their package does not import by itself.
BESIDE = ("tff_optim.simulation", "tff_optim.resident", "tff_optim.interrupts", "tff_optim.doctor")
# Pages of the repository that are pages of the site, too.
PAGES_OF = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples/index.md",
    "examples/study/README.md": "study.md",
    "examples/study/tables.md": "study_tables.md",
    "examples/benchmarks/rivals/README.md": "benchmarks/rivals.md",
}
# What a page of the site stands for, where the repository has a folder's own page.
INSTEAD = {"examples/benchmarks/README.md": "benchmarks/index.md"}
STUDY = ROOT / "examples/study/README.md"
COSTS = ROOT / "docs/pages/benchmarks/aggregation.md"
# What a rule is called on the study's page.
STUDIED = {
    "jury_mean": ("jury", "three voices", "next jury"),
    "redescending_mean": ("redescending",),
    "adaptive_mean": ("KL near", "loss near"),
    "geometric_median": ("geometric median",),
    "multi_krum": ("multi-Krum",),
    "centered_clipping": ("centered clipping",),
}


def source_of(module: str) -> pathlib.Path | None:
    """The file of a module, if there is one."""
    path = ROOT.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


@functools.cache
def public_names(module: str) -> tuple[str, ...]:
    """The names that `__all__` of a module lists, or its public functions and classes."""
    tree = ast.parse(source_of(module).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == [
            "__all__"
        ]:
            return tuple(ast.literal_eval(node.value))
    made = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return tuple(name for name in made if not name.startswith("_"))


def identifier(name: str) -> str:
    """Where a public name is found: in the module of that name, if its file is called after it."""
    return f"{name}.{name.rpartition('.')[2]}" if source_of(name) else name


def first_line(module: str) -> str:
    """The first line of a module's docstring."""
    return ast.get_docstring(ast.parse(source_of(module).read_text())).splitlines()[0]


@functools.cache
def modules() -> dict[str, tuple[str, ...]]:
    """Every public module, with the names that are shown on its page. No name is shown twice."""
    found: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for module in (*PACKAGES, *BESIDE):
        for name in public_names(module):
            inner = f"{module}.{name}"
            if source_of(inner) and name not in seen:
                found[inner] = public_names(inner)
        listed = [
            n for n in public_names(module) if not source_of(f"{module}.{n}") and n not in seen
        ]
        found[module] = tuple(listed)
        seen.update(listed)
    return {module: found[module] for module in sorted(found)}


def reference_page(module: str) -> str:
    """A page with the docstrings of a module's public names."""
    parts = [f"# {module}", "", first_line(module), ""]
    if module == "aggregators.rules":
        parts += ["Each rule has [a page of its own](../rules/index.md).", ""]
        return "\n".join(parts)
    for name in modules()[module]:
        parts += [f"::: {identifier(f'{module}.{name}')}", ""]
    return "\n".join(parts)


def rows_of(text: str, names: tuple[str, ...]) -> list[str]:
    """Of the first table in a text: its head, and the rows that begin with one of these names."""
    head, line, *rows = re.search(r"(?:^\|.*\n)+", text, re.M)[0].splitlines()
    rows = [row for row in rows if row.split("|")[1].strip() in names]
    return [head, line, *rows] if rows else []


@functools.cache
def study() -> str:
    """What the study's page says of rules, from the first of its tables that is of rules."""
    return re.search(r"^\| rule \|.*", STUDY.read_text(), re.M | re.S)[0]


@functools.cache
def costs() -> str:
    """The section of the benchmarks on a round by each rule."""
    return COSTS.read_text().partition("## A round by each rule\n")[2].partition("\n## ")[0]


def study_rows(rule: str) -> str:
    """The rows of a rule in the study, as a table; a sentence if it was not part of it."""
    rows = rows_of(study(), STUDIED.get(rule, ()))
    if not rows:
        verb = "compares all others with" if rule == "plain_mean" else "did not run"
        return f"The study {verb} this rule."
    about = "Points of late accuracy against FedAvg, from [the study](../study.md)."
    return "\n".join([about, "", *rows])


def cells_page() -> str:
    """Every cell of both studies, which the study's own module reads."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "examples/study/results.py")
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    parts = [
        "# All cells of the study",
        "",
        "Late accuracy of FedAvg in percent, and the difference of each other rule to it in points, "
        "with the standard error over seeds where there are several. [The study](study.md) says "
        "what was run.",
        "",
        results.every_cell(results.read(results.RESULTS, results.RULES)),
        "",
        "## The first study",
        "",
        results.every_cell(results.read(results.FIRST_STUDY)),
        "",
    ]
    return "\n".join(parts)


def cost_rows(rule: str) -> str:
    """What a round of a rule costs, as a table, with the line that says how it was measured."""
    measured = re.search(r"^Figures of .*$", costs(), re.M)[0]
    names = {name for name in re.findall(r"^\| ([^|]*?) *\|", costs(), re.M)}
    rows = rows_of(costs(), tuple(n for n in names if n.split(",")[0] == rule))
    if not rows:
        raise ValueError(f"{COSTS} does not say what {rule} costs")
    about = (
        "A round of ten clients with ten batches of 32, a network of 397,510 numbers, in TensorFlow of "
        "the Python process ([all rules](../benchmarks/aggregation.md))."
    )
    return "\n".join([about, "", measured, "", *rows])


def summary_of(rule: str) -> str:
    """The first line of a rule's docstring."""
    for path in sorted((ROOT / "aggregators/rules").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == rule:
                return ast.get_docstring(node).splitlines()[0]
    raise ValueError(f"no rule {rule}")


def rule_page(rule: str) -> str:
    """A rule's docstring, its rows of the study and its cost."""
    name = f"aggregators.rules.{rule}"
    options = {"heading_level": 1, "heading": name, "toc_label": rule}
    lines = [f"::: {identifier(name)}", "    options:"]
    docstring = "\n".join([*lines, *(f"      {key}: {value}" for key, value in options.items())])
    study_part = f"## In the study\n\n{study_rows(rule)}"
    return f"{docstring}\n\n{study_part}\n\n## What it costs\n\n{cost_rows(rule)}\n"


def rules_page() -> str:
    """A table of all rules."""
    rows = [f"| [`{r}`]({r}.md) | {summary_of(r)} |" for r in public_names("aggregators.rules")]
    head = [
        "# Rules",
        "",
        first_line("aggregators.rules"),
        "",
        "| rule | what it does |",
        "|---|---|",
    ]
    return "\n".join(head + rows) + "\n"


def reference_index() -> str:
    """A table of all public modules."""
    rows = [f"| [`{m}`]({m}.md) | {first_line(m)} |" for m in modules()]
    return "\n".join(["# Reference", "", "| module | |", "|---|---|", *rows]) + "\n"


def site_path(source: str) -> str | None:
    """Where a file of the repository is on the site: a page, a file beside the pages, or nowhere."""
    if source in PAGES_OF | INSTEAD:
        return (PAGES_OF | INSTEAD)[source]
    if source.startswith("docs/pages/"):
        return source.removeprefix("docs/pages/")
    if source.startswith("examples/") and source.endswith(".py"):
        return source.removesuffix(".py") + ".md"
    return source if source.endswith((".png", ".ipynb", ".lock", ".csv", ".cff")) else None


def linked(text: str, source: str, target: str) -> str:
    """A page's text with links from its place in the repository turned into links on the site.

    A link to what the site does not hold, such as the packages' source, becomes its text.
    """

    def link(found: re.Match) -> str:
        words, path, anchor = found[1], found[2], found[3] or ""
        goal = os.path.normpath(os.path.join(os.path.dirname(source), path))
        if (ROOT / goal).is_dir():
            goal += "/README.md"
        place = site_path(goal)
        if place is None and goal.startswith((*PACKAGES, "tests", "examples")):
            return words
        if place is None:
            raise ValueError(f"{source} links to {goal}, which has no place on the site")
        return f"[{words}]({os.path.relpath(place, os.path.dirname(target) or '.')}{anchor})"

    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)", link, text)


def program_page(path: pathlib.Path) -> str:
    """A program of the examples, with its docstring above it."""
    code = path.read_text()
    about = ast.get_docstring(ast.parse(code)) or path.stem
    return f"# {path.stem}\n\n{about.splitlines()[0]}\n\n```python\n{code.rstrip()}\n```\n"


@functools.cache
def made() -> dict[str, str]:
    """All pages that are made of the source, by their paths."""
    pages = {"reference/index.md": reference_index(), "rules/index.md": rules_page()}
    pages["study_cells.md"] = cells_page()
    pages |= {f"reference/{module}.md": reference_page(module) for module in modules()}
    pages |= {f"rules/{rule}.md": rule_page(rule) for rule in public_names("aggregators.rules")}
    for source, target in PAGES_OF.items():
        pages[target] = linked((ROOT / source).read_text(), source, target)
    for path in sorted((ROOT / "examples").rglob("*.py")):
        pages[site_path(path.relative_to(ROOT).as_posix())] = program_page(path)
    return pages


def on_config(config):
    """Fills the sections of the navigation that end with a slash."""
    for function in (
        made,
        modules,
        public_names,
        study,
        costs,
    ):  # `docs-serve` builds again and again
        function.cache_clear()

    def filled(entry):
        ((title, target),) = entry.items()
        if not isinstance(target, str) or not target.endswith("/"):
            return entry
        # Programs of deeper folders are linked from their pages.
        paths = [p for p in made() if p.startswith(target) and "/" not in p[len(target) :]]
        paths.sort(key=lambda path: (not path.endswith("/index.md"), path.removesuffix(".md")))
        names = ["All" if p.endswith("/index.md") else p[len(target) : -len(".md")] for p in paths]
        return {title: [{name: path} for name, path in zip(names, paths)]}

    config["nav"] = [filled(entry) for entry in config["nav"]]
    return config


def on_page_markdown(markdown, page, config, files):
    """Turns the links of written pages, which lead through the repository, into links on the site.

    A search shows guides before programs.
    """
    kind = page.file.src_uri.partition("/")[0]
    page.meta["search"] = {"boost": {"guides": 4.0, "rules": 2.0, "examples": 0.25}.get(kind, 1.0)}
    if page.file.src_uri not in made():
        return linked(markdown, f"docs/pages/{page.file.src_uri}", page.file.src_uri)
    return markdown


def on_files(files, config):
    """Adds the pages that are made of the source, and the files that they show or link."""
    from mkdocs.structure.files import File  # lies in the site's environment only

    for path, content in made().items():
        files.append(File.generated(config, path, content=content))
    for pattern in (
        "examples/**/*.png",
        "examples/*.ipynb",
        "examples/study/*.csv",
        "requirements.lock",
        "CITATION.cff",
    ):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
