"""The clients of a round side by side in one TensorFlow program."""

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core import tracing
from tff_optim.core.devices import device_scope
from tff_optim.resident import leaves
from tff_optim.resident.clients.arrays import ArrayClients
from tff_optim.resident.clients.in_process import slices
from tff_optim.resident.clients.in_process.batches import Batches, Reader, from_arrays
from tff_optim.resident.clients.in_process.data import ClientTensors
from tff_optim.resident.clients.in_process.program import NoProgramError
from tff_optim.resident.clients.in_process.recording import record
from tff_optim.resident.clients.in_process.side_by_side import SideBySide, sum_over
from tff_optim.resident.graphs.imported import ImportedComputation, spec_of
from tff_optim.resident.parts import RoundParts

_MOST_NUMBERS = 40_000  # from about here on clients one by one are faster, on a CPU
_MOST_CLIENTS = 128
_MOST_BYTES = 512 << 20
_COPIES = 6  # of a model for each client: weights, gradients, the optimizer's slots


class Vectorised:
    """Trains groups of clients, each in one program, and adds up their updates.

    Args:
      parts: The round.
      device: Where the clients' operations go.
      at_once: The largest number of clients in a group; None to choose by memory.

    Raises:
      ValueError: If TensorFlow cannot vectorise a client's graph. The message names the operation.
    """

    def __init__(self, parts: RoundParts, device: str, at_once: int | None):
        self._device = device
        _warn_if_large(parts.context_type)
        self._zero = ImportedComputation(parts.zero, device)
        data_type, context_type = parts.work.type_signature.parameter
        self._data = ClientTensors(data_type)
        self._leaves = leaves.leaves_of(data_type)
        self._readers = {
            i: Reader(leaf.type.element)
            for i, leaf in enumerate(self._leaves)
            if not leaf.is_tensor
        }
        self._rows_alone = len(self._leaves) == 1  # without the place of a state
        size = _COPIES * max(leaves.num_bytes(context_type), 1)
        self._most = at_once or max(min(_MOST_BYTES // size, _MOST_CLIENTS), 1)
        work, accumulate = record(parts.work), record(parts.accumulate)
        if accumulate.checks:
            raise NoProgramError(f"a check while updates are added up ({accumulate.checks[0]})")
        self._checks = work.checks
        context = [spec_of(leaf) for leaf in leaves.leaves_of(context_type)]
        total = [spec_of(leaf) for leaf in leaves.leaves_of(parts.aggregate_type)]
        own = [spec_of(leaf) for leaf in self._leaves if leaf.is_tensor]
        stacked = [tf.TensorSpec([None, *spec.shape], spec.dtype) for spec in own]
        num_updates = len(accumulate.program.inputs) - len(total)
        clients = SideBySide(
            work.program.first(num_updates, bool(work.checks)),
            [True] * len(own) + [False] * len(context),
        )

        def add(
            total: list[Any],
            context: list[Any],
            tensors: list[Any],
            batches: list[Any],
            number: Any,
        ) -> Any:
            with device_scope(device):
                sources = dict(zip(self._readers, batches, strict=True))
                updates = clients([*tensors, *context], sources, number)
                fine = updates[num_updates:]
                new = sum_over(accumulate.program, total, updates[:num_updates], number)
                return new, fine

        self._add: Any = tracing.function(add, autograph=False).get_concrete_function(
            total,
            context,
            stacked,
            [reader.specs for reader in self._readers.values()],
            tf.TensorSpec([], tf.int32),
        )
        self._closed = threading.Event()

    @property
    def name(self) -> str:
        """The device."""
        return f"the Python process's {self._device[1:]}, vectorised"

    def add_up(self, context: list[Any], client_data: Sequence[Any]) -> list[Any]:
        """Returns the leaves of the aggregate of a cohort."""
        take: Any = self._from_data_sets
        if isinstance(client_data, ArrayClients):
            take = self._from_arrays
        elif self._rows_alone and (rows := slices.rows_of(client_data)) is not None:
            take, client_data = self._from_rows, rows
        total = self._zero([])
        first = 0
        while first < len(client_data):
            if self._closed.is_set():
                raise RuntimeError("This `ResidentProcess` was closed.")
            tensors, batches, number = take(client_data, first)
            total, fine = self._add(total, context, tensors, batches, tf.constant(number))
            _check(fine, first, self._checks)
            first += number
        return total

    def _from_arrays(self, clients: Any, first: int) -> tuple[list[Any], list[Batches], int]:
        """The data of a group from `first` on: tensors, batches, and the number of clients."""
        batches, number = from_arrays(clients, self._device, first, self._most, _MOST_BYTES)
        return [], [batches], number

    def _from_rows(self, clients: Any, first: int) -> tuple[list[Any], list[Batches], int]:
        """The data of a group whose data sets are rows of tensors."""
        return self._from_arrays(slices.joined(clients[first : first + self._most]), 0)

    def _from_data_sets(self, clients: Any, first: int) -> tuple[list[Any], list[Batches], int]:
        """The data of a group with data sets of other kinds."""
        kept: list[tf.data.Dataset] = []
        group = [self._data.of(data, kept) for data in clients[first : first + self._most]]
        batches: list[Batches] = []
        for i, reader in self._readers.items():
            # The first leaf with data sets decides how many clients fit into memory.
            most_bytes = tf.int64.max if batches else _MOST_BYTES
            read, number = reader([client[i] for client in group], most_bytes)
            group = group[:number]
            batches.append(read)
        tensors = [
            tf.stack([client[i] for client in group])
            for i, leaf in enumerate(self._leaves)
            if leaf.is_tensor
        ]
        return tensors, batches, len(group)

    def close(self) -> None:
        """Ends the round after the clients in training."""
        self._closed.set()


def _check(fine: list[tf.Tensor], first: int, names: tuple[str, ...]) -> None:
    """Raises if an assertion of the graph fails for a client of a group."""
    for ok in fine:
        bad = [first + i for i, good in enumerate(ok.numpy()) if not good]
        if bad:
            raise tf.errors.InvalidArgumentError(
                None,
                None,
                f"A check of the model's graph failed for the clients at {bad}, one of "
                f"{', '.join(names)}. Leave `vectorize` out to see its own message.",
            )


def _warn_if_large(context_type: tff.Type) -> None:
    numbers = leaves.num_bytes(context_type) // 4
    if numbers > _MOST_NUMBERS:
        warnings.warn(
            f"`vectorize` is slower on a CPU where a client is sent more than {_MOST_NUMBERS:,} "
            f"numbers; found {numbers:,}. Measure, or leave it out.",
            stacklevel=4,
        )
