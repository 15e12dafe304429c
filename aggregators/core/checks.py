"""Checks of arguments, and of values that are known only when a graph runs."""

import inspect
import math
import numbers
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeGuard, TypeVar

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core.types import Structure

_T = TypeVar("_T")
_Validator: TypeAlias = Callable[[object, attrs.Attribute, object], None]


@attrs.frozen
class Range:
    """An interval of finite numbers.

    Attributes:
      least: The lower end; minus infinity for none.
      most: The upper end; infinity for none.
      above: Whether the lower end itself is excluded.
      below: Whether the upper end itself is excluded.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        ends = []
        if self.least > -math.inf:
            ends.append(f"{'above' if self.above else 'of at least'} {self.least:g}")
        if self.most < math.inf:
            ends.append(f"{'below' if self.below else 'of at most'} {self.most:g}")
        return " ".join(["a finite number", " and ".join(ends)]).strip()

    def holds(self, value: float | tf.Tensor) -> bool | tf.Tensor:
        """Whether a Python number or a tensor lies in the range."""
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low & high & (abs(value) <= sys.float_info.max)


def number(argument: str, value: object, within: Range, *, more: str = "", hint: str = "") -> float:
    """The value, of Python or NumPy, as a `float`.

    Args:
      argument: Its name.
      value: The value.
      within: The range that it must lie in.
      more: Other values that the caller accepts, for the message.
      hint: Advice for the message.

    Raises:
      ValueError: If the value is no real number in the range; a bool is none.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and within.holds(value):
        return float(value)
    raise ValueError(f"`{argument}` must be {within}{more}; found {value!r}.{hint and ' ' + hint}")


def whole(argument: str, value: object, least: int) -> int:
    """The value, of Python or NumPy, as an `int`.

    Raises:
      ValueError: If the value is no whole number of at least `least`; a bool is none.
    """
    if is_whole(value) and int(value) >= least:
        return int(value)
    raise ValueError(f"`{argument}` must be a whole number of at least {least}; found {value!r}.")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number of Python or NumPy; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def flag(argument: str, value: object) -> None:
    """Raises `TypeError` for anything but True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{argument}` must be True or False; found {value!r}.")


def word(argument: str, value: object, *words: str) -> None:
    """Raises `ValueError` for anything but these words."""
    if not isinstance(value, str) or value not in words:
        *others, last = (f'"{one}"' for one in words)
        raise ValueError(f"`{argument}` must be {', '.join(others)} or {last}; found {value!r}.")


def function(argument: str, value: object, form: str, advice: str = "") -> None:
    """Raises `TypeError` unless the value can be called with arguments as in `form`, e.g. `(a, b)`."""
    advice = advice and f" {advice}"
    if not callable(value):
        raise TypeError(f"`{argument}` must be a function of {form}; found {value!r}.{advice}")
    number = 0 if form == "()" else form.count(",") + 1
    try:
        inspect.signature(value).bind(*[None] * number)
    except TypeError as error:
        raise TypeError(
            f"`{argument}` must be a function of {form}; found {value!r}, which takes others "
            f"({error}).{advice}"
        ) from error
    except ValueError:
        pass  # a builtin without a signature


def instance(argument: str, value: object, kind: type) -> None:
    """Raises `TypeError` for a value of another class."""
    if not isinstance(value, kind):
        raise TypeError(f"`{argument}` must be {_one(kind)}; found {value!r}.")


def returned(argument: str, value: object, kind: type) -> None:
    """Raises `TypeError` if a function has returned a value of another class."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{argument}` must be a function that returns {_one(kind)}; found {value!r}."
        )


def _one(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} `{kind.__name__}`"


def called(
    must: str, given: Callable[..., _T], *args: Structure, found: str = "", advice: str
) -> _T:
    """Calls a user's function; an error of its own becomes a `TypeError` that explains it.

    Args:
      must: The rule for the function, as the message begins.
      given: The function.
      *args: Its arguments.
      found: The function in the message; its representation if empty.
      advice: Advice for the message.

    Returns:
      The function's result.

    Raises:
      TypeError: If the function raises an error whose message does not name an argument.
    """
    try:
        return given(*args)
    except Exception as error:
        if str(error).startswith("`"):  # a refusal already
            raise
        found = found or f"{given!r}, which failed"
        raise TypeError(
            f"{must}; found {found}. {advice} The error was {type(error).__name__}: {error}"
        ) from error


def placed(
    argument: str, value: tff.Value, *placements: tff.framework.PlacementLiteral
) -> tuple[tff.Value, tff.Type]:
    """The value as a `tff.Value`, and its member type.

    Raises:
      TypeError: If the value is not placed at one of the placements.
    """
    value = tff.to_value(value, None)
    kind = value.type_signature
    if not isinstance(kind, tff.FederatedType) or kind.placement not in placements:
        names = " or ".join(f"tff.{placement.name}" for placement in placements)
        raise TypeError(
            f"`{argument}` must be placed at {names}; found {kind}. Join a structure of placed "
            "values with `tff.federated_zip` first."
        )
    return value, kind.member


def validated(check: Callable[..., object], *more: object, optional: bool = False) -> _Validator:
    """Makes an attrs validator of one of the checks above.

    Args:
      check: The check.
      *more: Its arguments after the field's name and value.
      optional: Whether None passes.
    """

    def validate(owner: object, attribute: attrs.Attribute, value: object) -> None:
        del owner  # attrs passes it to every validator
        if not (optional and value is None):
            check(attribute.name, value, *more)

    return validate


def joined(argument: str, taken: Mapping[str, _T], more: Mapping[str, _T]) -> OrderedDict[str, _T]:
    """The entries of both mappings, in order.

    Raises:
      ValueError: If a name is in both; the message names `argument` as the source of `more`.
    """
    both = [name for name in more if name in taken]
    if both:
        raise ValueError(
            f"`{argument}` must not use a name that the rule's state or measurements already "
            f"have; found {both}. Rename one of them."
        )
    return OrderedDict([*taken.items(), *more.items()])


def asserted(condition: tf.Tensor, message: Sequence[str | int | tf.Tensor], value: _T) -> _T:
    """Passes a structure of tensors on; an error ends the computation if the condition is false.

    Args:
      condition: A bool.
      message: Texts and tensors for the error.
      value: The structure. Only operations on the returned tensors wait for the check.

    Returns:
      The structure, whose tensors depend on the check.

    Example:
      >>> int(asserted(tf.constant(True), ["`n` must be 1; found", 1], tf.constant(1)))
      1
    """
    # The bare operation: TensorFlow's function around it builds a branch for the message.
    check = tf.raw_ops.Assert(condition=condition, data=message)
    with tf.control_dependencies([check]):
        return tf.nest.map_structure(tf.identity, value)
