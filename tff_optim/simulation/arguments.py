"""The arguments of `run`, checked before anything is built or read."""

import itertools
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

import attrs
import tensorflow_federated as tff

from tff_optim.core.checks import check_whole, whole
from tff_optim.core.messages import shown
from tff_optim.core.types import Function, Json, Number, Process, Value
from tff_optim.resident import ResidentProcess
from tff_optim.resident.client_data import data_of_client
from tff_optim.simulation import calls
from tff_optim.simulation.cohorts import Draw
from tff_optim.simulation.goals import Goal, goal
from tff_optim.simulation.history import Table
from tff_optim.simulation.per_client import PerClient
from tff_optim.simulation.starts import Starts

_NAME = "process"  # the name of a process that is given without one


def _function(
    *given: str, offered: Sequence[str] = ()
) -> Callable[[Value, attrs.Attribute, Value], None]:
    """Checks that an argument is None or a function of these parameters."""
    return lambda plan, attribute, value: calls.check(attribute.name, value, given, offered)


def _size(plan: Value, attribute: attrs.Attribute, value: Value) -> None:
    if callable(value):
        calls.check(attribute.name, value, ["round"], ())
    elif value is not None:
        check_whole(attribute.name, value, 1)
    if (value is None) == (plan.draw is None):
        raise ValueError(
            "`clients_per_round` or `draw` must be given, and not both; found "
            f"{shown(value)} and {shown(plan.draw)}."
        )


def _per_client(plan: Value, attribute: attrs.Attribute, value: Value) -> None:
    del plan, attribute
    if value is not None and not isinstance(value, PerClient):
        raise TypeError(
            f"`per_client` must be a `simulation.PerClient` or None; found {shown(value)}."
        )


def _goal(text: Value) -> Goal | None:
    return None if text is None else goal("keep_best", text)


def _is_evaluated(plan: Value, attribute: attrs.Attribute, value: Value) -> None:
    """Checks that the metric of `keep_best`, or of `stop`, can occur in a run."""
    wanted = value if isinstance(value, Goal) else getattr(value, "goal", None)
    if wanted is None or plan.evaluate is not None or plan.per_client is not None:
        return
    if wanted.name.startswith("evaluation/"):
        raise ValueError(
            f"`{attribute.name}` must name a metric of the run; found {wanted.name!r} and neither "
            "`evaluate` nor `per_client`. Give one of them."
        )


def _managers(plan: Value, attribute: attrs.Attribute, value: Value) -> None:
    del plan
    if callable(value):
        calls.check(attribute.name, value, ["process", "seed"], ())
    else:
        check_managers(value)


def check_managers(value: Value) -> None:
    """Raises `TypeError` unless these are release managers that several runs can iterate over."""
    are_managers = isinstance(value, Iterable) and not isinstance(value, Iterator)
    if not are_managers or not all(isinstance(m, tff.program.ReleaseManager) for m in value):
        raise TypeError(
            "`managers` must be a list of `tff.program.ReleaseManager`s, or a function of process and "
            f"seed that returns one; found {shown(value)}."
        )


def _resume(plan: Value, attribute: attrs.Attribute, value: Value) -> None:
    del plan, attribute
    if not (isinstance(value, bool) or value == "changed"):
        raise ValueError(f"`resume` must be True, False or 'changed'; found {shown(value)}.")


def _at_least(least: int) -> Callable[[Value, attrs.Attribute, Value], None]:
    return lambda plan, attribute, value: check_whole(attribute.name, value, least)


