"""The identity of a run: written to its folder, and compared when the run is resumed."""

import functools
import json
import os
import types
import warnings
from collections.abc import Mapping, Sequence

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.core.types import ClientId, Function, Json, Process, Record, State, Value, Weights
from tff_optim.resident import ResidentProcess, maker
from tff_optim.resident.graphs import fingerprints
from tff_optim.simulation import metrics

FILE = "arguments.json"
VERSIONS = "versions"
_CHANGES, _OWN, _DATA = "changes", "own_weights", "data"
# The computations of a learning process; an `IterativeProcess` has the first two.
_COMPUTATIONS = (
    *("initialize", "next"),
    *("get_model_weights", "set_model_weights", "get_hparams", "set_hparams"),
)
# Entries that may differ between versions of packages without changing a number.
_MADE = ("computations", "evaluate")
_HINTS = {
    "state_type": "Another `state_type` is another model, optimizer or rule.",
    "computations": "Other `computations` are another model, loss, optimizer, rule or number in one.",
    "checkpoints": "Another kind of `checkpoints` is that of a `ResidentProcess`, or of a plain one.",
}
_NEVER = ("state_type", "checkpoints")  # a state of another kind cannot be resumed
_SHOWN = 3  # clients whose data differ


def describe(process: Process, state: State, *, given: Value, **arguments: Value) -> Record:
    """The identity of a run, as short texts and numbers by name.

    Args:
      process: The process.
      state: Its initial state.
      given: The `initial_weights` of the run; None if the process has its own.
      **arguments: Arguments of the run.
    """
    wrapped = getattr(process, "process", process)
    weights = getattr(process, "get_model_weights", None)
    made = {} if weights is None else {"without": wrapped.get_model_weights.type_signature.result}
    found = {
        **arguments,
        "state_type": _short(str(wrapped.initialize.type_signature.result)),
        "checkpoints": "resident" if isinstance(process, ResidentProcess) else "plain",
        "initial_weights": None if given is None else _of_arrays(given),
        _OWN: None if given is not None or weights is None else _of_arrays(weights(state)),
        VERSIONS: maker.versions(),
    }
    computations = [getattr(wrapped, name) for name in _COMPUTATIONS if hasattr(wrapped, name)]
    found["computations"] = _short(
        *(fingerprints.of_computation(computation, **made) for computation in computations)
    )
    if hasattr(process, "get_hparams"):
        hparams = metrics.flatten(process.get_hparams(state))
        found.update({f"hparams/{name}": value for name, value in hparams.items()})
    return found


def of_function(function: Function | None) -> str | None:
    """The name of a function and a fingerprint of its code, without values that the code refers to.

    Frozen data that can be called, such as `poisson(0.1)`, are represented by their `repr`.

    Example:
      >>> one, same, other = (eval(f"lambda w: {{'n': {n}}}") for n in (1, 1, 2))
      >>> of_function(one) == of_function(same) != of_function(other)
      True
    """
    if function is None:
        return None
    if attrs.has(type(function)):
        return repr(function)
    inner: Value = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    inner = getattr(inner, "__func__", inner)
    if not hasattr(inner, "__qualname__"):
        inner = type(inner).__call__
    code = getattr(inner, "__code__", None)
    return inner.__qualname__ if code is None else f"{inner.__qualname__} {_short(*_code(code))}"


def of_ids(ids: Sequence[ClientId]) -> str:
    """The number of clients, and a fingerprint of their ids in order."""
    return f"{len(ids)} from {ids[0]!r} to {ids[-1]!r}, {_short(*map(repr, ids))}"


def check(
    folder: str, run: Record, found: Record | None, *, resume: bool | str, files: Sequence[str]
) -> None:
    """Writes the identity of a run, or compares it with that of the run in the folder.

    Args:
      folder: The folder of the run.
      run: See `describe`.
      found: The result of `read`.
      resume: Whether to resume the run in the folder; "changed" accepts one that differs.
      files: Names that the run will write.

    Raises:
      ValueError: If the folder holds another run, or files that no run wrote.
    """
    if found is None:
        others = [name for name in files if os.path.exists(os.path.join(folder, name))]
        if others:
            raise ValueError(
                f"`directory` must hold a run, or none of its files; found {others} and no {FILE} "
                f"in {folder}. Name another."
            )
        _write(folder, run)
        return
    if not resume:
        raise ValueError(
            f"`directory` must be a new one, since `resume` is False; found a run in {folder}. "
            "Remove it, or name another."
        )
    _warn_of_versions(folder, run, found)
    names = _differences(run, found)
    never = [name for name in names if name in _NEVER]
    if names and (resume != "changed" or never):
        mine, theirs = _shown(run, names), _shown(found, names)
        hints = [_HINTS[name] for name in names if name in _HINTS]
        other = "" if never else ", or go on all the same with `resume='changed'`"
        raise ValueError(
            f"`directory` must hold a run with {mine}, or none; found one with {theirs} in "
            f"{folder}. {' '.join([*hints, f'Name another{other}.'])}"
        )
    if names:
        warnings.warn(
            f"`directory`, {folder}, goes on with {_shown(run, names)} in the place of "
            f"{_shown(found, names)}, as `resume='changed'` asks.",
            stacklevel=2,
        )
    elif run[_OWN] != found.get(_OWN, run[_OWN]):
        warnings.warn(
            f"`initial_weights` are not given, and the process draws others than the run in {folder} "
            "began with, as it does each time it is built unless its layers' initializers have a "
            "seed. The run goes on from its own.",
            stacklevel=2,
        )


