"""The files of a run in its directory, or its records in memory only."""

import contextlib
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import tensorflow_federated as tff

from tff_optim.core.messages import shown
from tff_optim.core.types import ClientId, Json, Process, State
from tff_optim.resident import locks
from tff_optim.simulation import best, old_runs, same_run, stores
from tff_optim.simulation.board import Board
from tff_optim.simulation.checkpoints import Checkpoints
from tff_optim.simulation.goals import Goal
from tff_optim.simulation.records import CsvView, Record, RecordFile
from tff_optim.simulation.threads import wait

_LOCK = ".lock"
_RECORDS, _ROUNDS, _CLIENTS = "records.jsonl", "rounds.csv", "clients.csv"
_CHECKPOINTS, _BOARD = "checkpoints", "tensorboard"
_KINDS: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys((same_run.FILE, _RECORDS, _ROUNDS, _CLIENTS), os.path.isfile),
    **dict.fromkeys((_CHECKPOINTS, best.FOLDER, _BOARD, stores.FOLDER), os.path.isdir),
}


class Folder(tff.program.ProgramStateManager):
    """The records, curves and checkpoints of one run, kept at the same round; `close` it at the end.

    `records.jsonl` decides: it has the metrics of each round, and the rounds after which the state was
    saved, with digests of the files. A run resumes from the newest state whose files are as they were
    saved. Records of later rounds are dropped, and CSV files and curves are made anew from the others.
    Damage is reported. If it leaves no state to resume from, nothing is changed.

    It is the `program_state_manager` of TFF's loop, after `find` and `begin`.

    Args:
      path: The directory, created if missing; None to keep the records in memory only.
      keep_best: The metric that decides which state is best; None to keep none.

    Attributes:
      path: The directory.
      best: The best round so far; None if none is kept.
      saved: The round to resume from; None to begin anew.
      reach: The number of rounds between the two last checkpoints, whose older one counts if the newer
        one is damaged.
      changed: Names of functions whose results have changed, to be written down.
      rounds: A record for each round.
      clients: A record for each client of each round.

    Raises:
      RuntimeError: If another run uses the directory.
      ValueError: If it cannot be created.
    """

    def __init__(self, path: str | None, keep_best: Goal | None):
        self.path, self._keep_best = path, keep_best
        self.best = None if keep_best is None else best.Best(keep_best, None)
        self._of_best: Checkpoints | None = None
        self._best_counts: set[int] = set()
        self.saved: int | None = None
        self.reach = 0
        self.changed: list[str] = []
        self.rounds: list[Record] = []
        self.clients: list[Record] = []
        self._state: State = None
        self._left_out: list[str] = []
        self._board: Board | None = None
        self._is_old = False  # whether it still needs records
        self._close = contextlib.ExitStack()
        if path is not None:
            self._close.enter_context(_owned(path))
            self._records = RecordFile(self._path_of(_RECORDS))

    def find(
        self,
        run: Mapping[str, Json],
        process: Process,
        state: State,
        ids: Sequence[ClientId],
        *,
        resume: bool | str,
    ) -> None:
        """Finds the files of the same run in the directory, and changes nothing.

        Args:
          run: The identity of the run; see `same_run.describe`.
          process: The process whose states are saved.
          state: One of its states.
          ids: The ids of all clients.
          resume: Whether to resume the run in the directory; "changed" if it may differ.

        Raises:
          ValueError: If the directory holds another run, or one that is damaged.
        """
        assert self.path is not None
        self._run, self._by_text = dict(run), _by_text(ids)
        for name, is_kind in _KINDS.items():
            _check_kind(self._path_of(name), is_kind)
        self._found = same_run.read(self.path)
        if self._found is not None and same_run.VERSIONS not in self._found:
            saved = self._path_of(_CHECKPOINTS)
            names = os.listdir(saved) if os.path.exists(saved) else []
            self._found = old_runs.arguments(self._found, self._run, process, names)
            self._is_old = os.path.exists(self._path_of(_ROUNDS)) and not os.path.exists(
                self._path_of(_RECORDS)
            )
        files = [name for name in _KINDS if name != same_run.FILE]
        same_run.check(self.path, self._run, self._found, resume=resume, files=files)
        with _in_words():
            self._checkpoints = Checkpoints(
                process, self._path_of(_CHECKPOINTS), accept_changes=resume == "changed"
            )
            if self._keep_best is not None:
                self._of_best = Checkpoints(
                    process, self._path_of(best.FOLDER), accept_changes=resume == "changed"
                )
                self.best = best.Best(self._keep_best, self._of_best)
            saves = self._choose()
            self._choose_best()
        if self.saved is not None:
            self._state = wait(self._checkpoints.load(self.saved, state))
            older = [number for number in self._checkpoints.found() if number in saves]
            self.reach = self.saved - min(older)
        self._take(self.saved)
        if self.best is not None:
            self.best.take_up(max(self._best_counts, default=None), self.rounds)

    @property
    def last_change(self) -> int:
        """The round after which the run was last resumed with changes; 0 if it never was."""
        return same_run.last_change(self._found or {})

    def _choose(self) -> dict[int, str]:
        """Decides which state to resume from; returns the digests of the states up to it."""
        wrong = self._read()
        values = self._records.values
        saves = {value["saved"]: value["files"] for value in values if "saved" in value}
        self._left_out = [wrong] if wrong else []
        for number in sorted(saves, reverse=True):
            fault = self._checkpoints.fault(number, saves[number])
            if not fault:
                self.saved = number
                break
            self._left_out.append(fault)
        done = max((value["round"] for value in values if "round" in value), default=0)
        # A kill may have come after a save of the last rounds, before its record was written.
        self._killed = range(max(saves, default=-1) + 1, done + 1)
        unknown = [number for number in self._checkpoints.found() if number > done]
        if self.saved is None and (self._left_out or unknown):
            self._left_out += [f"checkpoints of rounds {unknown} without records"] * bool(unknown)
            raise ValueError(
                f"`directory` must hold records and checkpoints as they were written; found in "
                f"{self.path}: {'; '.join(self._left_out)}. Nothing was changed. Bring copies of "
                "these files back, or name another directory to begin anew."
            )
        self._counts = {number for number in saves if number <= (self.saved or 0)}
        return {number: saves[number] for number in self._counts}

    def _choose_best(self) -> None:
        """Finds the best states of the rounds that count; refuses if the last one is damaged."""
        values = [one for one in self._records.values if "best" in one]
        values = [one for one in values if one["at"] <= (self.saved or 0)]
        self._best_counts = {value["best"] for value in values}
        if self._of_best is not None and values:
            fault = self._of_best.fault(values[-1]["best"], values[-1]["files"])
            if fault:
                raise ValueError(
                    f"`directory` must hold the best state as it was written; found in "
                    f"{self._path_of(best.FOLDER)}: {fault}. Nothing was changed. Bring a copy back, or "
                    "name another directory to begin anew."
                )

    def _read(self) -> str:
        """Reads the records; returns their fault."""
        path = self._path_of(_RECORDS)
        if self._is_old:
            return self._read_csv(self._path_of(_ROUNDS), self._path_of(_CLIENTS))
        if not os.path.exists(path):
            return f"{_RECORDS} is missing" if self._checkpoints.found() else ""
        try:
            wrong = self._records.read()
        except OSError as error:
            return f"{_RECORDS} cannot be read ({error.strerror})"
        rounds = [value["round"] for value in self._records.values if "round" in value]
        after = f"after the record of round {rounds[-1]}" if rounds else "before the first record"
        return f"{_RECORDS}: {wrong}, {after}" if wrong else ""

    def _read_csv(self, rounds: str, clients: str) -> str:
        """Reads files of this package's first version, which had no records, as records."""
        digests = {number: self._checkpoints.digest(number) for number in self._checkpoints.found()}
        try:
            of_rounds, of_clients = (
                pathlib.Path(one).read_text("utf-8") for one in (rounds, clients)
            )
            written = os.path.getmtime(rounds)
            self._records.hold(old_runs.records(of_rounds, of_clients, written, digests))
        except (OSError, ValueError) as error:
            return f"{_ROUNDS} or {_CLIENTS} cannot be read ({error})"
        return ""

    def _take(self, last: int | None) -> None:
        """Takes the records of rounds up to `last` from the file's values."""
        self.rounds, self.clients = [], []
        for value in self._records.values:
            if "round" in value and last is not None and value["round"] <= last:
                key = {"round": value["round"]}
                self.rounds.append({**key, **value["record"]})
                self.clients += [
                    {**key, **one, "client": self._by_text.get(one["client"], one["client"])}
                    for one in value["clients"]
                ]

    def begin(self) -> None:
        """Brings all files of the directory to the round to resume from.

        Raises:
          ValueError: If a file in the directory cannot be written.
        """
        if self.path is None:
            return
        with _in_words():
            if self._is_old:
                self._records.start(self._records.values)  # before its arguments are converted
            if self._found is not None:
                same_run.take_over(self.path, self._run, self._found, self.saved or 0, self.changed)
            odd = self._checkpoints.clear(self._counts, self._killed)
            if self._of_best is not None:
                odd += self._of_best.clear(self._best_counts, self._killed)
            odd = [
                name for name in odd if not any(t.startswith(f"{name} ") for t in self._left_out)
            ]
            self._left_out += [f"{name} was not saved by this run" for name in odd]
            if self._left_out:
                then = "beginning anew" if self.saved is None else f"going on after {self.saved}"
                warnings.warn(
                    f"Left out in {self.path}, {then}: {'; '.join(self._left_out)}", stacklevel=2
                )
            if self.saved is None:
                self._records.start()
            else:
                self._cut(self.saved)
            self._show()

    def _cut(self, last: int) -> None:
        """Drops the records of later rounds."""
        keys = [
            next(value[name] for name in ("round", "saved", "at") if name in value)
            for value in self._records.values
        ]
        self._records.cut(sum(key <= last for key in keys))

    def _show(self) -> None:
        """Writes the CSV files and the curves anew."""
        self._views = [
            CsvView(self._path_of(_ROUNDS), self.rounds),
            CsvView(self._path_of(_CLIENTS), self.clients),
        ]
        if self._board is not None:
            self._board.close()
        self._board = Board(self._path_of(_BOARD))
        for value in self._records.values:
            if "round" in value:
                self._board.add(value["round"], value["record"], value["written"])
        self._board.publish()

    def add(
        self, number: int, record: Mapping[str, Json], of_clients: Sequence[Mapping[str, Json]]
    ) -> None:
        """Adds the records of a round."""
        rounds = [{"round": number, **record}]
        clients = [{"round": number, **one} for one in of_clients]
        if self._board is not None:
            written = time.time()
            texts = [{**one, "client": str(one["client"])} for one in of_clients]
            with _in_words():
                self._records.append(
                    {"round": number, "written": written, "record": record, "clients": texts}
                )
                for view, records in zip(self._views, (rounds, clients), strict=True):
                    view.append(records)
            self._board.add(number, record, written)
            self._board.flush()
        self.rounds += rounds
        self.clients += clients

    async def save(self, program_state: State, version: int) -> None:
        """Saves the state after a round if necessary; drops the records of later rounds."""
        if self.path is None or version in self._counts:
            return
        digest = await self._checkpoints.save(program_state, version)
        of_best = {} if self.best is None else await self.best.save()
        if self.rounds and self.rounds[-1]["round"] > version:
            self._cut(version)
            self._take(version)
            self._show()
        if of_best:
            self._records.append({"at": version, **of_best})
        self._records.append({"saved": version, "files": digest})
        self._counts.add(version)

    async def get_versions(self) -> list[int] | None:
        """The round to resume from, or None."""
        return None if self.saved is None else [self.saved]

    async def load(self, version: int, structure: State) -> State:
        """Returns the state that was found, once."""
        del structure
        if version != self.saved:
            raise tff.program.ProgramStateNotFoundError(version)
        state, self._state = self._state, None
        return state

    def close(self) -> None:
        """Closes the files, and releases the directory."""
        if self._board is not None:
            self._board.close()
        self._close.close()

    def _path_of(self, name: str) -> str:
        assert self.path is not None
        return os.path.join(self.path, name)


