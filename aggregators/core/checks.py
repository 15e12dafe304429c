"""Checks of arguments, and of values that are known only where a graph is run."""

import inspect
import math
import numbers
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tensorflow as tf
import tensorflow_federated as tff

_T = TypeVar("_T")


def whole(argument: str, value: Any, least: int) -> int:
    """The value, of Python or NumPy, as an `int`.

    Raises:
      ValueError: If it is no whole number of at least `least`; a bool is none.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise ValueError(
            f"`{argument}` must be a whole number of at least {least}; found {value!r}."
        )
    return int(value)


def number(
    argument: str, value: Any, least: float, most: float, *, closed: bool = False, more: str = ""
) -> None:
    """Raises `ValueError` for anything but a real number between these, of Python or NumPy.

    Args:
      argument: What is checked.
      value: What it is.
      least: It must be above this; with `closed` it may be this.
      most: It must be below this, which may be infinite.
      closed: See `least`.
      more: What else the caller takes, for the message.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not (least <= value if closed else least < value) or not value < most:
        low = "of at least" if closed else "above"
        high = "finite" if most == math.inf else f"below {most:g}"
        raise ValueError(
            f"`{argument}` must be a number {low} {least:g} and {high}{more}; found {value!r}."
        )


def flag(argument: str, value: Any) -> None:
    """Raises `TypeError` for anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{argument}` must be True or False; found {value!r}.")


def word(argument: str, value: Any, *words: str) -> None:
    """Raises `ValueError` for anything but these words."""
    if not isinstance(value, str) or value not in words:
        *others, last = (f'"{one}"' for one in words)
        raise ValueError(f"`{argument}` must be {', '.join(others)} or {last}; found {value!r}.")


def function(argument: str, value: Any, form: str) -> None:
    """Raises `TypeError` unless this can be called with the arguments in `form`, as `(a, b)`."""
    if not callable(value):
        raise TypeError(f"`{argument}` must be a function of {form}; found {value!r}.")
    number = 0 if form == "()" else form.count(",") + 1
    try:
        inspect.signature(value).bind(*[None] * number)
    except TypeError as error:
        raise TypeError(
            f"`{argument}` must be a function of {form}; found {value!r}, which takes others "
            f"({error})."
        ) from error
    except ValueError:
        pass  # a builtin that does not tell


def instance(argument: str, value: Any, kind: type) -> None:
    """Raises `TypeError` for a value of another class."""
    if not isinstance(value, kind):
        raise TypeError(f"`{argument}` must be a `{kind.__name__}`; found {value!r}.")


def returned(argument: str, value: Any, kind: type) -> None:
    """Raises `TypeError` if a function has returned a value of another class."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{argument}` must be a function that returns a `{kind.__name__}`; found {value!r}."
        )


def called(must: str, given: Callable[..., Any], *args: Any, found: str = "", advice: str) -> Any:
    """What a user's function returns; where it raises, a `TypeError` with our words and the error's.

    Args:
      must: What the function must be, for the message.
      given: The function.
      *args: What it is called with.
      found: Of the function, for the message; its representation if not given.
      advice: What to do.

    Returns:
      Its result.

    Raises:
      TypeError: If it raises what does not name an argument by itself.
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


def placed(argument: str, value: Any, *placements: Any) -> tuple[Any, Any]:
    """The value as TFF's, and the type of a member.

    Raises:
      TypeError: If it is not placed at one of the placements.
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


def validated(check: Callable[..., Any], *more: Any, optional: bool = False) -> Any:
    """An attrs validator of one of the checks above, which is told the field's name.

    Args:
      check: The check.
      *more: What it takes besides name and value.
      optional: Whether None passes.
    """

    def validate(owner: Any, attribute: Any, value: Any) -> None:
        del owner  # attrs passes it to every validator
        if not (optional and value is None):
            check(attribute.name, value, *more)

    return validate


def joined(argument: str, taken: Mapping[str, Any], more: Mapping[str, Any]) -> OrderedDict:
    """The entries of two mappings, in their order.

    Raises:
      ValueError: If a name is in both; `argument` is what brought it.
    """
    both = [name for name in more if name in taken]
    if both:
        raise ValueError(
            f"`{argument}` must not bring a name that something else in the rule's state or "
            f"measurements has; found {both}. Give it another name."
        )
    return OrderedDict([*taken.items(), *more.items()])


def only_if(condition: tf.Tensor, message: Sequence[Any], value: _T) -> _T:
    """A structure of tensors as it is; where the condition is false, the computation ends.

    Args:
      condition: A bool.
      message: Texts and tensors, which the error shows.
      value: What must not be used otherwise. Operations made of anything else do not wait.

    Returns:
      The structure, of tensors that depend on the check.

    Example:
      >>> int(only_if(tf.constant(True), ["`n` must be 1; found", 1], tf.constant(1)))
      1
    """
    # The bare operation: TensorFlow's function around it builds a branch for the message.
    check = tf.raw_ops.Assert(condition=condition, data=message)
    with tf.control_dependencies([check]):
        return tf.nest.map_structure(tf.identity, value)
