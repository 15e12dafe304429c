"""The clients of a round in TFF's workers, while the server is in the Python process."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident.clients import sizes
from tff_optim.resident.clients.in_workers import handover
from tff_optim.resident.clients.in_workers.connection import Connection
from tff_optim.resident.clients.in_workers.workers import Workers
from tff_optim.resident.graphs.resources import own_iterators
from tff_optim.resident.parts import RoundParts, compile_native


class InWorkers:
    """Trains a share of the cohort in each worker, and merges the aggregates.

    A worker needs memory for two aggregates, and for the clients that it runs at once.

    Args:
      parts: The parts of the round.
      workers: The workers.
      at_once: The largest number of clients that a worker runs at once; None to choose by cores and
        memory.
      merge: `<A, A> -> A` on the leaves of two aggregates, on the server.
    """

    def __init__(
        self,
        parts: RoundParts,
        workers: Workers,
        at_once: int | None,
        merge: Callable[[list[tf.Tensor]], list[tf.Tensor]],
    ):
        self._workers = workers
        self._merge = merge
        data_type, context_type = parts.work.type_signature.parameter
        aggregate_type = parts.aggregate_type
        self._at_once = at_once or sizes.at_once(context_type, per_core=8, small=128)

        of_client = own_iterators(parts.work)

        @tff.federated_computation(data_type, context_type)
        def work(data: Any, context: Any) -> Any:
            return of_client(data, context)[0]  # the others are inputs of secure sums

        @tff.federated_computation(aggregate_type)
        def detach(aggregate: Any) -> Any:
            return [aggregate[i] for i in range(len(aggregate_type))]

        self._zero = compile_native(parts.zero)
        self._work = compile_native(work)
        self._accumulate = compile_native(parts.accumulate)
        self._detach = compile_native(detach)
        self._context = handover.build_transfer(context_type)
        self._aggregate = handover.build_transfer(aggregate_type)
        # One for each number of clients.
        self._adding = functools.cache(
            functools.partial(_adding, self._work.type_signature, self._accumulate.type_signature)
        )

    @property
    def name(self) -> str:
        """The workers."""
        return self._workers.name

    def add_up(self, context: list[tf.Tensor], client_data: Sequence[Any]) -> list[tf.Tensor]:
        """Returns the leaves of the aggregate of a cohort."""
        data = tff.tensorflow.transform_args(list(client_data))
        shares = sizes.split(data, len(self._workers)) or [[]]

        def attempt() -> list[list[tf.Tensor]]:
            connections = [self._workers.connection(i) for i in range(len(shares))]
            calls = [
                to.start(functools.partial(self._add_share, to, context, share))
                for to, share in zip(connections, shares, strict=True)
            ]
            try:
                return [to.finish(call) for to, call in zip(connections, calls, strict=True)]
            except BaseException:
                for call in calls:
                    call.abandoned = True
                raise

        total, *others = self._workers.run(attempt)
        for other in others:
            total = self._merge([*total, *other])
        return total

    def close(self) -> None:
        """Ends the local workers and closes the connections."""
        self._workers.close()

    async def _add_share(
        self, to: Connection, context: list[tf.Tensor], share: Sequence[Any]
    ) -> list[tf.Tensor]:
        """Adds up the clients of a worker in their order, some of them side by side."""
        sent = await handover.put(self._context, to, context)
        functions = [await to.function(part) for part in (self._work, self._accumulate)]
        total = await to.call(self._zero)
        for number, clients in enumerate(_pieces(share, self._at_once)):
            if number:
                # Without this wait the worker would run all clients, with their memory, at once.
                await handover.wait(self._aggregate, to, total)
                # A value in TFF's worker keeps its inputs alive; selections from a finished one do not.
                total = await to.call(self._detach, total)
            # The worker starts on the first clients while others are still being sent. Small groups keep
            # it from waiting long for a call, large ones keep Python from making many calls.
            for group in _pieces(clients, max(4, self._at_once // 8)):
                add = self._adding(len(group))
                data = await to.create(list(group), add.type_signature.parameter[1])
                total = await to.call(add, total, data, sent, *functions)
        return await handover.fetch(self._aggregate, to, total)


def _adding(work_type: tff.Type, accumulate_type: tff.Type, num_clients: int) -> Any:
    """Builds `<A, [D, D, ...], C, (<D, C> -> U), (<A, U> -> A)> -> A`.

    It adds the work of some clients to an aggregate, in their order, in one call, so that the worker
    runs them side by side and Python has little to do for each.
    """
    data_type, context_type = work_type.parameter
    aggregate_type = accumulate_type.result

    @tff.federated_computation(
        aggregate_type, [data_type] * num_clients, context_type, work_type, accumulate_type
    )
    def add(aggregate: Any, cohort: Any, context: Any, work: Any, accumulate: Any) -> Any:
        for i in range(num_clients):
            aggregate = accumulate(aggregate, work(cohort[i], context))
        return aggregate

    return add


def _pieces(clients: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(clients), size):
        yield clients[begin : begin + size]
