"""Checks of arguments that are numbers or flags."""

import math
import numbers

from tff_optim.core.messages import refusal, shown
from tff_optim.core.numbers import FINITE, Interval
from tff_optim.core.types import Value


def whole(value: Value) -> Value:
    """A whole number as Python's, NumPy's too; anything else as it is."""
    is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if is_number else value


def check_whole(
    name: str, value: Value, least: int, most: float = math.inf, *, optional: bool = False
) -> None:
    """Raises `ValueError` unless this is a whole number in a range, or None where that may be."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not (is_whole and least <= value <= most) and not (optional and value is None):
        end = "" if most == math.inf else f" and at most {most}"
        rule = f"be a whole number of at least {least}{end}{' or None' if optional else ''}"
        raise refusal(name, rule, shown(value))


def check_flag(
    name: str, value: object, *, optional: bool = False, error: type[Exception] = ValueError
) -> None:
    """Raises an error unless this is True or False, or None where that may be."""
    if not isinstance(value, bool) and not (optional and value is None):
        rule = "be True, False or None" if optional else "be True or False"
        raise refusal(name, rule, shown(value), error=error)


def check_number(name: str, value: Value, allowed: Interval = FINITE) -> None:
    """Raises `ValueError` unless this is a finite number in an interval."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and value in allowed):
        raise refusal(name, f"be {allowed.words}", shown(value))
