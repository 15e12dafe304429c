"""Federations whose clients' data are arrays."""

import collections
import hashlib
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core.checks import check_whole, whole
from tff_optim.core.messages import shown
from tff_optim.resident.clients.arrays import ArrayClients, Arrays, Batches
from tff_optim.resident.graphs.fingerprints import of_parts

_READ = 1 << 12  # examples of a data set that are read at a time
_Path = tuple[str, ...]


class ClientArrays:
    """The data of all clients of a federation, as arrays with a row for each example.

    A client's batches in a round depend only on its id, the number of the round and `seed`. They are the
    same wherever the client trains, even in a run that was killed and resumed:

    - In the Python process (`ResidentProcess` without `workers`) batches are rows of the arrays, which
      are copied to the device once. No data set is made or read, which for small models takes most of a
      round.
    - In plain TFF and in workers each client of a round gets a data set of the same batches.

    Each epoch is cut into batches by itself, as by `dataset.batch(batch_size).repeat(epochs)`. If
    `shuffle` is true, rows have a new order in each epoch and each round.

    Example:
      >>> clients = ClientArrays(
      ...     {"ann": (np.ones([5, 2], np.float32), np.ones([5, 1], np.float32)), "bob": ([], [])},
      ...     batch_size=2,
      ... )
      >>> clients
      <ClientArrays: 2 clients, 5 examples>
      >>> [x.shape for x, y in clients.cohort(["ann"], round_number=1)[0]]
      [TensorShape([2, 2]), TensorShape([2, 2]), TensorShape([1, 2])]
      >>> model = tff.learning.models.functional_model_from_keras(
      ...     tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))]),
      ...     tf.keras.losses.MeanSquaredError(),
      ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      ... )
      >>> process = tff.learning.algorithms.build_weighted_fed_avg(
      ...     model, tff.learning.optimizers.build_sgdm(0.1)
      ... )
      >>> from tff_optim import ResidentProcess, simulation
      >>> with ResidentProcess(process) as resident:
      ...     history = simulation.run(resident, clients, rounds=3, clients_per_round=2)
      ...     state, metrics = resident.next(resident.initialize(), clients.cohort(["ann"], 1))

    Args:
      data: A mapping from ids to the arrays of a client, or a list of these (ids are positions): one
        array, or a tuple or mapping of arrays for the model, all with the same number of rows, which may
        be 0. A `tf.data.Dataset` of examples can replace the arrays. Or a
        `tff.simulation.datasets.ClientData`. Or, with `client_column`, a table: a mapping from names
        to columns, or a pandas `DataFrame`.
      batch_size: Rows of a batch; the last one of an epoch may have fewer.
      epochs: How often a client goes through its rows in a round.
      shuffle: Whether each epoch has an order of its own.
      seed: The seed of the orders.
      drop_remainder: Whether batches with fewer rows than `batch_size` are left out.
      max_batches: The largest number of batches of a client in a round; None for no limit.
      client_column: The column of a table with the id of each row's client. The other columns become a
        mapping from names to arrays.

    Raises:
      TypeError: If `data` has none of these forms.
      ValueError: If a number is out of range, or the arrays do not match; the message names the client
        and the part.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int,
        epochs: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_remainder: bool = False,
        max_batches: int | None = None,
        client_column: Hashable | None = None,
    ):
        self._batch_size, self._epochs, self._seed = whole(batch_size), whole(epochs), whole(seed)
        self._max_batches = sys.maxsize if max_batches is None else whole(max_batches)
        check_whole("batch_size", self._batch_size, 1)
        check_whole("epochs", self._epochs, 1)
        check_whole("max_batches", self._max_batches, 1)
        check_whole("seed", self._seed, -sys.maxsize)
        for name, value in (("shuffle", shuffle), ("drop_remainder", drop_remainder)):
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"`{name}` must be True or False; found {shown(value)}.")
        self._shuffle, self._drop_remainder = bool(shuffle), bool(drop_remainder)
        if client_column is not None:
            ids, clients = _clients_of_table(data, client_column)
        else:
            ids, clients = _clients_of(data)
        self._ids = ids
        self._position = _positions(ids)
        self._arrays, rows = _joined(ids, clients)
        self._rows = np.array(rows, np.int64)
        self._begins = np.cumsum(self._rows) - self._rows
        digests = [hashlib.blake2b(str(client).encode(), digest_size=8).digest() for client in ids]
        self._keys = np.frombuffer(b"".join(digests), np.uint64)

    @property
    def ids(self) -> list[Hashable]:
        """The ids of all clients."""
        return list(self._ids)

    @property
    def element_spec(self) -> Any:
        """The `tf.TensorSpec`s of a batch."""
        return self._arrays.element_spec

    def __repr__(self) -> str:
        return f"<ClientArrays: {len(self._ids)} clients, {self._rows.sum()} examples>"

    def cohort(self, ids: Iterable[Hashable], round_number: int) -> list[Any]:
        """The data of some clients in a round, for `next` of a process.

        Args:
          ids: The ids of the clients, without duplicates.
          round_number: The round, which decides the order of rows with `shuffle`.

        Returns:
          A list of data sets, one for each client, which are made on first use.

        Raises:
          ValueError: If an id is unknown or repeated.
        """
        ids = list(ids)
        number = whole(round_number)
        check_whole("round_number", number, 0)
        unknown = [client for client in ids if client not in self._position]
        if unknown:
            raise ValueError(
                f"`ids` must be those of clients, such as {shown(self._ids[0])}; found "
                f"{shown(unknown[0])}."
            )
        if len(set(ids)) < len(ids):
            twice = next(client for client in ids if ids.count(client) > 1)
            raise ValueError(f"`ids` must name each client once; found {shown(twice)} twice.")
        chosen = np.array([self._position[client] for client in ids], np.int64)
        return ArrayClients.of(ids, self._arrays, self._batches(chosen, number))

    def data_set(self, client: Hashable) -> tf.data.Dataset:
        """All rows of a client in order, once and in batches, for an evaluation."""
        i = self._position[client]
        ends = np.minimum(
            np.arange(0, self._rows[i] + self._batch_size, self._batch_size), self._rows[i]
        )
        rows = np.arange(self._begins[i], self._begins[i] + self._rows[i])
        return self._arrays.data_set(rows, ends)

    def fingerprint(self, client: Hashable) -> str:
        """A short description of a client's rows and batches that differs from others."""
        i = self._position[client]
        rows = self._arrays.rows(np.arange(self._begins[i], self._begins[i] + self._rows[i]))
        values = of_parts(*(part if part.dtype == object else part.tobytes() for part in rows))[:8]
        limit = None if self._max_batches == sys.maxsize else self._max_batches
        order = f"shuffled with seed {self._seed}" if self._shuffle else "in order"
        return (
            f"{self._rows[i]} rows of {self.element_spec}, {values}, {self._epochs} times {order} in "
            f"batches of {self._batch_size}, drop_remainder={self._drop_remainder}, "
            f"max_batches={limit}"
        )

    def _batches(self, clients: np.ndarray, number: int) -> Batches:
        """The batches of some clients, without a Python loop over clients."""
        size, rows = self._batch_size, self._rows[clients]
        kept = rows - rows % size if self._drop_remainder else rows  # in each epoch
        in_epoch = -(-kept // size)
        steps = np.minimum(in_epoch * self._epochs, self._max_batches)
        epochs = -(-steps // np.maximum(in_epoch, 1))  # begun
        whole_epochs = steps // np.maximum(in_epoch, 1)
        used = whole_epochs * kept + np.minimum(steps % np.maximum(in_epoch, 1) * size, kept)
        # An epoch of a client, and a row of an epoch, each as an entry.
        client = np.repeat(np.arange(len(clients)), epochs)
        epoch = _counted(epochs)
        of_epoch = np.repeat(np.arange(len(client)), rows[client])
        place = _counted(rows[client])
        row = place
        if self._shuffle:
            keys = _mixed(
                np.full(len(client), self._seed).astype(np.uint64), self._keys[clients][client]
            )
            keys = _mixed(_mixed(keys, np.uint64(number)), epoch.astype(np.uint64))
            row = place[_sorted_within(of_epoch, _mixed(keys[of_epoch], place.astype(np.uint64)))]
        of_client = client[of_epoch]
        taken = (place < kept[of_client]) & (
            epoch[of_epoch] * kept[of_client] + place < used[of_client]
        )
        order = (self._begins[clients][of_client] + row)[taken]
        step = _counted(steps + 1)
        of_step = np.repeat(np.arange(len(clients)), steps + 1)
        done, further = np.divmod(step, np.maximum(in_epoch, 1)[of_step])
        cuts = done * kept[of_step] + np.minimum(further * size, kept[of_step])
        return Batches(order, _bounds(used), cuts, _bounds(steps + 1))


def _bounds(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _counted(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each length, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _mixed(state: np.ndarray, value: Any) -> np.ndarray:
    """64 bits that depend on all bits of two numbers: the finalizer of SplitMix64.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    https://doi.org/10.1145/2714064.2660195
    """
    z = (state ^ value) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _sorted_within(groups: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The positions of entries, sorted by key within consecutive groups."""
    bits = int(groups[-1]).bit_length() if len(groups) else 0
    # Many times faster than a sort by two keys. Entries with equal remaining bits keep their order.
    joint = keys >> np.uint64(bits)
    if bits:
        joint |= groups.astype(np.uint64) << np.uint64(64 - bits)
    return np.argsort(joint, kind="stable")


def _clients_of(data: Any) -> tuple[list[Hashable], Iterator[Any]]:
    """The ids of clients, and their arrays in this order."""
    if isinstance(data, tff.simulation.datasets.ClientData):
        ids = list(data.client_ids)
        return ids, map(data.create_tf_dataset_for_client, ids)
    if isinstance(data, Mapping):
        return list(data), iter(data.values())
    if isinstance(data, list):
        return list(range(len(data))), iter(data)
    raise TypeError(
        "`data` must be a mapping from ids to arrays, a list of arrays, a "
        "`tff.simulation.datasets.ClientData`, or a table with a `client_column`; found "
        f"{shown(data)}."
    )


def _clients_of_table(data: Any, client_column: Hashable) -> tuple[list[Hashable], Iterator[Any]]:
    """The ids of clients in a column of a table, and the rows of each."""
    try:
        columns = {name: np.asarray(data[name]) for name in data}
    except (TypeError, KeyError, IndexError, ValueError):
        raise TypeError(
            "`data` must be a table where there is a `client_column`, a mapping from names to columns "
            f"or a pandas `DataFrame`; found {shown(data)}."
        ) from None
    if client_column not in columns or len(columns) < 2:
        raise ValueError(
            f"`client_column` must be one of several columns, {list(columns)}; found "
            f"{shown(client_column)}."
        )
    of_row = columns.pop(client_column)
    for name, column in columns.items():
        if of_row.ndim != 1 or column.ndim == 0 or len(column) != len(of_row):
            raise ValueError(
                f"`data` must have as many rows in each column as there are clients named in "
                f"{client_column!r}, {len(of_row) if of_row.ndim else 0}; found shape "
                f"{list(column.shape)} at {name!r}."
            )
    missing = [one for one in of_row.tolist() if one is None or one != one]
    if missing:
        raise ValueError(f"`client_column` must name a client in each row; found {missing[0]}.")
    position: dict[Hashable, int] = {}
    numbers = np.array([position.setdefault(one, len(position)) for one in of_row.tolist()], int)
    rows = np.split(
        np.argsort(numbers, kind="stable"),
        np.cumsum(np.bincount(numbers, minlength=len(position)))[:-1],
    )
    return list(position), (
        collections.OrderedDict((name, column[some]) for name, column in columns.items())
        for some in rows
    )


def _positions(ids: Sequence[Hashable]) -> dict[Hashable, int]:
    if not ids:
        raise ValueError("`data` must hold at least one client; found none.")
    # Records and states of clients use the ids as strings.
    texts: dict[str, Hashable] = {}
    for client in ids:
        if str(client) in texts:
            raise ValueError(
                "`data` must have ids that differ, also as strings; found "
                f"{texts[str(client)]!r} and {client!r}."
            )
        texts[str(client)] = client
    return {client: i for i, client in enumerate(ids)}


def _joined(ids: Sequence[Hashable], clients: Iterable[Any]) -> tuple[Arrays, list[int]]:
    """The rows of all clients in one array for each part, and how many each client has."""
    found = [_parts(client, data) for client, data in zip(ids, clients, strict=True)]
    rows = [len(next(iter(parts.values()))) for parts, _ in found]
    first = next((i for i, number in enumerate(rows) if number), 0)
    model, structure = found[first]
    for client, number, (parts, _) in zip(ids, rows, found, strict=True):
        if list(parts) != list(model):
            raise ValueError(
                f"The arrays of client {client!r} must be those that client {ids[first]!r} has, "
                f"{_listed(model)}; found {_listed(parts)}."
            )
        for path, array in parts.items():
            # Nothing can be told of an array without rows, such as an empty list.
            if number and not _alike(array, model[path]):
                raise ValueError(
                    f"The arrays of client {client!r} must be like those of client {ids[first]!r}, "
                    f"{_kind(model[path])} at {_at(path)}; found {_kind(array)}."
                )
    filled = [parts for number, (parts, _) in zip(rows, found, strict=True) if number] or [model]
    joined = [np.concatenate([parts[path] for parts in filled]) for path in model]
    return Arrays(joined, structure), rows


def _parts(client: Hashable, data: Any) -> tuple[dict[_Path, np.ndarray], Any]:
    """The arrays of a client by their paths, and the structure they are in."""
    if isinstance(data, tf.data.Dataset):
        data = _read(client, data)
    parts = {path: _array(client, path, value) for path, value in _walk(data, ())}
    lengths = {path: len(array) for path, array in parts.items()}
    if not parts:
        raise ValueError(f"The data of client {client!r} must be arrays; found {shown(data)}.")
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{number} at {_at(path)}" for path, number in lengths.items())
        raise ValueError(
            f"The arrays of client {client!r} must have the same number of rows; found {told}."
        )
    return parts, _structure(data)


def _walk(data: Any, path: _Path) -> Iterator[tuple[_Path, Any]]:
    """The parts of a structure and their paths, in the order of `tf.nest.flatten`."""
    if isinstance(data, Mapping):
        for name in sorted(data):
            yield from _walk(data[name], (*path, str(name)))
    elif isinstance(data, tuple):
        for i, part in enumerate(data):
            yield from _walk(part, (*path, str(i)))
    else:
        yield path, data


def _structure(data: Any) -> Any:
    """The same structure without lists, which are arrays."""
    if isinstance(data, Mapping):
        return collections.OrderedDict((name, _structure(part)) for name, part in data.items())
    if isinstance(data, tuple):
        parts = [_structure(part) for part in data]
        return type(data)(*parts) if hasattr(data, "_fields") else tuple(parts)
    return 0


def _array(client: Hashable, path: _Path, value: Any) -> np.ndarray:
    """An array of numbers or of text."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # rows of different lengths, or ragged and sparse tensors
        array = np.asarray(None)
    is_text = array.dtype.kind in "US" or (
        array.dtype == object and array.ndim and all(isinstance(x, str | bytes) for x in array.flat)
    )
    if array.ndim == 0 or (array.dtype.kind not in "biufc" and not is_text):
        raise ValueError(
            f"The data of client {client!r} must be arrays of numbers or text with a row for each "
            f"example; found {shown(value)} at {_at(path)}."
        )
    return array.astype(object) if is_text else array


def _read(client: Hashable, dataset: tf.data.Dataset) -> Any:
    """All examples of a data set as arrays."""
    try:
        pieces = [
            [np.asarray(part) for part in tf.nest.flatten(piece)]
            for piece in dataset.batch(_READ).as_numpy_iterator()
        ]
    except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
        raise ValueError(
            f"The data of client {client!r} must have examples of one shape; found others: {error}"
        ) from None
    specs = tf.nest.flatten(dataset.element_spec)
    if not pieces:
        pieces = [
            [np.zeros([0, *(n or 0 for n in one.shape)], one.dtype.as_numpy_dtype) for one in specs]
        ]
    parts = [np.concatenate(part) for part in zip(*pieces, strict=True)]
    return tf.nest.pack_sequence_as(dataset.element_spec, parts)


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape[1:] == other.shape[1:]


def _kind(array: np.ndarray) -> str:
    dtype = "text" if array.dtype == object else array.dtype.name
    return f"{dtype} of shape {[None, *array.shape[1:]]}"


def _at(path: _Path) -> str:
    return repr("/".join(path)) if path else "the only part"


def _listed(paths: Iterable[_Path]) -> str:
    return ", ".join(map(_at, paths))
