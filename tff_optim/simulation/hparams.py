"""Hyperparameters that change between rounds, in the state, so that nothing is traced again."""

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from tff_optim.core.messages import shown
from tff_optim.core.types import Number, Process, Record, State, Value
from tff_optim.simulation import metrics

COLUMN = "hparams/"


def named(given: Value) -> Record:
    """The numbers that `hparams` returned, by paths as in `flatten`.

    Raises:
      TypeError: If it returned no mapping.
      ValueError: If a value is no number.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            "`hparams` must return a mapping from names to numbers; found "
            f"{shown(given)}. Return {{}} for a round that changes nothing."
        )
    flat = metrics.flatten(given)
    for name, value in flat.items():
        if isinstance(value, str) or value is None or value != value:
            raise ValueError(f"`hparams` must return numbers; found {shown(value)} at {name!r}.")
    return flat


def with_numbers(process: Process, state: State, numbers: Mapping[str, Number]) -> State:
    """The state with some of its hyperparameters set, by their paths.

    Args:
      process: A process with `get_hparams` and `set_hparams`, as a `LearningProcess` has them.
      state: A state of the process.
      numbers: See `named`.

    Raises:
      ValueError: If there is no such hyperparameter, or it is of another kind.
    """
    if not numbers:
        return state
    there = process.get_hparams(state) if hasattr(process, "get_hparams") else {}
    known = metrics.flatten(there)
    unknown = sorted(set(numbers) - set(known))
    if unknown:
        raise ValueError(
            f"`hparams` must name hyperparameters of the process; found {unknown}. There are "
            f"{sorted(known)}."
        )
    return process.set_hparams(state, _replaced(there, numbers, ()))


def _replaced(value: Value, numbers: Mapping[str, Number], path: tuple[str, ...]) -> State:
    if isinstance(value, Mapping):
        members = {key: _replaced(one, numbers, (*path, str(key))) for key, one in value.items()}
        return OrderedDict(members)
    if isinstance(value, list | tuple):
        return type(value)(_replaced(one, numbers, (*path, str(i))) for i, one in enumerate(value))
    name = "/".join(path)
    if name not in numbers:
        return value
    wanted = np.asarray(value).dtype
    with np.errstate(over="ignore"):
        found = np.asarray(numbers[name]).astype(wanted)
    # A fraction for a whole number, or a number out of the type's range.
    if not np.isclose(float(found), float(numbers[name]), rtol=1e-3, atol=1e-30):
        raise ValueError(
            f"`hparams` must return a number of {wanted} at {name!r}; found {shown(numbers[name])}."
        )
    return found
