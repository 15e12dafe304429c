"""The clients of a round in the Python process, in one loop of TensorFlow."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tff_optim.core import tracing
from tff_optim.core.devices import device_scope
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
      at_once: The largest number of clients that are trained at once; None to choose by cores and
        memory.
    """

    def __init__(self, parts: RoundParts, device: str, at_once: int | None):
        self._device = device
        self._import_work = functools.partial(ImportedComputation, parts.work, device, apart=True)
        self._accumulate = ImportedComputation(parts.accumulate, device, apart=True)
        self._zero = as_function(ImportedComputation(parts.zero, device))
        data_type, context_type = parts.work.type_signature.parameter
        self._data = ClientTensors(data_type)
        self._context = [spec_of(leaf) for leaf in leaves.leaves_of(context_type)]
        self._total = [spec_of(leaf) for leaf in leaves.leaves_of(parts.aggregate_type)]
        self._most = at_once or sizes.at_once(context_type, per_core=2, small=32)
        self._places = min(self._most, sizes.cores())
        self._functions: dict[bool, Any] | None = {False: self._adding_datasets()}

    @property
    def name(self) -> str:
        """The device."""
        return f"the Python process's {self._device[1:]}"

    def add_up(self, context: list[Any], client_data: Sequence[Any]) -> list[Any]:
        """Returns the leaves of the aggregate of a cohort."""
        kept: list[tf.data.Dataset] = []
        of_arrays = isinstance(client_data, ArrayClients)
        shared: list[Any] = []
        if isinstance(client_data, ArrayClients):
            batches = client_data.batches
            shared = [batches.order, batches.cuts, *client_data.arrays.on(self._device)]
            clients = list(batches.spans)
        else:
            clients = [self._data.of(data, kept) for data in client_data]
        total = self._zero([])
        # Between two calls Ctrl-C gets through.
        for some in sizes.split(clients, math.ceil(len(clients) / self._most)):
            if (functions := self._functions) is None:
                raise RuntimeError("This `ResidentProcess` was closed.")
            if of_arrays not in functions:
                functions[of_arrays] = self._adding_arrays()
            with tf.device("/CPU:0"):
                packed = tf.constant(some, tf.int64) if of_arrays else _packed(some)
            total = functions[of_arrays](total, context, packed, shared)
        return total

    def close(self) -> None:
        """Lets go of the functions; a round that is running ends after the clients in training."""
        self._functions = None

    def _adding_datasets(self) -> Any:
        """Builds what adds the work of some clients, each packed, to a total."""
        specs = self._data.specs

        def data_of(clients: tf.Tensor, number: tf.Tensor) -> Any:
            with tf.device("/CPU:0"):
                return tf.raw_ops.OptionalGetValue(
                    optional=clients[number],
                    output_types=[spec.dtype for spec in specs],
                    output_shapes=[spec.shape for spec in specs],
                )

        return self._adding(self._import_work(), data_of, tf.TensorSpec([None], tf.variant), [])

    def _adding_arrays(self) -> Any:
        """Builds what adds the work of some clients, each a span of batches, to a total."""
        work = self._import_work(arrays=True)
        rows = tf.TensorSpec([None], tf.int64)
        shared = [rows, rows, *work.specs_of_arrays]
        spans = tf.TensorSpec([None, 4], tf.int64)

        def data_of(clients: tf.Tensor, number: tf.Tensor, *shared: tf.Tensor) -> Any:
            return [_of_client(clients[number], *shared)]

        return self._adding(work, data_of, spans, shared)

    def _adding(self, work: ImportedComputation, data_of: Any, spec: Any, shared: Any) -> Any:
        num_updates = len(self._accumulate.parameter) - len(self._total)

        def add(total: list[Any], context: list[Any], clients: Any, shared: list[Any]) -> Any:
            def add_one(number: tf.Tensor, total: list[Any]) -> tuple[tf.Tensor, list[Any]]:
                data = data_of(clients, number, *shared)
                with device_scope(self._device):
                    # TensorFlow reads in one thread for each place in a graph: one for each core.
                    places = [lambda: work([*data, *context])[:num_updates]] * self._places
                    update = tf.switch_case(number % self._places, places)
                    return number + 1, self._accumulate([*total, *update])

            with device_scope(self._device):
                return tf.while_loop(
                    lambda number, _: number < tf.shape(clients)[0],
                    add_one,
                    [0, total],
                    [tf.TensorShape([]), [x.shape for x in total]],
                    parallel_iterations=self._most,
                )[1]

        # The concrete function, since a call of the other takes 1.5 ms to find it.
        return tracing.function(add, autograph=False).get_concrete_function(
            self._total, self._context, spec, shared
        )


def _packed(clients: Sequence[list[Any]]) -> tf.Tensor:
    """Some clients in one tensor, whatever the shapes of their own."""
    return tf.stack([tf.raw_ops.OptionalFromValue(components=one) for one in clients])


def _of_client(span: tf.Tensor, order: tf.Tensor, cuts: tf.Tensor, *arrays: tf.Tensor) -> Any:
    """A client's batches as its work takes them."""
    begin, end, first, last = tf.unstack(span)
    cuts = cuts[first:last, tf.newaxis]
    return pack([order[begin:end], cuts[:-1], cuts[1:] - cuts[:-1], *arrays])
