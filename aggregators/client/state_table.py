"""The table of committed client states, by client and round; each change is a whole round."""

import contextlib
import hashlib
import json
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import attrs

_FORMAT = 2
UNFINISHED = ".unfinished"
_SCHEMA = """
CREATE TABLE store (format INT, token TEXT, round INT, oldest INT, checksum TEXT);
CREATE TABLE clients (number INT PRIMARY KEY, id TEXT) WITHOUT ROWID;
CREATE TABLE states (number INT, round INT, cohort TEXT, PRIMARY KEY (number, round)) WITHOUT ROWID;
"""
# SQLite's error codes for a file that is not its own, or was damaged since.
_DAMAGE = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Entry(NamedTuple):
    """The client of a state, the round after which it holds, and the cohort that wrote it."""

    number: int
    round: int
    cohort: str

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.number}-{self.round}-{self.cohort}"


@attrs.frozen
class Contents:
    """The committed states between two rounds.

    Attributes:
      round: How many rounds the states have seen.
      oldest: The earliest round that can be restored.
      states: The states of each client that has any, by number, oldest first. The last one is current;
        those before it belong to rounds that can be restored.
    """

    round: int = 0
    oldest: int = 0
    states: Mapping[int, tuple[Entry, ...]] = {}

    @property
    def entries(self) -> set[Entry]:
        """All entries."""
        return {entry for kept in self.states.values() for entry in kept}

    def latest(self, number: int) -> Entry | None:
        """A client's current state."""
        kept = self.states.get(number)
        return kept[-1] if kept else None

    def after(self, clients: Iterable[int], cohort: str, keep: int) -> "Contents":
        """The contents with new states of these clients, without those older than `keep` rounds."""
        following = self.round + 1
        oldest = max(self.oldest, following - keep)
        states = dict(self.states)
        for number in clients:
            states[number] = (*states.get(number, ()), Entry(number, following, cohort))
        return Contents(following, oldest, {n: _since(oldest, kept) for n, kept in states.items()})

    def back_to(self, round_number: int) -> "Contents":
        """The contents after an earlier round."""
        kept = {n: tuple(e for e in s if e.round <= round_number) for n, s in self.states.items()}
        return Contents(round_number, self.oldest, {n: some for n, some in kept.items() if some})


