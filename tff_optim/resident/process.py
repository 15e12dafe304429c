"""ResidentProcess: a learning process whose server state stays in the worker."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tensorflow_federated as tff

from tff_optim.resident import leaves, references
from tff_optim.resident.errors import WorkerLostError
from tff_optim.resident.in_worker import handover, map_reduce, rounds
from tff_optim.resident.in_worker import worker as worker_lib
from tff_optim.resident.in_worker.host import ConnectionCutError, Host
from tff_optim.resident.references import Resident

_T = TypeVar("_T")


class ResidentProcess:
    """A `tff.learning.templates.LearningProcess` whose server state stays where it is computed.

    It is used like the process it wraps, and gives the same numbers. The leaves of its states
    are `tff.program.MaterializableValueReference`s: TFF's loops, program state managers and
    release managers fetch them when they need them. A plain state, such as a manager loads,
    can be given wherever a state is expected.

    Rounds run in TFF's MapReduce form, a few clients after the other, so that the worker's
    memory depends on the model and not on the cohort. A process in which one aggregation depends
    on another has no such form: its rounds run on all clients at once, as plain TFF runs them.

    Example:
        >>> import tensorflow as tf
        >>> model = tff.learning.models.functional_model_from_keras(
        ...     tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))]),
        ...     tf.keras.losses.MeanSquaredError(),
        ...     (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
        ... )
        >>> process = tff.learning.algorithms.build_weighted_fed_avg(
        ...     model, tff.learning.optimizers.build_sgdm(0.1)
        ... )
        >>> clients = [tf.data.Dataset.from_tensors(([[1.0, 2.0]], [[3.0]]))] * 2
        >>> with ResidentProcess(process) as resident:
        ...     state = resident.initialize()
        ...     for _ in range(3):
        ...         state, metrics = resident.next(state, clients)
        ...     weights = resident.get_model_weights(state)
        >>> [w.shape for w in weights.trainable]
        [(2, 1), (1,)]

    Args:
        process: The learning process.
        workers: None or 1 for one local worker, N for N local workers, or a list of
            `'host:port'` of running TFF workers. States live in the first one; every worker
            takes an equal share of each cohort.
        clients_per_step: The largest number of clients that a worker runs at once, which
            bounds its memory; None for eight times the number of this machine's cores.
            It makes no difference to the numbers.
        heartbeat: Seconds between two looks at a worker while it computes, and the time it
            has to answer before it counts as lost.
        start_timeout: Seconds that a worker has to start.

    Raises:
        TypeError: `process` is not a learning process.
        ValueError: An argument is out of range, or the process cannot be split as asked.
        WorkerStartError: A worker does not start or answer; raised at the first call.
    """

    def __init__(
        self,
        process: tff.learning.templates.LearningProcess,
        *,
        workers: int | Sequence[str] | None = None,
        clients_per_step: int | None = None,
        heartbeat: float = 10.0,
        start_timeout: float = 60.0,
    ):
        if not isinstance(process, tff.learning.templates.LearningProcess):
            raise TypeError(
                "`process` must be a `tff.learning.templates.LearningProcess`, found "
                f"{type(process).__name__}. Build one with `tff.learning.algorithms` or "
                "`tff.learning.templates.compose_learning_process`."
            )
        _check_positive("heartbeat", heartbeat)
        _check_positive("start_timeout", start_timeout)
        self._targets = _check_workers(workers)
        if clients_per_step is not None and (
            not isinstance(clients_per_step, int)
            or isinstance(clients_per_step, bool)
            or clients_per_step < 1
        ):
            raise ValueError(
                "`clients_per_step` must be a positive integer or None, found "
                f"{clients_per_step!r}."
            )
        self._process = process
        self._clients_per_step = clients_per_step
        self._heartbeat = heartbeat
        self._start_timeout = start_timeout
        self._state_type = process.initialize.type_signature.result.member
        self._data_type = process.next.type_signature.parameter[1]
        self._metrics_type = process.next.type_signature.result.metrics.member
        self._carrier = handover.build_carrier(self._state_type)
        self._compiled: dict[str, Any] = {}
        if clients_per_step is not None or len(self._targets) > 1:
            self._map_reduce()  # raises where the process cannot be split
        self._hosts: list[Host | None] = [None] * len(self._targets)
        self._closed = False

    @property
    def process(self) -> tff.learning.templates.LearningProcess:
        """The process that this one wraps."""
        return self._process

    @property
    def state_type(self) -> tff.Type:
        """The type of the server state, unplaced."""
        return self._state_type

    def initialize(self) -> Any:
        """Computes the initial state in the worker.

        Returns:
            A state with references as leaves.
        """
        computation = self._compile(
            "initialize", lambda: handover.compile_native(self._process.initialize)
        )

        def attempt() -> Resident:
            host = self._host(0)

            async def work() -> Resident:
                placed, executor = host.executor(0), host.own_executor()
                value = await placed.call(computation)
                value = await handover.move(
                    self._placed_carrier(), placed, value, self._carrier, executor
                )
                return Resident(self._carrier, executor, value)

            return host.run(work)

        return self.persist(attempt).references()

    def next(self, state: Any, client_data: Sequence[Any]) -> Any:
        """Runs one round.

        Args:
            state: A state of this process, or a plain state of the wrapped one.
            client_data: One dataset, or list of batches, for each client.

        Returns:
            A `tff.learning.templates.LearningProcessOutput` with the new state, whose leaves
            are references, and the plain metrics.

        Raises:
            TypeError: An argument is not what the wrapped process takes.
            WorkerLostError: The worker that held the state is gone.
        """
        if not isinstance(client_data, list | tuple):
            raise TypeError(
                "`client_data` must be a list with an entry for each client, found "
                f"{type(client_data).__name__}."
            )
        data = tff.tensorflow.transform_args(list(client_data))

        def attempt() -> tuple[Resident, Any]:
            resident = self._take_in(state)
            parts = self._map_reduce()
            if parts is None:
                return rounds.whole_round(
                    self._compile("next", lambda: handover.compile_native(self._process.next)),
                    self._placed_carrier(),
                    self._data_type,
                    resident,
                    data,
                )
            shares = map_reduce.split(data, len(self._hosts))
            hosts = [self._host(i) for i in range(len(shares))]
            at_once = self._clients_per_step or rounds.default_clients_per_step()
            return rounds.map_reduce_round(parts, resident, shares, hosts, at_once)

        new_state, metrics = self.persist(attempt)
        metrics = tff.types.type_to_py_container(metrics, self._metrics_type)
        return tff.learning.templates.LearningProcessOutput(
            new_state.references(), tff.tensorflow.transform_result(metrics)
        )

    def get_model_weights(self, state: Any) -> Any:
        """Brings the model weights of a state to Python."""
        return self.read("get_model_weights", self._process.get_model_weights, state)

    def get_hparams(self, state: Any) -> Any:
        """Brings the hyperparameters of a state to Python."""
        return self.read("get_hparams", self._process.get_hparams, state)

    def set_model_weights(self, state: Any, model_weights: Any) -> Any:
        """Returns a state with other model weights."""
        return self.write(
            "set_model_weights", self._process.set_model_weights, state, model_weights
        )

    def set_hparams(self, state: Any, hparams: Any) -> Any:
        """Returns a state with other hyperparameters."""
        return self.write("set_hparams", self._process.set_hparams, state, hparams)

    def materialize(self, state: Any) -> Any:
        """Brings a state to Python: the state of the wrapped process."""
        return leaves.pack(references.plain_leaves(state, self._state_type), self._state_type)

    def restore(self, plain_state: Any) -> Any:
        """Takes a plain state of the wrapped process into the worker.

        Raises:
            TypeError: It is not a state of the wrapped process.
        """
        return self.persist(lambda: self._take_in(plain_state)).references()

    def close(self) -> None:
        """Ends the local workers and closes the connections; states in them are gone."""
        self._closed = True
        for host in self._hosts:
            if host is not None:
                host.close()

    def __enter__(self) -> "ResidentProcess":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __repr__(self) -> str:
        names = [host.worker.name if host else "not started" for host in self._hosts]
        return f"<ResidentProcess on {', '.join(names)}>"

    def home(self) -> Host:
        """The worker that holds the states; started if need be."""
        return self._host(0)

    @property
    def carrier(self) -> handover.Carrier:
        """What moves states."""
        return self._carrier

    def _host(self, index: int) -> Host:
        if self._closed:
            raise RuntimeError("This `ResidentProcess` was closed.")
        host = self._hosts[index]
        if host is None or host.lost is not None:
            target = self._targets[index]
            worker: worker_lib.Worker
            if target is None:
                worker = worker_lib.LocalWorker(self._start_timeout)
            else:
                worker = worker_lib.RemoteWorker(target, self._start_timeout)
            host = self._hosts[index] = Host(worker, self._heartbeat)
            new = host

            async def look() -> None:
                await handover.look_for_files(new.own_executor())

            try:
                host.run(look)
            except BaseException:
                host.close()
                self._hosts[index] = None
                raise
        return host

    def _take_in(self, state: Any) -> Resident:
        """Returns the resident value of a state, taking a plain one into the worker."""
        resident = references.resident_of(state, self._state_type)
        host = self._host(0) if resident is None else resident.executor.host
        host.check()
        if resident is not None and host is self._host(0):
            return resident
        plain = references.plain_leaves(state, self._state_type)
        state = leaves.pack(plain, self._state_type)
        arrays = leaves.as_arrays(state, self._state_type)
        host = self._host(0)

        async def work() -> Resident:
            executor = host.own_executor()
            value = await handover.put(self._carrier, executor, arrays)
            await handover.wait(self._carrier, executor, value)
            return Resident(self._carrier, executor, value)

        return host.run(work)

    def persist(self, attempt: Callable[[], _T]) -> _T:
        """Tries again where a cut connection, or a lost worker without state, costs only time."""
        deadline = time.monotonic() + self._heartbeat
        replaced = 0
        while True:
            try:
                return attempt()
            except ConnectionCutError as e:
                if time.monotonic() > deadline:
                    raise WorkerLostError(
                        f"{e} It was cut again each time the call was repeated, for "
                        f"{self._heartbeat:g} seconds. States in the worker may still be there: "
                        "try again once the network is back."
                    ) from e
                time.sleep(0.2)
            except WorkerLostError:
                home = self._hosts[0]
                replaced += 1
                if (home is not None and home.lost is not None) or replaced > 1:
                    raise

    def _map_reduce(self) -> map_reduce.MapReduceRound | None:
        """The round in MapReduce form; None where it has none and nothing asks for it."""

        def build() -> map_reduce.MapReduceRound | None:
            try:
                return map_reduce.build_map_reduce_round(self._process.next)
            except ValueError as e:
                if self._clients_per_step is not None or len(self._targets) > 1:
                    raise
                logging.getLogger(__name__).info("Rounds run on all clients at once: %s", e)
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

    def read(self, name: str, computation: Any, state: Any, files: bool | None = None) -> Any:
        """Calls an unplaced `S -> T` in the worker and brings the result to Python."""
        compiled = self._compile(name, lambda: handover.compile_native(computation))
        carrier = self._compile(
            f"result of {name}",
            lambda: handover.build_carrier(computation.type_signature.result),
        )

        def attempt() -> list[Any]:
            resident = self._take_in(state)

            async def work() -> list[Any]:
                value = await resident.executor.call(compiled, resident.value)
                return await handover.fetch(carrier, resident.executor, value, files)

            return resident.executor.host.run(work)

        return leaves.pack(self.persist(attempt), carrier.type)

    def write(
        self, name: str, computation: Any, state: Any, part: Any, files: bool | None = None
    ) -> Any:
        """Calls an unplaced `<S, T> -> S` in the worker with a `T` from Python."""
        compiled = self._compile(name, lambda: handover.compile_native(computation))
        part_type = computation.type_signature.parameter[1]
        arrays = leaves.as_arrays(part, part_type)
        carrier = self._compile(f"part of {name}", lambda: handover.build_carrier(part_type))

        def attempt() -> Resident:
            resident = self._take_in(state)
            executor = resident.executor

            async def work() -> Resident:
                other = await handover.put(carrier, executor, arrays, files)
                value = await executor.call(compiled, resident.value, other)
                await handover.wait(self._carrier, executor, value)
                return Resident(self._carrier, executor, value)

            return executor.host.run(work)

        return self.persist(attempt).references()


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"`{name}` must be a positive number of seconds, found {value!r}.")


def _check_workers(workers: int | Sequence[str] | None) -> list[str | None]:
    if workers is None:
        return [None]
    if isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1:
        return [None] * workers
    if isinstance(workers, list | tuple) and workers:
        for target in workers:
            host, _, port = target.rpartition(":") if isinstance(target, str) else ("", "", "")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError(f"`workers` must name each worker 'host:port', found {target!r}.")
        if len(set(workers)) < len(workers):
            raise ValueError(f"`workers` must name each worker once, found {workers!r}.")
        return list(workers)
    raise ValueError(
        "`workers` must be None, a positive number of local workers, or a list of 'host:port', "
        f"found {workers!r}."
    )
