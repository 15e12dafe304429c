"""The data of a round's clients as rows of arrays that all clients and rounds share."""

import functools
import itertools
import math
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import tensorflow as tf

from tff_optim.core.devices import device_scope


class Arrays:
    """The rows of all clients, on the host and on each device that has used them.

    Args:
      parts: Arrays with a row for each example, in the order of `tf.nest.flatten`.
      structure: The parts of a batch, as a structure of anything.
    """

    def __init__(self, parts: Sequence[np.ndarray], structure: Any):
        with device_scope("/CPU:0"):
            self._host = [tf.constant(part) for part in parts]
        self._structure = structure
        self._on: dict[str, list[tf.Tensor]] = {}
        self._lock = threading.Lock()

    @property
    def element_spec(self) -> Any:
        """A batch of any number of rows."""
        return self._packed(
            [tf.TensorSpec([None, *part.shape[1:]], part.dtype) for part in self._host]
        )

    @property
    def row_bytes(self) -> int:
        """The bytes of one row of all parts."""
        return sum(part.dtype.size * math.prod(part.shape[1:]) for part in self._host)

    def on(self, device: str) -> list[tf.Tensor]:
        """The parts on a device, or on the host if the device has too little memory."""
        with self._lock:
            if device not in self._on:
                try:
                    with device_scope(device):
                        self._on[device] = [tf.identity(part) for part in self._host]
                except tf.errors.ResourceExhaustedError:
                    self._on[device] = self._host
            return self._on[device]

    def rows(self, order: np.ndarray) -> list[np.ndarray]:
        """Some rows of each part."""
        with device_scope("/CPU:0"):
            return [tf.gather(part, order).numpy() for part in self._host]

    def data_set(self, order: np.ndarray, cuts: np.ndarray) -> tf.data.Dataset:
        """Batches of the rows between one cut and the next."""
        parts = self.rows(order)
        if len(cuts) == 1:
            return tf.data.Dataset.from_tensor_slices(self._packed(parts)).batch(1)
        pieces, begin = [], 0
        # One piece for each run of batches of equal size.
        for size, same in itertools.groupby(np.diff(cuts).tolist()):
            number = len(list(same))
            end = begin + size * number
            stacks = [part[begin:end].reshape(number, size, *part.shape[1:]) for part in parts]
            pieces.append(tf.data.Dataset.from_tensor_slices(self._packed(stacks)))
            begin = end
        return functools.reduce(tf.data.Dataset.concatenate, pieces)

    def _packed(self, parts: list[Any]) -> Any:
        return tf.nest.pack_sequence_as(self._structure, parts)


@attrs.frozen(eq=False)
class Batches:
    """The rows of some clients' batches, one client after the other.

    Attributes:
      order: int64 `[rows]`: the rows of all batches of all clients.
      order_bounds: int64 `[clients + 1]`: where each client's rows begin in `order`.
      cuts: int64 `[batches + clients]`: for each client, a 0 and then the ends of its batches among its
        own rows.
      cut_bounds: int64 `[clients + 1]`: where each client's cuts begin in `cuts`.
    """

    order: np.ndarray
    order_bounds: np.ndarray
    cuts: np.ndarray
    cut_bounds: np.ndarray

    @property
    def spans(self) -> np.ndarray:
        """int64 `[clients, 4]`: begin and end of each client in `order`, and in `cuts`."""
        bounds = (self.order_bounds, self.cut_bounds)
        return np.stack([side for one in bounds for side in (one[:-1], one[1:])], axis=1)


class ArrayClients(list):
    """The clients of a round: a list of data sets, which are made on first use.

    Clients that train in the Python process need none of them.

    Attributes:
      ids: The ids of the clients.
      arrays: The rows of all clients.
      batches: The batches of this round.
    """

    ids: Sequence[Hashable] = ()
    arrays: Arrays
    batches: Batches
    _made = True

    @classmethod
    def of(cls, ids: Sequence[Hashable], arrays: Arrays, batches: Batches) -> "ArrayClients":
        """The clients that have some batches."""
        # Code that bypasses the methods below finds None for every client, and fails.
        clients = cls([None] * len(ids))
        clients.ids, clients.arrays, clients.batches, clients._made = ids, arrays, batches, False
        return clients

    def _make(self) -> None:
        if self._made:
            return
        self._made = True
        for i, (begin, end, first, last) in enumerate(self.batches.spans):
            self[i] = self.arrays.data_set(
                self.batches.order[begin:end], self.batches.cuts[first:last]
            )

    def __iter__(self) -> Iterator[Any]:
        self._make()
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self._make()
        return super().__getitem__(index)

    def __repr__(self) -> str:
        return f"<data of {len(self)} clients in arrays>"
