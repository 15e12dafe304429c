"""Checks of numbers that arguments are."""

import numbers
from typing import Any

from tff_optim.core.messages import shown


def whole(value: Any) -> Any:
    """A whole number as Python's, NumPy's too; anything else as it is."""
    is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if is_number else value


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises `ValueError` unless this is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"`{name}` must be a whole number of at least {least}; found {shown(value)}."
        )
