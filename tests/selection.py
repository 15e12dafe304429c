"""Which cases of a table run with every change, and which with `make test-all` alone."""

import pytest


def params(cases, quick, unpack=False):
    """Makes parameters of all cases; those that are not `quick` have the mark `slow`.

    Args:
        cases: Names, or a mapping from names to values.
        quick: The names of at least one case of each shape.
        unpack: Whether each value is a tuple with one for each of several arguments.
    """
    missing = set(quick) - set(cases)
    assert not missing, f"`quick` must name some of the cases; found {sorted(missing)}"
    values = cases if isinstance(cases, dict) else dict(zip(cases, cases, strict=True))
    return [
        pytest.param(
            *(value if unpack else [value]),
            id=str(name),
            marks=[] if name in quick else pytest.mark.slow,
        )
        for name, value in values.items()
    ]