@contextlib.contextmanager
def _owned(path: str) -> Iterator[None]:
    """Locks a directory, which is created if missing, for this run."""
    with contextlib.ExitStack() as stack:
        with _in_words():
            try:
                os.makedirs(path, exist_ok=True)
                stack.enter_context(locks.locked(os.path.join(path, _LOCK)))
            except BlockingIOError as error:
                raise RuntimeError(
                    f"`directory` must be of one run at a time; found that {error.strerror} has "
                    f"{path}. It goes on, and nothing of this run was written. Wait until it has "
                    "ended, or name another directory."
                ) from None
        yield


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"`directory` must be a folder that this run can read and write; found "
            f"{error.strerror!r} at {error.filename}."
        ) from error


def _check_kind(path: str, is_kind: Callable[[str], bool]) -> None:
    if os.path.lexists(path) and not is_kind(path):
        kind = "a file" if is_kind is os.path.isfile else "a folder"
        raise ValueError(
            f"`directory` must have {kind} or nothing at {path}; found something else. Bring back "
            "what was there, or remove it."
        )


def _by_text(ids: Sequence[ClientId]) -> Record:
    """The ids of clients by their strings, which files hold."""
    found: Record = {}
    for client in ids:
        other = found.setdefault(str(client), client)
        if other is not client:
            raise ValueError(
                "`clients` must have ids that differ as texts, since files hold them as texts; found "
                f"{shown(other)} and {shown(client)}."
            )
    return found
