"""Client states, stored by client id: each client gets its own, and a new one replaces it each round."""

import contextlib
import os
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from aggregators.client.state_files import Folder
from aggregators.client.state_table import Contents, Entry, Table, few
from aggregators.core import checks


class ClientStates:
    """The states of all clients by id, for processes whose clients keep a state.

    Clients read and write their states where they train, as TensorFlow checkpoints. States never pass
    through Python, and only those of the clients at work are in memory. Two paths and three numbers
    travel with a client's data. A cohort is therefore client data for any `LearningProcess`: in TFF's
    runtimes, in sub-rounds, and on several workers that see the same files.

    A round is all or nothing. At the end of the `with` block, one transaction commits the cohort's new
    states if nothing was raised and each client has written its own. Before that, and after a crash,
    all clients have their earlier states. Only one process at a time can open a store, and its forks
    cannot use it.

    Each round makes one version. The states after round `r` belong to the server's state after round
    `r`, and clients refuse to train with any other. After a crash between the two, or from an older
    checkpoint, go back with `restore`. Each file names its client and round and has a checksum, so
    damaged and exchanged files are refused.

    Disk (or memory) holds one state for each client that ever took part, and for `keep` rounds the
    states that were replaced. States of SCAFFOLD and FedDyn are as large as the trainable weights. A
    store in memory is gone when the process ends, in whatever way.

    Example: clients keep their optimizer's momentum, with the `model` of `build_fed_avg`

      >>> import tensorflow_federated as tff
      >>> from aggregators import build_fed_avg, rules
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

    def __init__(
        self,
        client_ids: Sequence[str],
        path: str | os.PathLike[str] | None = None,
        *,
        keep: int = 1,
    ):
        """Opens a store, or creates one.

        Args:
          client_ids: All clients that will ever take part, as strings without duplicates. An existing
            store must have the same clients.
          path: A directory for the store alone, created if missing. None keeps the store in memory
            (in `/dev/shm` where that exists) until `close`.
          keep: How many rounds a replaced state is kept, so that `restore` can go back to it. Use at
            least the number of rounds between two checkpoints of the server's state.

        Raises:
          TypeError: If an argument has the wrong type.
          ValueError: If an argument is out of range, the store belongs to other clients, comes from
            another version or is damaged, or the directory has other files and no store.
          RuntimeError: If another process or another `ClientStates` has the store open, or it cannot be
            read and written.
        """
        ids = _checked_ids(client_ids)
        self._keep = checks.whole("keep", keep, 1)
        self._numbers = {one: number for number, one in enumerate(sorted(ids))}
        self._owner: int | None = os.getpid()  # None once it is closed
        self._changing = threading.Lock()
        where = None if path is None else _checked_path(path)
        with _in_words(f"`path` must be a directory that can be used; found {where or 'memory'}"):
            self._files = Folder(where)
        try:
            self._table = Table(self._files.table, self.client_ids)
            self._clean()
        except BaseException:
            self._files.close()
            raise

    @property
    def client_ids(self) -> tuple[str, ...]:
        """All clients, sorted."""
        return tuple(self._numbers)

    @property
    def keep(self) -> int:
        """How many rounds a replaced state is kept."""
        return self._keep

    @property
    def round(self) -> int:
        """How many rounds these states have seen."""
        return self._contents().round

    @property
    def oldest_round(self) -> int:
        """The earliest round that `restore` can go back to."""
        return self._contents().oldest

    def seen(self) -> tuple[str, ...]:
        """The clients that have a state, sorted."""
        states = self._contents().states
        return tuple(one for one, number in self._numbers.items() if number in states)

    def get(self, client_id: str) -> OrderedDict[str, np.ndarray] | None:
        """The tensors of a client's state by name, such as `control/0`; None for a client without one.

        Raises:
          ValueError: If the id is unknown.
          RuntimeError: If the file of the state is damaged.
        """
        contents = self._contents()
        self._check_ids([client_id])
        entry = contents.latest(self._numbers[client_id])
        return None if entry is None else self._read(entry)

    @contextlib.contextmanager
    def cohort(
        self, client_ids: Sequence[str], client_data: Sequence[object]
    ) -> Iterator[list[OrderedDict[str, object]]]:
        """The client data of one round; the end of the block commits the new states.

        Call `process.next` once inside the block.

        Args:
          client_ids: The round's clients, without duplicates.
          client_data: The data of each client, as for a process whose clients keep nothing.

        Yields:
          The client data for `process.next`.

        Raises:
          ValueError: If an id is unknown or repeated, or the numbers of data and ids differ.
          RuntimeError: If another cohort is still open, or a state is missing. At the end of the block,
            if a client has not written its state, or the states cannot be stored: all states are then
            as before.
        """
        ids, data = list(client_ids), list(client_data)
        self._contents()
        self._check_ids(ids)
        if len(ids) != len(data):
            raise ValueError(
                f"`client_data` must have one entry for each id; found {len(data)} for {len(ids)}."
            )
        with self._alone("`cohort` must be the only one open"):
            before = self._contents()
            cohort = f"{self._table.token}-{uuid.uuid4().hex[:8]}"
            after = before.after([self._numbers[one] for one in ids], cohort, self._keep)
            files = {after.states[self._numbers[one]][-1].file: one for one in ids}
            earlier = [before.latest(self._numbers[one]) for one in ids]
            try:
                given = [
                    OrderedDict(
                        data=its_data,
                        client=OrderedDict(
                            load=self._load(entry),
                            save=self._files.at(file),
                            round=np.int32(before.round),
                            number=np.int32(self._numbers[one]),
                            clients=np.int32(len(self._numbers)),
                        ),
                    )
                    for its_data, entry, (file, one) in zip(
                        data, earlier, files.items(), strict=True
                    )
                ]
                try:
                    yield given
                except Exception as error:
                    self._explain(error, earlier)
                    raise
                self._contents()  # raises if the store was closed
                with _in_words(f"The states of this round could not be kept in {self._files}"):
                    missing = self._files.without(files)
                if missing:
                    raise RuntimeError(
                        "Each client of a cohort must have written its state at the end of the block; "
                        f"found none of {few(files[one] for one in missing)}. All states are as before: "
                        "call `process.next` once inside, on workers that see the files of this store."
                    )
                self._table.write(after)
            finally:
                self._clean()

    def restore(self, round_number: int) -> None:
        """Goes back to the states after an earlier round; this cannot be undone.

        Args:
          round_number: A round from `oldest_round` to the present one.

        Raises:
          ValueError: If it is not one of these rounds.
          RuntimeError: If a cohort is open, or a state of that round is damaged. After either error all
            states are as before.
        """
        with self._alone("`restore` must come between two rounds"):
            now = self._contents()
            if not checks.is_whole(round_number) or not now.oldest <= round_number <= now.round:
                raise ValueError(
                    f"`round_number` must be from {now.oldest} to {now.round}; found {round_number!r}. "
                    f"What was replaced before round {now.oldest} is gone: a state is kept for `keep` "
                    f"rounds, {self._keep} since the store was opened."
                )
            then = now.back_to(int(round_number))
            for number in now.states:
                entry = then.latest(number)
                if entry is not None and entry != now.latest(number):
                    self._read(entry)  # raises while nothing is lost yet
            self._table.write(then)
            self._clean()

    def close(self) -> None:
        """Closes the store; one in memory is deleted."""
        if self._owner == os.getpid():
            self._table.close()
            self._files.close()
        self._owner = None

    def __enter__(self) -> "ClientStates":
        self._contents()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _contents(self) -> Contents:
        """The committed contents; raises `RuntimeError` if the store cannot be used."""
        if self._owner is None:
            raise RuntimeError(f"This `ClientStates` of {self._files} is closed. Open it again.")
        if self._owner != os.getpid():
            raise RuntimeError(
                f"This `ClientStates` is that of process {self._owner}; found process {os.getpid()}, a "
                "fork of it. Use it there, or close it before the fork and open one here."
            )
        if not self._table.certain:
            raise RuntimeError(
                f"The states that count in {self._files} are unknown, since it could not be read. Close "
                "this `ClientStates`, and open it again."
            )
        return self._table.contents

    @contextlib.contextmanager
    def _alone(self, rule: str) -> Iterator[None]:
        self._contents()
        if not self._changing.acquire(blocking=False):
            raise RuntimeError(f"{rule}; found another cohort open. End it first.")
        try:
            yield
        finally:
            self._changing.release()

    def _load(self, entry: Entry | None) -> str:
        """The path from which a client loads its state; empty for a client without one."""
        if entry is None:
            return ""
        if not self._files.has(entry.file):
            raise self._unreadable(entry, "it is gone.")
        return self._files.at(entry.file)

    def _read(self, entry: Entry) -> OrderedDict[str, np.ndarray]:
        path = self._load(entry)
        try:
            reader = tf.train.load_checkpoint(path)
            shapes = reader.get_variable_to_shape_map()
            state = OrderedDict((name, reader.get_tensor(name)) for name in sorted(shapes))
            name = state.pop("file").decode()
            del state["signature"]
        except (tf.errors.OpError, ValueError, IndexError, KeyError, RuntimeError) as error:
            raise self._unreadable(entry, error) from error
        if name != entry.file:
            raise self._unreadable(entry, f"it was written as {name}.")
        return state

    def _explain(self, error: Exception, earlier: Sequence[Entry | None]) -> None:
        """Names the client whose damaged state made a round fail, which TensorFlow does not."""
        for entry in filter(None, earlier if self._owner == os.getpid() else ()):
            try:
                self._read(entry)
            except RuntimeError as damage:
                raise damage from error

    def _unreadable(self, entry: Entry, why: object) -> RuntimeError:
        return RuntimeError(
            f"The state of client {self.client_ids[entry.number]!r} must be readable; found "
            f"{self._files.at(entry.file)}: {why} All states are as before. Bring a copy of the file "
            f"back, or `restore` a round in which it was whole, from {self.oldest_round} on."
        )

    def _check_ids(self, ids: list[str]) -> None:
        unknown = [one for one in ids if not isinstance(one, str) or one not in self._numbers]
        if unknown:
            raise ValueError(
                "`client_ids` must be among those that the store was made for; found "
                f"{few(map(str, unknown))}."
            )
        if len(set(ids)) < len(ids):
            raise ValueError(f"`client_ids` must not repeat a client; found {_repeated(ids)}.")

    def _clean(self) -> None:
        """Deletes the files of failed rounds and of replaced states."""
        if self._owner == os.getpid() and self._table.certain:
            used = {entry.file for entry in self._table.contents.entries}
            with contextlib.suppress(OSError):  # a later round deletes them then
                self._files.keep_only(used, self._table.token)


def _checked_ids(client_ids: object) -> list[str]:
    ids = list(client_ids) if hasattr(client_ids, "__iter__") else [client_ids]
    if isinstance(client_ids, str) or not all(isinstance(one, str) for one in ids):
        raise TypeError(f"`client_ids` must be a list of strings; found {client_ids!r}.")
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(
            f"`client_ids` must be at least one, and none repeated; found {_repeated(ids)}."
        )
    return ids


def _checked_path(path: str | os.PathLike[str]) -> str:
    try:
        text = os.fsdecode(path)
        text.encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise TypeError(f"`path` must be the path of a directory; found {path!r}.") from error
    if not text or "\0" in text or "://" in text:
        raise ValueError(f"`path` must be a directory of this machine's files; found {path!r}.")
    return os.path.abspath(text)


@contextlib.contextmanager
def _in_words(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{what}: {error}. All states are as before: make room, or take another directory."
        ) from error


def _repeated(ids: list[str]) -> str:
    return few(one for one, times in Counter(ids).items() if times > 1)
