"""States that belong to clients: kept by id, handed to the right client, taken back after a round."""

import contextlib
import fcntl
import os
import re
import shutil
import sqlite3
import tempfile
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_FORMAT = 1
_MEMORY = "/dev/shm"
_TABLE = "states.sqlite"
_STATE = re.compile(r"\d+-\d+-[0-9a-f]{12}(\.|$)")  # client's number, round, token of the cohort


class ClientStates:
    """The states of all clients, by id, for processes whose clients keep one.

    A round reads and writes the states of its cohort where its clients train, in the worker, as
    TensorFlow checkpoints: they never pass through Python, and memory is that of the clients at work.
    What travels with a client's data is two paths and three numbers, so a cohort is the client data of
    any `LearningProcess`, in TFF's runtimes, in sub-rounds, and on several workers that see the same
    files.

    A round is all or nothing: the cohort's states count from the end of the `with` block, in one
    transaction, if nothing was raised and each client has written its own; before that, and after a
    crash, all clients have the states that they had. One process at a time can open a store.

    States have versions, one a round: the states after round `r` go with the server's state after
    round `r`, and clients refuse to train on any other. After a crash between the two, or from an
    older checkpoint, go back with `restore`.

    Disk (or memory): one state per client that ever took part, and for `keep` rounds those it
    replaced: SCAFFOLD and FedDyn have states as large as the trainable weights.

    Example: clients that keep their optimizer's momentum

      >>> import tensorflow_federated as tff
      >>> from aggregators import build_fed_avg, rules
      >>> keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     keras_model,
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> sgdm = tff.learning.optimizers.build_sgdm(0.1, momentum=0.9)
      >>> process = build_fed_avg(model, sgdm, rule=rules.kept_optimizer())
      >>> data = tf.data.Dataset.from_tensors(([[1.0, 2.0]], [[3.0]]))
      >>> state = process.initialize()
      >>> with ClientStates(["ann", "bob", "eve"]) as states:
      ...     with states.cohort(["eve", "ann"], [data, data]) as cohort:
      ...         state = process.next(state, cohort).state
      ...     print(states.round, states.seen())
      1 ('ann', 'eve')
    """

    def __init__(self, client_ids: Sequence[str], path: str | None = None, *, keep: int = 1):
        """Opens a store, or makes one.

        Args:
          client_ids: All clients there ever are: strings, none repeated. A store that exists must have
            the same.
          path: A directory of its own, made if there is none; None for memory (`/dev/shm` if that is
            there), dropped by `close`.
          keep: How many rounds back `restore` can go; at least as many as lie between two
            checkpoints of the server's state.

        Raises:
          TypeError: If an id is no string.
          ValueError: If an argument is out of its range, or the store is of other clients, was written
            by another version, or is damaged, or the directory has other files and no store.
          RuntimeError: If another process, or another `ClientStates`, has it open.
        """
        ids = list(client_ids)
        if isinstance(client_ids, str) or not all(isinstance(one, str) for one in ids):
            raise TypeError(f"`client_ids` must be a list of strings; found {client_ids!r}.")
        if not ids or len(set(ids)) < len(ids):
            raise ValueError(
                f"`client_ids` must be at least one, and none repeated; found {_repeated(ids)}."
            )
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"`keep` must be a whole number of at least 1; found {keep!r}.")
        self._numbers = {one: number for number, one in enumerate(sorted(ids))}
        self._keep = keep
        self._busy = False
        self._durable = path is not None
        if path is None:
            where = _MEMORY if os.access(_MEMORY, os.W_OK) else None
            path = tempfile.mkdtemp(prefix="client-states-", dir=where)
        self._path = os.path.abspath(path)
        os.makedirs(self._path, exist_ok=True)
        others = set(os.listdir(self._path)) - {"lock"}
        if others and _TABLE not in others:
            raise ValueError(
                f"`path` must be a directory of its own; found {_few(others)} in {self._path}, and no "
                "store. Take another, such as a new one below it."
            )
        self._lock = open(os.path.join(self._path, "lock"), "w")  # noqa: SIM115  # held until `close`
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RuntimeError(
                f"`path` must be open in one place at a time; found {self._path} in use. Close the "
                "other `ClientStates`, or take another directory."
            ) from error
        try:
            self._table = sqlite3.connect(os.path.join(self._path, _TABLE))
            self._open(sorted(ids))
        except sqlite3.DatabaseError as error:
            self._lock.close()
            raise ValueError(
                f"`path` must hold a store of client states; found a {_TABLE} in {self._path} that "
                f"cannot be read: {error}. Take another directory, or bring a copy of it back."
            ) from error
        except BaseException:
            self._lock.close()
            raise

    def _open(self, ids: list[str]) -> None:
        with self._table:
            self._table.execute("CREATE TABLE IF NOT EXISTS store (format INT, round INT)")
            found = self._table.execute("SELECT format FROM store").fetchone()
            if found is not None and found[0] != _FORMAT:
                raise ValueError(
                    f"`path` must hold client states of format {_FORMAT}; found format {found[0]} in "
                    f"{self._path}, which another version has written. Open it with that one."
                )
            if found is None:
                self._table.execute("INSERT INTO store VALUES (?, 0)", (_FORMAT,))
                self._table.execute("CREATE TABLE clients (id TEXT)")
                self._table.execute(
                    "CREATE TABLE states (id TEXT, round INT, file TEXT, PRIMARY KEY (id, round))"
                )
                self._table.executemany("INSERT INTO clients VALUES (?)", [(one,) for one in ids])
        known = {one for (one,) in self._table.execute("SELECT id FROM clients")}
        if known != set(ids):
            raise ValueError(
                f"`client_ids` must be those of the store in {self._path}; found "
                f"{_few(set(ids) - known)} that it does not have, and without {_few(known - set(ids))}."
            )
        self._drop_orphans()

    @property
    def client_ids(self) -> tuple[str, ...]:
        """All clients there are, sorted."""
        return tuple(self._numbers)

    @property
    def keep(self) -> int:
        """How many rounds back `restore` can go."""
        return self._keep

    @property
    def round(self) -> int:
        """How many rounds these states have seen."""
        return self._table.execute("SELECT round FROM store").fetchone()[0]

    def seen(self) -> tuple[str, ...]:
        """The clients that have a state, sorted."""
        return tuple(
            sorted(one for (one,) in self._table.execute("SELECT DISTINCT id FROM states"))
        )

    def get(self, client_id: str) -> OrderedDict[str, np.ndarray] | None:
        """A client's state, its tensors by name, such as `control/0`; None if it has none.

        Raises:
          ValueError: If the id is unknown.
          RuntimeError: If its file is damaged.
        """
        self._check_ids([client_id])
        path = self._file(client_id)
        if not path:
            return None
        try:
            reader = tf.train.load_checkpoint(path)
            names = sorted(set(reader.get_variable_to_shape_map()) - {"signature"})
            return OrderedDict((name, reader.get_tensor(name)) for name in names)
        except (tf.errors.OpError, ValueError, IndexError, RuntimeError) as error:
            raise RuntimeError(
                f"The state of client {client_id!r} must be readable; found {path}: {error} Go back "
                "by `restore` to a round in which it was whole, or bring a copy of it back."
            ) from error

    @contextlib.contextmanager
    def cohort(
        self, client_ids: Sequence[str], client_data: Sequence[Any]
    ) -> Iterator[list[OrderedDict[str, Any]]]:
        """The client data of one round; at the end of the block the states that it made are kept.

        Call `process.next` once inside.

        Args:
          client_ids: The round's clients, none repeated.
          client_data: The data of each, as the process would take it if clients kept nothing.

        Yields:
          What `process.next` takes.

        Raises:
          ValueError: If an id is unknown or repeated, or there are more or fewer data than ids.
          RuntimeError: If another cohort is still open; at the end of the block, if a client has not
            written its state: then all states are as before.
        """
        ids, data = list(client_ids), list(client_data)
        self._check_ids(ids)
        if len(ids) != len(data):
            raise ValueError(
                f"`client_data` must have one entry for each id; found {len(data)} for {len(ids)}."
            )
        if self._busy:
            raise RuntimeError("`cohort` must be the only one open; found another. End it first.")
        done, token = self.round, uuid.uuid4().hex[:12]
        files = [f"{self._numbers[one]}-{done + 1}-{token}" for one in ids]
        self._busy = True
        try:
            yield [
                OrderedDict(
                    data=its_data,
                    client=OrderedDict(
                        load=self._file(one),
                        save=os.path.join(self._path, file),
                        round=np.int32(done),
                        number=np.int32(self._numbers[one]),
                        clients=np.int32(len(self._numbers)),
                    ),
                )
                for one, file, its_data in zip(ids, files, data, strict=True)
            ]
            missing = [
                one
                for one, file in zip(ids, files, strict=True)
                if not os.path.exists(os.path.join(self._path, f"{file}.index"))
            ]
            if missing:
                raise RuntimeError(
                    "Each client of a cohort must have written its state at the end of the block; "
                    f"found none of {_few(missing)}. All states are as before: call `process.next` "
                    "once inside, on workers that see the files of this store."
                )
            self._commit(done + 1, ids, files)
        finally:
            self._busy = False
            self._drop_orphans()

    def _commit(self, following: int, ids: list[str], files: list[str]) -> None:
        if self._durable:
            for name in os.listdir(self._path):
                if name.split(".")[0] in files:
                    with open(os.path.join(self._path, name), "rb") as file:
                        os.fsync(file.fileno())
        with self._table:
            self._table.executemany(
                "INSERT INTO states VALUES (?, ?, ?)",
                [(one, following, file) for one, file in zip(ids, files, strict=True)],
            )
            self._table.execute("UPDATE store SET round = ?", (following,))
            # Of each client, what was replaced by the oldest round that can be restored.
            self._table.execute(
                "DELETE FROM states WHERE EXISTS (SELECT 1 FROM states AS later WHERE "
                "later.id = states.id AND later.round > states.round AND later.round <= ?)",
                (following - self._keep,),
            )

    def restore(self, round_number: int) -> None:
        """Goes back to the states after an earlier round, for good.

        Args:
          round_number: At most the present round, at least `keep` rounds before.

        Raises:
          ValueError: If it is neither.
        """
        now = self.round
        least = max(now - self._keep, 0)
        if isinstance(round_number, bool) or round_number not in range(least, now + 1):
            raise ValueError(
                f"`round_number` must be from {least} to {now}; found {round_number!r}. States are kept "
                f"for {self._keep} rounds back: see `keep`."
            )
        with self._table:
            self._table.execute("DELETE FROM states WHERE round > ?", (int(round_number),))
            self._table.execute("UPDATE store SET round = ?", (int(round_number),))
        self._drop_orphans()

    def close(self) -> None:
        """Lets go of the store; one in memory is dropped."""
        if self._lock.closed:
            return
        self._table.close()
        if not self._durable:
            shutil.rmtree(self._path, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> "ClientStates":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_ids(self, ids: list[str]) -> None:
        unknown = [one for one in ids if one not in self._numbers]
        if unknown:
            raise ValueError(
                f"`client_ids` must be among those that the store was made for; found {_few(unknown)}."
            )
        if len(set(ids)) < len(ids):
            raise ValueError(f"`client_ids` must not repeat a client; found {_repeated(ids)}.")

    def _file(self, client_id: str) -> str:
        row = self._table.execute(
            "SELECT file FROM states WHERE id = ? ORDER BY round DESC LIMIT 1", (client_id,)
        ).fetchone()
        return os.path.join(self._path, row[0]) if row else ""

    def _drop_orphans(self) -> None:
        """Deletes what no client's state is in: of failed rounds, and what was replaced."""
        used = {file for (file,) in self._table.execute("SELECT file FROM states")}
        for name in os.listdir(self._path):
            if _STATE.match(name) and name.split(".")[0] not in used:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self._path, name))


def _few(ids: Any) -> str:
    listed = sorted(ids)
    return f"{', '.join(map(repr, listed[:5])) or 'none'}{', ...' if len(listed) > 5 else ''}"


def _repeated(ids: list[str]) -> str:
    return _few({one for one in ids if ids.count(one) > 1})
