"""Which numbers a hyper-parameter may be, and the check that a given one is."""

import math
from typing import Any

import attrs
import numpy as np

from tff_optim.core.messages import shown


@attrs.frozen
class Interval:
    """Which finite numbers are allowed.

    Attributes:
      words: The rule in words, for messages.
      lower: The lower end.
      upper: The upper end.
      open_lower: Whether the lower end itself is left out.
      open_upper: Whether the upper end itself is left out.

    Example:
      >>> 1.0 in Interval("a number in [0, 1)", 0.0, 1.0, open_upper=True)
      False
    """

    words: str
    lower: float = -math.inf
    upper: float = math.inf
    open_lower: bool = False
    open_upper: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and bool(self.holds(value))

    def holds(self, value: Any) -> Any:
        """Whether a finite number, or each element of a tensor, is in the interval."""
        above = value > self.lower if self.open_lower else value >= self.lower
        below = value < self.upper if self.open_upper else value <= self.upper
        return above & below


FINITE = Interval("a finite number")
NON_NEGATIVE = Interval("a number of at least 0", lower=0.0)
POSITIVE = Interval("a number greater than 0", lower=0.0, open_lower=True)
FRACTION = Interval("a number in [0, 1)", lower=0.0, upper=1.0, open_upper=True)
UNIT = Interval("a number in [0, 1]", lower=0.0, upper=1.0)


def single(value: float) -> float:
    """`value` as TensorFlow computes with it in float32, where subnormal numbers are 0."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    return rounded if abs(rounded) >= np.finfo(np.float32).tiny else 0.0


def to_float(value: Any) -> Any:
    """Integers and NumPy scalars as Python floats; anything else as it is, for the check."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # an integer of hundreds of digits
            return math.inf if value > 0 else -math.inf
    return value


def checked_number(owner: str, name: str, value: Any, allowed: Interval, also: str = "") -> float:
    """Returns a number as a Python float, after checking it.

    Args:
      owner: Whose hyper-parameter it is, for the message.
      name: The name of the hyper-parameter, for the message.
      value: A Python or NumPy number.
      allowed: The numbers that are allowed, as given and when rounded to float32.
      also: What else would be allowed here, for the message: " or a Keras schedule".

    Raises:
      TypeError: If `value` is not a number.
      ValueError: If it is not finite or not allowed.

    Example:
      >>> checked_number("Adam", "beta_1", np.float32(0.5), FRACTION)
      0.5
    """
    number = to_float(value)
    rule = f"`{name}` of `{owner}` must be {allowed.words}{also}; found {shown(value)}"
    if not isinstance(number, float):
        raise TypeError(f"{rule}. Give a Python or NumPy number.")
    if number not in allowed:
        raise ValueError(f"{rule}.")
    kept = single(number)
    if kept not in allowed:
        raise ValueError(f"{rule}, which is {kept!r} when rounded to float32.")
    return number