def last_change(found: Record) -> int:
    """The round after which a run was last resumed with changes; 0 if it never was."""
    changes = found.get(_CHANGES, [])
    return int(changes[-1]["after_round"]) if changes else 0


def take_over(folder: str, run: Record, found: Record, number: int, others: Sequence[str]) -> None:
    """Writes down the changes with which a run is resumed after a round, if there are any.

    Args:
      folder: The folder of the run.
      run: See `describe`.
      found: The earlier identity.
      number: The round.
      others: Names of functions whose results have changed.
    """
    names = list(dict.fromkeys([*_differences(run, found), *others]))
    if found.get(VERSIONS) != run[VERSIONS]:
        names.append(VERSIONS)
    if names:
        change = {"after_round": number, "from": _shown(found, names), "to": _shown(run, names)}
        kept = {
            _OWN: found.get(_OWN, run[_OWN]),
            _DATA: run[_DATA] or found.get(_DATA),
            _CHANGES: [*found.get(_CHANGES, []), change],
        }
        _write(folder, {**run, **kept})


def _differences(run: Mapping[str, Json], found: Mapping[str, Json]) -> list[str]:
    """The names of entries that differ; for data, a name for each client."""
    same_versions = run[VERSIONS] == found.get(VERSIONS)
    names = []
    for name in {**run, **found}:
        if name in (_CHANGES, VERSIONS, _OWN, _DATA):
            continue
        if not same_versions and (name in _MADE or name not in run or name not in found):
            continue
        if run.get(name) != found.get(name):
            names.append(name)
    mine, theirs = run.get(_DATA) or {}, found.get(_DATA) or {}
    return names + [
        f"{_DATA} of {client}"
        for client, text in mine.items()
        if client in theirs and _stable(text, theirs[client]) != _stable(theirs[client], text)
    ]


def _stable(text: str, other: str) -> str:
    """The part of a data fingerprint to compare; without the first element if that is not stable."""
    changing = ("another each time", "not read")
    is_unknown = text.endswith(changing) or other.endswith(changing)
    return text.rpartition(", first ")[0] if is_unknown else text


def _shown(run: Mapping[str, Json], names: Sequence[str]) -> Record:
    """The values of some names; if the data of many clients differ, those of a few."""
    prefix = f"{_DATA} of "
    of_clients = [name for name in names if name.startswith(prefix)]
    shown = {name: run.get(name) for name in names if name not in of_clients}
    for name in of_clients[:_SHOWN]:
        shown[name] = run[_DATA].get(name.removeprefix(prefix))
    if len(of_clients) > _SHOWN:
        shown[f"{_DATA} of {len(of_clients) - _SHOWN} more"] = "..."
    return shown


def _warn_of_versions(folder: str, run: Mapping[str, Json], found: Mapping[str, Json]) -> None:
    mine, theirs = run[VERSIONS], found.get(VERSIONS) or {}
    others = [f"{name} {theirs.get(name, 'of an unknown version')}" for name in mine]
    changed = [text for name, text in zip(mine, others) if mine[name] != theirs.get(name)]
    if changed:
        warnings.warn(
            f"`directory`, {folder}, holds a run that was begun with {' and '.join(changed)}, and "
            f"{', '.join(f'{name} {version}' for name, version in mine.items())} may build the same "
            "process of other operations: whether it is the same process cannot be told.",
            stacklevel=3,
        )


def read(folder: str) -> Record | None:
    """The identity of the run in a folder, or None.

    Raises:
      ValueError: If it cannot be read.
    """
    path = os.path.join(folder, FILE)
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`directory` must hold what makes its run the same run; found {path}, which cannot be "
            f"read ({error}). Restore it from a copy, or name another directory."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"`directory` must hold what makes its run the same run; found {type(found).__name__} in "
            f"{path}. Restore it from a copy, or name another directory."
        )
    return found


def _write(folder: str, run: Mapping[str, Json]) -> None:
    path = os.path.join(folder, FILE)
    with open(path + ".unfinished", "w", encoding="utf-8") as file:
        json.dump(run, file, indent=1)
    os.replace(path + ".unfinished", path)


def _short(*parts: Value) -> str:
    return fingerprints.of_parts(*parts)[:8]


def _of_arrays(weights: Weights) -> str:
    arrays = [np.asarray(leaf) for leaf in tf.nest.flatten(weights)]
    return _short(*(part for a in arrays for part in (a.dtype, a.shape, a.tobytes())))


def _code(code: types.CodeType) -> list[Value]:
    """The behaviour of a function's code, independent of its position in a file."""
    parts: list[Value] = [code.co_code, code.co_names]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            parts += _code(constant)
        elif isinstance(constant, frozenset):
            parts += sorted(map(repr, constant))
        else:
            parts.append(repr(constant))
    return parts
