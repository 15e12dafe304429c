"""The clients of a round in the Python process, a few in one TensorFlow function."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tff_optim.core import tracing
from tff_optim.resident import leaves
from tff_optim.resident.clients import sizes
from tff_optim.resident.clients.arrays import ArrayClients
from tff_optim.resident.clients.in_process.data import ClientTensors
from tff_optim.resident.graphs.elements import pack
from tff_optim.resident.graphs.imported import ImportedComputation, as_function, spec_of
from tff_optim.resident.parts import RoundParts


class InProcess:
    """Trains clients side by side, and adds up what they return in their order.

    Args:
      parts: The round.
      device: Where the clients' operations go.
      at_once: How many clients one function trains at most; None to choose by cores and memory.
    """

    def __init__(self, parts: RoundParts, device: str, at_once: int | None):
        self._device = device
        self._import_work = functools.partial(ImportedComputation, parts.work, device, apart=True)
        self._work = self._import_work()
        self._work_of_arrays: ImportedComputation | None = None
        self._accumulate = ImportedComputation(parts.accumulate, device, apart=True)
        self._zero = as_function(ImportedComputation(parts.zero, device))
        data_type, context_type = parts.work.type_signature.parameter
        self._data = ClientTensors(data_type)
        self._context = [spec_of(leaf) for leaf in leaves.leaves_of(context_type)]
        self._total = [spec_of(leaf) for leaf in leaves.leaves_of(parts.aggregate_type)]
        self._most = at_once or sizes.at_once(context_type, per_core=2, small=32)
        # Each client of a function has variables of its own: nothing is shared between them.
        self._lanes: list[Any] = []
        self._functions: dict[tuple[int, bool], Any] = {}
        self._closed = threading.Event()

    @property
    def name(self) -> str:
        """The device."""
        return f"the Python process's {self._device[1:]}"

    def add_up(self, context: list[Any], client_data: Sequence[Any]) -> list[Any]:
        """Returns the leaves of the aggregate of a cohort."""
        kept: list[tf.data.Dataset] = []
        of_arrays = False
        shared: list[Any] = []
        if isinstance(client_data, ArrayClients):
            of_arrays = True
            batches = client_data.batches
            shared = [batches.order, batches.cuts, *client_data.arrays.on(self._device)]
            clients = list(batches.spans)
        else:
            clients = [self._data.of(data, kept) for data in client_data]
        total = self._zero([])
        for size in sizes.pieces(len(clients), self._most):
            if self._closed.is_set():
                raise RuntimeError("This `ResidentProcess` was closed.")
            function = self._function(size, of_arrays)
            total = function(total, context, clients[:size], shared)
            del clients[:size]
        return total

    def close(self) -> None:
        """Ends the round after the clients that are being trained, and lets go of variables."""
        self._closed.set()
        self._functions.clear()
        self._lanes.clear()

    def _function(self, size: int, of_arrays: bool) -> Any:
        """A function that adds the work of some clients to a total."""
        if (size, of_arrays) in self._functions:
            return self._functions[size, of_arrays]
        work = self._work
        if of_arrays:
            if self._work_of_arrays is None:
                self._work_of_arrays = self._import_work(arrays=True)
            work = self._work_of_arrays
        while len(self._lanes) < size:
            self._lanes.append((self._work.make_variables(), self._accumulate.make_variables()))
        lanes = self._lanes[:size]
        num_updates = len(self._accumulate.parameter) - len(self._total)

        def add(total: list[Any], context: list[Any], clients: list[Any], shared: list[Any]) -> Any:
            if of_arrays:
                clients = [[_of_client(span, *shared)] for span in clients]
            updates = [
                work([*data, *context], variables)[:num_updates]
                for data, (variables, _) in zip(clients, lanes, strict=True)
            ]
            for update, (_, variables) in zip(updates, lanes, strict=True):
                total = self._accumulate([*total, *update], variables)
            return total

        specs: tuple[Any, Any] = ([self._data.specs] * size, [])
        if of_arrays:
            rows = tf.TensorSpec([None], tf.int64)
            specs = ([tf.TensorSpec([4], tf.int64)] * size, [rows, rows, *work.specs_of_arrays])
        # The concrete function, since a call of the other takes 1.5 ms to find it.
        self._functions[size, of_arrays] = tracing.function(
            add, autograph=False
        ).get_concrete_function(self._total, self._context, *specs)
        return self._functions[size, of_arrays]


def _of_client(span: tf.Tensor, order: tf.Tensor, cuts: tf.Tensor, *arrays: tf.Tensor) -> Any:
    """A client's batches as its work takes them."""
    begin, end, first, last = tf.unstack(span)
    cuts = cuts[first:last, tf.newaxis]
    return pack([order[begin:end], cuts[:-1], cuts[1:] - cuts[:-1], *arrays])