def _since(oldest: int, kept: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Drops the states that were replaced up to this round."""
    while len(kept) > 1 and kept[1].round <= oldest:
        kept = kept[1:]
    return kept


class Table:
    """`Contents` in an SQLite file; each change is one transaction.

    A checksum covers everything, since SQLite has none of its own.

    Args:
      path: The file, created if missing.
      ids: All clients, sorted.

    Attributes:
      token: Marks the files of this store.
      contents: The committed contents.
      certain: False after a failed change if the file could not be read since.

    Raises:
      ValueError: If the file is damaged, of other clients, or of another format.
      RuntimeError: If the file cannot be read, or another program has locked it.
    """

    token: str
    contents: Contents
    certain: bool
    _sum: int
    _ids_hash: int

    def __init__(self, path: str, ids: Sequence[str]):
        self._where, self._ids = path, list(ids)
        with self._in_words("opened"):
            if not os.path.lexists(path):
                _make(path, self._ids)
            if not os.path.isfile(path):  # SQLite would create the target of a dangling link
                raise _DamagedError("it is no file")
            self._connection = _connect(path)
        try:
            self._read()
            with self._in_words("opened"):  # fails unless this process may write
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.execute("ROLLBACK")
        except BaseException:
            self._connection.close()
            raise

    def write(self, contents: Contents) -> None:
        """Commits new contents: all of them or, if an error is raised, none."""
        before, after = self.contents.entries, contents.entries
        added, dropped = after - before, before - after
        total = self._sum + sum(map(_hash, added)) - sum(map(_hash, dropped))
        row = (contents.round, contents.oldest)
        checksum = _checksum(self.token, *row, self._ids_hash, total)
        execute = self._connection.execute
        with self._in_words("written"):
            try:
                execute("BEGIN IMMEDIATE")
                self.certain = False
                for entry in dropped:
                    execute("DELETE FROM states WHERE number = ? AND round = ?", entry[:2])
                for entry in added:
                    execute("INSERT INTO states VALUES (?, ?, ?)", entry)
                execute("UPDATE store SET round = ?, oldest = ?, checksum = ?", (*row, checksum))
                execute("COMMIT")
                self.contents, self._sum, self.certain = contents, total, True
            except BaseException:
                if self._connection.in_transaction:
                    execute("ROLLBACK")
                if not self.certain:  # an interrupt may have come after the commit: the file knows
                    self._read()
                raise

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def _read(self) -> None:
        """Reads and checks the whole file."""
        with self._in_words("read"):
            number = self._row("SELECT format FROM store")[0]
            if number != _FORMAT:
                raise ValueError(
                    f"`path` must hold client states of format {_FORMAT}; found format {number} in "
                    f"{self._where}, from another version. Open it with that version."
                )
            token, done, oldest, checksum = self._row(
                "SELECT token, round, oldest, checksum FROM store"
            )
            known = [one for (one,) in self._rows("SELECT id FROM clients ORDER BY number")]
            entries = [Entry(*row) for row in self._rows("SELECT * FROM states ORDER BY 1, 2")]
            self._sum, self._ids_hash = sum(map(_hash, entries)), _hash(known)
            if checksum != _checksum(token, done, oldest, self._ids_hash, self._sum):
                raise _DamagedError("its checksum does not match")
            if self._rows("PRAGMA integrity_check") != [("ok",)]:
                raise _DamagedError("its tables are not in order")
        others = {json.loads(one) for one in known}
        if others != set(self._ids):
            raise ValueError(
                f"`client_ids` must be those of the store in {self._where}; found "
                f"{few(set(self._ids) - others)} that it does not have, and without "
                f"{few(others - set(self._ids))}."
            )
        states: dict[int, tuple[Entry, ...]] = {}
        for entry in entries:
            states[entry.number] = (*states.get(entry.number, ()), entry)
        self.token, self.contents, self.certain = token, Contents(done, oldest, states), True

    def _rows(self, query: str) -> list[Any]:
        return self._connection.execute(query).fetchall()

    def _row(self, query: str) -> tuple[Any, ...]:
        rows = self._rows(query)
        if len(rows) != 1:
            raise _DamagedError(f"it tells of {len(rows)} stores")
        return rows[0]

    @contextlib.contextmanager
    def _in_words(self, done: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, _DamagedError) as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
            if isinstance(error, _DamagedError) or code in _DAMAGE:
                raise ValueError(
                    f"`path` must hold a whole store of client states; found {self._where} damaged: "
                    f"{error}. Nothing was changed: bring a copy of the directory back, or take another."
                ) from error
            raise RuntimeError(
                f"The client states in {self._where} could not be {done}: {error}. All are as they "
                "were: make room, let no other program use the file, and see that it can be written."
            ) from error


class _DamagedError(Exception):
    pass


def _connect(path: str) -> sqlite3.Connection:
    # Threads take turns with it. Bytes that are no text fail the checksum.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.text_factory = lambda text: text.decode(errors="replace")
    return connection


def _make(path: str, ids: Sequence[str]) -> None:
    """Creates an empty store atomically."""
    unfinished = path + UNFINISHED
    for name in (unfinished, f"{unfinished}-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)
    token, known = uuid.uuid4().hex[:12], [json.dumps(one) for one in ids]
    checksum = _checksum(token, 0, 0, _hash(known), 0)
    with contextlib.closing(_connect(unfinished)) as connection:
        connection.executescript(f"BEGIN; {_SCHEMA}")
        connection.executemany("INSERT INTO clients VALUES (?, ?)", enumerate(known))
        connection.execute("INSERT INTO store VALUES (?, ?, 0, 0, ?)", (_FORMAT, token, checksum))
        connection.execute("COMMIT")
    os.rename(unfinished, path)


def _hash(value: Iterable[object]) -> int:
    """A hash of one row; the sum of rows' hashes is the hash of their set."""
    text = repr(tuple(value)).encode("ascii", "backslashreplace")
    return int.from_bytes(hashlib.sha256(text).digest()[:16])


def _checksum(*values: object) -> str:
    return f"{_hash(values):032x}"


def few(ids: Iterable[str]) -> str:
    """The first five of them, for a message."""
    listed = sorted(ids)
    return f"{', '.join(map(repr, listed[:5])) or 'none'}{', ...' if len(listed) > 5 else ''}"
