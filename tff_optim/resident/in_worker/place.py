"""Processes whose states live in a TFF worker, and whose clients run in one or several."""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow_federated as tff

from tff_optim.resident import leaves
from tff_optim.resident import parts as parts_lib
from tff_optim.resident.clients.in_workers import compiled, handover
from tff_optim.resident.clients.in_workers.workers import Workers
from tff_optim.resident.in_worker import rounds
from tff_optim.resident.in_worker.values import Resident
from tff_optim.resident.place import Place, Source
from tff_optim.resident.state.references import Held


class WorkerPlace(Place):
    """A process in TFF's workers.

    Args:
      process: The learning process.
      workers: Where it runs; states live in the first one.
      clients_per_step: The largest number of clients that a worker runs at once, or None.
    """

    def __init__(
        self,
        process: tff.learning.templates.LearningProcess,
        workers: Workers,
        clients_per_step: int | None,
    ):
        self._process = process
        self._workers = workers
        self._clients_per_step = clients_per_step
        self._must_split = clients_per_step is not None or len(workers) > 1
        self._state_type = process.initialize.type_signature.result.member
        self._data_type = process.next.type_signature.parameter[1]
        self._metrics_type = process.next.type_signature.result.metrics.member
        self._carrier = handover.build_carrier(self._state_type)
        self._compiled: dict[str, Any] = {}
        self._kept: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        if self._must_split:
            self._round()  # raises where the process cannot be split

    @property
    def name(self) -> str:
        """The workers."""
        return self._workers.name

    @property
    def workers(self) -> Workers:
        """The workers."""
        return self._workers

    def owns(self, held: Held) -> bool:
        """Whether a value lives in the first worker; raises if its worker is gone."""
        if not isinstance(held, Resident) or held.rescued is not None:
            return False
        held.check()
        return held.executor.host is self._workers.host(0)

    def initialize(self) -> Held:
        """Computes the initial state in the first worker."""
        computation = self._compile(
            "initialize", lambda: handover.compile_whole(self._process.initialize)
        )

        def attempt() -> Resident:
            host = self._workers.host(0)

            async def work() -> Resident:
                placed, executor = host.executor(0), host.own_executor()
                value = await placed.call(computation)
                value = await handover.move(
                    self._placed_carrier(), placed, value, self._carrier, executor
                )
                return Resident(self._carrier, executor, value)

            return host.run(work)

        return self._workers.persist(attempt)

    def next(self, state: Source, client_data: Sequence[Any]) -> tuple[Held, Any]:
        """Runs a round, each worker on its share of the clients."""
        data = tff.tensorflow.transform_args(list(client_data))

        def attempt() -> tuple[Resident, Any]:
            resident = self._taken_in(state)
            parts = self._round()
            if parts is None:
                return rounds.whole_round(
                    self._compile("next", lambda: handover.compile_whole(self._process.next)),
                    self._placed_carrier(),
                    self._data_type,
                    resident,
                    data,
                )
            shares = compiled.split(data, len(self._workers))
            hosts = [self._workers.host(i) for i in range(len(shares))]
            at_once = self._clients_per_step or self._compile(
                "clients at once", lambda: rounds.clients_at_once(parts)
            )
            return rounds.map_reduce_round(parts, resident, shares, hosts, at_once)

        new_state, metrics = self._workers.run_round(attempt)
        return new_state, leaves.flatten(
            tff.tensorflow.transform_result(metrics), self._metrics_type
        )

    def take_in(self, state: Source) -> Held:
        """Brings a state into the first worker."""
        return self._workers.persist(lambda: self._taken_in(state))

    def get(self, computation: Any, state: Source) -> list[Any]:
        """Calls an unplaced `S -> T` in the worker and brings the result to Python."""
        native = self._of(computation, "native", lambda: handover.compile_native(computation))
        carrier = self._of(
            computation,
            "result",
            lambda: handover.build_carrier(computation.type_signature.result),
        )

        def attempt() -> list[Any]:
            resident = self._taken_in(state)

            async def work() -> list[Any]:
                value = await resident.executor.call(native, resident.value)
                return await handover.fetch(carrier, resident.executor, value)

            return resident.executor.host.run(work)

        return self._workers.persist(attempt)

    def set(self, computation: Any, state: Source, part: list[Any]) -> Held:
        """Calls an unplaced `<S, T> -> S` in the worker with a `T` from Python."""
        native = self._of(computation, "native", lambda: handover.compile_native(computation))
        carrier = self._of(
            computation,
            "part",
            lambda: handover.build_carrier(computation.type_signature.parameter[1]),
        )

        def attempt() -> Resident:
            resident = self._taken_in(state)
            executor = resident.executor

            async def work() -> Resident:
                other = await handover.put(carrier, executor, part)
                value = await executor.call(native, resident.value, other)
                await handover.wait(self._carrier, executor, value)
                return Resident(self._carrier, executor, value)

            return executor.host.run(work)

        return self._workers.persist(attempt)

    def save(self, state: Source, prefix: str) -> None:
        """Lets the worker write a checkpoint, or writes it here where it cannot."""
        if (
            isinstance(state, Resident)
            and state.rescued is None
            and state.executor.host.shares_files
        ):
            executor, value = state.executor, state.value
            executor.host.run(
                lambda: handover.save_in_worker(self._carrier, executor, value, prefix)
            )
            return
        arrays = state.fetch() if isinstance(state, Held) else state
        leaves.write_checkpoint(prefix, self._carrier.leaves, arrays)

    def load(self, prefix: str) -> Held:
        """Lets the worker read a checkpoint, or reads it here where it cannot."""

        def attempt() -> Resident:
            host = self._workers.host(0)

            async def work() -> Resident:
                executor = host.own_executor()
                if host.shares_files:
                    value = await handover.load_in_worker(self._carrier, executor, prefix)
                else:
                    tensors = leaves.read_checkpoint(prefix, self._carrier.leaves)
                    arrays = [t.numpy() for t in tensors]
                    value = await handover.put(self._carrier, executor, arrays)
                return Resident(self._carrier, executor, value)

            return host.run(work)

        return self._workers.persist(attempt)

    def close(self) -> None:
        """Ends the local workers and closes the connections."""
        self._workers.close()

    def _taken_in(self, state: Source) -> Resident:
        """Returns a state in the first worker, where a plain one is brought."""
        if isinstance(state, Resident) and self.owns(state):
            return state
        arrays = state.fetch() if isinstance(state, Held) else state
        host = self._workers.host(0)

        async def work() -> Resident:
            executor = host.own_executor()
            value = await handover.put(self._carrier, executor, arrays)
            await handover.wait(self._carrier, executor, value)
            return Resident(self._carrier, executor, value)

        return host.run(work)

    def _round(self) -> compiled.MapReduceRound | None:
        """The round in MapReduce form; None where it has none and nothing asks for it."""

        def build() -> compiled.MapReduceRound | None:
            try:
                return compiled.compile_round(parts_lib.cut(self._process.next))
            except parts_lib.NoMapReduceFormError as error:
                if self._must_split:
                    raise
                logging.getLogger(__name__).info("Rounds run on all clients at once: %s", error)
                return None

        return self._compile("round", build)

    def _placed_carrier(self) -> handover.Carrier:
        return self._compile(
            "placed", lambda: handover.build_carrier(self._state_type, placed=True)
        )

    def _compile(self, name: str, build: Callable[[], Any]) -> Any:
        if name not in self._compiled:
            self._compiled[name] = build()
        return self._compiled[name]

    def _of(self, computation: Any, name: str, build: Callable[[], Any]) -> Any:
        """What was built for a computation, built once."""
        built = self._kept.setdefault(computation, {})
        if name not in built:
            built[name] = build()
        return built[name]
