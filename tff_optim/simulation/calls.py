"""Functions of the caller: called with the values that they name, and checked before the first round."""

import inspect
from collections.abc import Sequence

from tff_optim.core.messages import shown
from tff_optim.core.types import Function, Value


def call(function: Function, *given: Value, **offered: Value) -> Value:
    """Calls a function with the offered values for which it has parameters.

    Such a parameter has the name of the value and no default. One with a default may mean something else
    to its author, as in `lambda weights, seed=seed: ...`.

    Example:
      >>> call(lambda weights, seed: (weights, seed), "w", seed=3, round=7)
      ('w', 3)
    """
    return function(*given, **{name: offered[name] for name in _asked(function, list(offered))})


def check(
    name: str,
    function: Value,
    given: Sequence[str],
    offered: Sequence[str],
    *,
    optional: bool = True,
) -> None:
    """Raises `TypeError` unless this is a function that `call` can call.

    Args:
      name: The name of the argument.
      function: The argument.
      given: Names of its positional arguments.
      offered: Names of values that it may ask for.
      optional: Whether it may be None.
    """
    if optional and function is None:
        return
    if not callable(function):
        none = " or None" if optional else ""
        raise TypeError(f"`{name}` must be a function{none}; found {shown(function)}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a built-in function
        return
    try:
        signature.bind(*given, **dict.fromkeys(_asked(function, offered)))
    except TypeError as error:
        may = f", and of {', '.join(offered)} what it names" if offered else ""
        raise TypeError(
            f"`{name}` must be a function of {', '.join(given)}{may}; found one of {signature} "
            f"({error})."
        ) from None


def _asked(function: Function, offered: Sequence[str]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a built-in function
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        one.name
        for one in parameters
        if one.name in offered and one.kind in kinds and one.default is one.empty
    ]