@attrs.frozen
class Plan:
    """The arguments that all runs of a call share; see `run`."""

    rounds: int = attrs.field(converter=whole, validator=_at_least(0))
    draw: Draw | None = attrs.field(validator=_function("round", "ids", "rng"))
    clients_per_round: Value = attrs.field(converter=whole, validator=_size)
    hparams: Callable[..., Mapping[str, Number]] | None = attrs.field(
        validator=_function("round", offered=("process", "seed"))
    )
    evaluate: Callable[..., Mapping[str, Json]] | None = attrs.field(
        validator=_function("weights", offered=("round", "process", "seed"))
    )
    per_client: PerClient | None = attrs.field(validator=_per_client)
    rounds_per_evaluation: int = attrs.field(converter=whole, validator=_at_least(1))
    rounds_per_checkpoint: int = attrs.field(converter=whole, validator=_at_least(1))
    resume: bool | str = attrs.field(validator=_resume)
    compare_data: bool
    progress: bool
    stop: Callable[[Table], bool] | None = attrs.field(
        validator=attrs.validators.and_(_function("rounds"), _is_evaluated)
    )
    keep_best: Goal | None = attrs.field(converter=_goal, validator=_is_evaluated)
    managers: Value = attrs.field(validator=_managers)
    client_states: Function | None = attrs.field(
        validator=_function("ids", "path", offered=("keep",))
    )
    starts: Starts
    # Held while the caller's functions run: one call at a time, however many runs there are.
    lock: threading.RLock = attrs.field(factory=threading.RLock)


def as_processes(process: Process) -> dict[str, Process]:
    """Processes by name.

    Raises:
      TypeError: If one is no process.
      ValueError: If a name cannot be that of a folder, or there is no process.
    """
    named = dict(process) if isinstance(process, Mapping) else {_NAME: process}
    for name, one in named.items():
        if not _is_file_name(name):
            raise ValueError(
                "`process` must have names that can be those of folders: texts of at most 255 bytes "
                f"without '/', and not '.' or '..'; found {shown(name)}."
            )
        if not (hasattr(one, "next") and hasattr(one, "initialize")) and not callable(one):
            raise TypeError(
                "`process` must be a learning process, a function from a seed to one, or a mapping "
                f"from names to such; found {shown(one)}."
            )
    if not named:
        raise ValueError("`process` must hold at least one process; found none.")
    return named


def as_path(directory: Value) -> str | None:
    """The folder's path as a string."""
    path = directory.__fspath__() if isinstance(directory, os.PathLike) else directory
    try:
        if path is None or (isinstance(path, str) and path and b"\0" not in os.fsencode(path)):
            return path
    except UnicodeEncodeError:  # half a surrogate
        pass
    raise TypeError(
        "`directory` must be the path of a folder, a text or a `pathlib.Path`, or None; found "
        f"{shown(directory)}."
    )


def _is_file_name(name: Value) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\0"}:
        return False
    try:
        return len(os.fsencode(name)) <= 255
    except UnicodeEncodeError:  # half a surrogate
        return False


def as_seeds(seed: int | Sequence[int]) -> list[int]:
    """The seeds, without duplicates.

    Raises:
      ValueError: If one is out of range or repeated, or there is none.
    """
    given: Iterable[Value] = seed if isinstance(seed, Iterable) else [seed]
    seeds = [whole(one) for one in given]
    in_range = all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**32 for s in seeds)
    if not seeds or not in_range or len(set(seeds)) < len(seeds):
        raise ValueError(
            "`seed` must be a whole number from 0 to 2**32 - 1, or several different ones; found "
            f"{shown(seed)}."
        )
    return seeds


def lanes(processes: dict[str, Process], seeds: list[int]) -> list[list[tuple[str, int]]]:
    """Runs by name and seed; those that must run one after the other are grouped."""
    lanes: dict[Hashable, list[tuple[str, int]]] = {}
    for name, seed in itertools.product(processes, seeds):
        one = processes[name]
        key = id(one) if isinstance(one, ResidentProcess) else (name, seed)
        lanes.setdefault(key, []).append((name, seed))
    return list(lanes.values())


def check_states_are_kept(client_states: Value, processes: dict[str, Process]) -> None:
    """Raises `ValueError` if certainly no process uses clients' states."""
    made = [one for one in processes.values() if hasattr(one, "next")]
    if client_states is None or len(made) < len(processes):
        return  # functions of the seed have not made their processes yet
    if not any(data_of_client(data_type(one))[1] for one in made):
        raise ValueError(
            "`client_states` must be None unless the clients of a process keep a state; found "
            f"{shown(client_states)} for {sorted(processes)}. Leave it out."
        )


def data_type(process: Process) -> tff.Type:
    """The type of one client's data in a process, or in the process that it wraps."""
    return getattr(process, "process", process).next.type_signature.parameter[1].member
