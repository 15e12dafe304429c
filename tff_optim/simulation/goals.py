"""Goals: metrics, and whether more of them is better."""

import math
from collections.abc import Mapping

import attrs

from tff_optim.core.messages import shown
from tff_optim.core.types import Json, Value

_SIGNS = {"max": 1.0, "min": -1.0}
_KNOWN = {"accuracy": 1.0, "loss": -1.0}  # words in a name that say which values are better


@attrs.frozen
class Goal:
    """A metric, and whether more of it is better; see `goal`.

    Attributes:
      name: The name of the metric.
      sign: 1 if the largest value is best, -1 if the smallest is.
    """

    name: str
    sign: float

    def value(self, record: Mapping[str, Json]) -> float:
        """The signed value in a record, so that larger is better; minus infinity without one."""
        value = record.get(self.name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return -math.inf
        return self.sign * value

    def check(self, argument: str, record: Mapping[str, Json]) -> None:
        """Raises `ValueError` if the metric is missing where it must occur, so that it is misspelt.

        It must occur in the first round of training with clients; a metric of an evaluation, in the
        first such round that is evaluated.
        """
        of_evaluation = [name for name in record if name.startswith("evaluation/")]
        is_due = record["round"] > 0 and record.get("drawn_clients", 1) > 0
        if self.name.startswith("evaluation/"):
            is_due = is_due and bool(of_evaluation)
        if is_due and self.name not in record:
            raise ValueError(
                f"`{argument}` must be a metric of the run; found {self.name!r}, and there are "
                f"{list(record)}."
            )


def goal(argument: str, text: Value) -> Goal:
    """Reads `"max NAME"`, `"min NAME"`, or a name that contains `accuracy` or `loss`.

    Example:
      >>> goal("metric", "evaluation/accuracy"), goal("metric", "min evaluation/seconds")
      (Goal(name='evaluation/accuracy', sign=1.0), Goal(name='evaluation/seconds', sign=-1.0))

    Args:
      argument: The name of the argument.
      text: The argument.

    Raises:
      ValueError: If it does not say which values are better.
    """
    if isinstance(text, str):
        word, _, name = text.partition(" ")
        if word in _SIGNS and name:
            return Goal(name, _SIGNS[word])
        signs = {sign for known, sign in _KNOWN.items() if known in text}
        if len(signs) == 1:
            return Goal(text, signs.pop())
    raise ValueError(
        f"`{argument}` must be a metric of which it is known whether more is better; found "
        f"{shown(text)}. Write 'max NAME' or 'min NAME'."
    )
