"""Modules import each other in one direction only, and the two packages not at all."""

import ast
import graphlib
import pathlib

import pytest

import aggregators
import tff_optim


def modules():
    """The files of both packages by the names of their modules."""
    found = {}
    for package in (tff_optim, aggregators):
        home = pathlib.Path(package.__file__).parent
        for path in home.rglob("*.py"):
            parts = [package.__name__, *path.relative_to(home).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path, known):
    """Those of the `known` modules that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found |= {name if name in known else node.module} & known
    return found


def test_modules_import_each_other_in_one_direction():
    files = modules()
    graph = {name: imported(path, set(files)) for name, path in files.items()}
    assert sum(map(len, graph.values())) > 200
    graphlib.TopologicalSorter(graph).prepare()  # raises and names a cycle


def test_the_packages_do_not_import_each_other():
    files = modules()
    for name, path in files.items():
        package = name.partition(".")[0]
        assert {other.partition(".")[0] for other in imported(path, set(files))} <= {package}, name


def rooms(package):
    """The arrows between the rooms of a package: its folders, and the files beside them."""
    files = modules()
    arrows = {}
    for name, path in files.items():
        home, _, rest = name.partition(".")
        if home != package:
            continue
        room = rest.partition(".")[0]
        found = {other.partition(".")[2].partition(".")[0] for other in imported(path, set(files))}
        arrows.setdefault(room, set()).update(found - {room})
    return arrows


@pytest.mark.parametrize(
    ("package", "most_rooms", "most_floors"), [("tff_optim", 20, 10), ("aggregators", 12, 7)]
)
def test_a_package_has_few_rooms_on_few_floors(package, most_rooms, most_floors):
    arrows = rooms(package)
    floors = {}
    for room in graphlib.TopologicalSorter(arrows).static_order():  # no arrow back either
        floors[room] = 1 + max((floors[below] for below in arrows[room]), default=0)
    assert len(floors) <= most_rooms
    assert max(floors.values()) <= most_floors, floors
