"""Converts runs of this package's first version, whose folders had no records.

It wrote `arguments.json`, two CSV files and checkpoints, which suffice to resume a run.
"""

import collections
import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping

import attrs

from tff_optim.core.types import Process, Record, State, Value
from tff_optim.resident.leaves import earlier


def arguments(found: Record, run: Record, process: Process, saved: Iterable[str]) -> Record:
    """The identity of such a run in today's form.

    Args:
      found: The identity in the folder.
      run: The identity to compare it with; see `same_run.describe`.
      process: The process.
      saved: The names of the checkpoints.
    """
    found = dict(found)
    state_type = str(getattr(process, "process", process).initialize.type_signature.result)
    digest = hashlib.sha256(state_type.encode()).hexdigest()[:8]
    # If names have changed, loading the state compares it with the type.
    if found.get("state_type") == digest or re.search(r"\bdecay=|\bstep=\w+,slots=", state_type):
        found["state_type"] = run["state_type"]
    for name, kind in (("version_", "resident"), ("program_state_", "plain")):
        if any(one.startswith(name) for one in saved):
            found["checkpoints"] = kind
    if "clients" in found:
        number = found.pop("clients")
        same = run["ids"].startswith(f"{number} from ")
        found["ids"] = run["ids"] if same else f"{number} clients"
    for name in run:
        if name not in found and earlier(name) in found:
            found[name] = found.pop(earlier(name))
    return found


def records(rounds: str, clients: str, written: float, digests: Mapping[int, str]) -> list[Record]:
    """The files of such a run as records.

    Args:
      rounds: The text of the file with a row for each round.
      clients: The text of the file with a row for each client of each round.
      written: The time of the files.
      digests: The digests of the checkpoints' files, by round.

    Raises:
      ValueError: If a row has no round.
    """
    of_clients: dict[int, list[Record]] = {}
    for number, row in _rows(clients):
        of_clients.setdefault(number, []).append(row)
    found: list[Record] = []
    for number, row in _rows(rounds):
        cohort = of_clients.get(number, [])
        found.append({"round": number, "written": written, "record": row, "clients": cohort})
        if number in digests:
            found.append({"saved": number, "files": digests[number]})
    return found


def renamed(state: State, names: Mapping[str, str]) -> State:
    """A state with some keys renamed; `step` only next to `slots`, as in Keras' optimizers."""
    if isinstance(state, Mapping):
        here = {key: names.get(key, key) for key in state if key != "step" or "slots" in state}
        pairs = ((here.get(key, key), renamed(one, names)) for key, one in state.items())
        return collections.OrderedDict(pairs)
    if attrs.has(type(state)):
        fields = [field.name for field in attrs.fields(type(state))]
        return attrs.evolve(state, **{key: renamed(getattr(state, key), names) for key in fields})
    if isinstance(state, list | tuple):
        members = [renamed(one, names) for one in state]
        return type(state)(*members) if hasattr(state, "_fields") else type(state)(members)
    return state


def _rows(text: str) -> Iterator[tuple[int, Record]]:
    whole, _, _ = text.rpartition("\n")  # the rest was cut off
    for row in csv.DictReader(io.StringIO(whole, newline="")):
        number = row.pop("round", "none")
        # An empty column is missing in this round.
        found = {name: one if name == "client" else _value(one) for name, one in row.items() if one}
        yield int(number), found


def _value(text: str) -> Value:
    """The value that was written as this text."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
