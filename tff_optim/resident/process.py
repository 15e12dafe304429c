"""ResidentProcess: a learning process whose server state stays in the Python process."""

import logging
import os
import threading
from collections.abc import Sequence

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import hyperparameters
from tff_optim.core.checks import check_flag, check_number, check_whole
from tff_optim.core.devices import DevicePolicy, select_device
from tff_optim.core.numbers import POSITIVE
from tff_optim.core.types import (
    Cohort,
    Computation,
    Hparams,
    State,
    Structure,
    Value,
    Weights,
)
from tff_optim.resident import leaves, parts
from tff_optim.resident.client_data import ClientData, explain
from tff_optim.resident.clients import Clients
from tff_optim.resident.clients.in_process.cohort import InProcess
from tff_optim.resident.clients.in_process.vectorised import Vectorised
from tff_optim.resident.clients.in_workers.cohort import InWorkers
from tff_optim.resident.clients.in_workers.workers import Workers
from tff_optim.resident.server import Server
from tff_optim.resident.state.references import references_to


class ResidentProcess:
    """A `tff.learning.templates.LearningProcess` whose server state stays where it is computed.

    Use it like the process that it wraps. State and server live in TensorFlow in the Python process, on
    a GPU if there is one. Clients train there too, or in TFF's workers. The leaves of its states are
    `tff.program.MaterializableValueReference`s, which TFF's loops, program state managers and release
    managers fetch when they need them. Wherever a state is expected, you can also give a plain state,
    as a manager loads it, or a state of another `ResidentProcess`.

    With `workers=1` its numbers equal plain TFF's to the bit; without workers, or with several, to
    rounding. Random numbers that plain TFF draws anew in every run cannot be repeated.

    Rounds run in TFF's MapReduce form, a few clients at a time, so the memory needed depends on the
    model and not on the cohort. A process in which one aggregation depends on another has no such form,
    and is refused.

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
      device: The device of the state, the server and, without `workers`, the clients: `'GPU:0'`,
        `'CPU:0'`, or a `DevicePolicy`. None for that of `set_device_policy`, else the first GPU if there
        is one, else the CPU. The attribute `device` says which it is.
      workers: None to train clients on the device too. N for N local TFF workers, or a list of
        `'host:port'` of running ones. Each worker takes an equal share of every cohort, and keeps
        nothing between rounds.
      clients_at_once: The largest number of clients that train at once, on the device or in each
        worker, which bounds the memory needed; None to choose by cores and memory. It does not change
        the numbers.
      vectorize: Whether groups of at most `clients_at_once` clients train in one vectorised program.
        Small models of dense layers train several times as fast, those of more than about 40,000
        numbers more slowly on a CPU, of which there is a warning. Numbers equal those of clients
        trained one by one to rounding, and building takes seconds longer. A client's data are read once
        for all passes over them.
      compile_step: Whether XLA compiles the server's step. None compiles it if the state has 4 MB or
        more in large tensors, XLA can compile it, and there are no workers.
      heartbeat: Seconds between two checks of a worker while it computes, and the time in which it must
        answer before it counts as lost.
      start_timeout: Seconds that a worker has to start.

    Raises:
      TypeError: If `process` is not a learning process, or `device` no device.
      ValueError: If an argument is out of range, there is no such device, or the process cannot be
        split, or vectorised.
    """

    def __init__(
        self,
        process: tff.learning.templates.LearningProcess,
        *,
        device: str | DevicePolicy | None = None,
        workers: int | Sequence[str] | None = None,
        clients_at_once: int | None = None,
        vectorize: bool = False,
        compile_step: bool | None = None,
        heartbeat: float = 10.0,
        start_timeout: float = 60.0,
    ):
        if not isinstance(process, tff.learning.templates.LearningProcess):
            raise TypeError(
                "`process` must be a `tff.learning.templates.LearningProcess`; found "
                f"{type(process).__name__}. Build one with `tff.learning.algorithms` or "
                "`tff.learning.templates.compose_learning_process`."
            )
        check_number("heartbeat", heartbeat, POSITIVE)
        check_number("start_timeout", start_timeout, POSITIVE)
        check_whole("clients_at_once", clients_at_once, 1, optional=True)
        check_flag("compile_step", compile_step, optional=True)
        check_flag("vectorize", vectorize)
        targets = _targets(workers)
        if vectorize and targets is not None:
            raise ValueError(
                "`vectorize` must be False where there are `workers`, which train clients one by one; "
                f"found workers={workers!r}. Leave one of the two out."
            )
        self._device = _chosen(device)
        parts.check_no_secure_sum(process.next)
        cut = parts.cut(process.next)
        self._process = process
        self._state_type = process.initialize.type_signature.result.member
        self._metrics_type = process.next.type_signature.result.metrics.member
        self._taken = ClientData(process.next.type_signature.parameter[1].member)
        self._server = Server(process, cut, self._device, compile_step, exact=targets is not None)
        self._clients: Clients
        if targets is None:
            place: Value = Vectorised if vectorize else InProcess
            self._clients = place(cut, self._device, clients_at_once)
        else:
            self._clients = InWorkers(
                cut,
                Workers(targets, heartbeat, start_timeout),
                clients_at_once,
                self._server.imported(cut.merge),
            )
        # The variables of the clients' functions serve one round at a time. Reading or making states
        # needs no lock, since each state has variables of its own.
        self._round = threading.RLock()

    @property
    def device(self) -> str:
        """The device of the state, such as `'GPU:0'`."""
        return self._device[1:]

    @property
    def process(self) -> tff.learning.templates.LearningProcess:
        """The process that this one wraps."""
        return self._process

    @property
    def state_type(self) -> tff.Type:
        """The type of the server state, unplaced."""
        return self._state_type

    def initialize(self) -> State:
        """Computes the initial state.

        Returns:
          A state with references as leaves.
        """
        return references_to(self._server.initialize())

    def next(self, state: State, client_data: Cohort) -> Structure:
        """Runs one round.

        Args:
          state: A state of this process, or a plain state of the wrapped one.
          client_data: One dataset, or list of batches, for each client; or a cohort of
            `simulation.ClientArrays`.

        Returns:
          A `tff.learning.templates.LearningProcessOutput` with the new state, whose leaves
          are references, and the plain metrics.

        Raises:
          TypeError: If the wrapped process does not take an argument. For data, the message names the
            client by its position.
          WorkerStartError: If a worker does not start or answer.
          WorkerLostError: If workers were lost again and again.
        """
        if not isinstance(client_data, list | tuple):
            raise TypeError(
                "`client_data` must be a list with an entry for each client; found "
                f"{type(client_data).__name__}."
            )
        data = self._taken.cohort(client_data)
        held = self._server.take_in(state)
        try:
            with self._round:
                self._server.check_open()
                context = self._server.prepare(held.variables)
                total = self._clients.add_up(context, data)
                new, metrics = self._server.step(held, total)
        except Exception as error:
            self._server.check_open()
            explain(error, enumerate(data))
            raise
        return tff.learning.templates.LearningProcessOutput(
            references_to(new), leaves.pack(metrics, self._metrics_type)
        )

    def get_model_weights(self, state: State) -> Weights:
        """Brings the model weights of a state to Python."""
        return self._get(self._process.get_model_weights, state)

    def get_hparams(self, state: State) -> Hparams:
        """Brings the hyperparameters of a state to Python."""
        return self._get(self._process.get_hparams, state)

    def set_model_weights(self, state: State, model_weights: Weights) -> State:
        """Returns a state with other model weights."""
        return self._set("model_weights", self._process.set_model_weights, state, model_weights)

    def set_hparams(self, state: State, hparams: Hparams) -> State:
        """Returns a state with other hyperparameters.

        Args:
          state: A state.
          hparams: Some hyperparameters of `get_hparams`, as Python or NumPy numbers of any width. The
            others stay as they are.

        Raises:
          TypeError: If a value is not a number.
          ValueError: If a name is unknown, or a number is not finite.
        """
        hparams = hyperparameters.complete(self.get_hparams(state), hparams)
        return self._set("hparams", self._process.set_hparams, state, hparams)

    def materialize(self, state: State) -> State:
        """Brings a state to Python: the state of the wrapped process."""
        return leaves.pack(self._server.take_in(state).fetch(), self._state_type)

    def restore(self, plain_state: State) -> State:
        """Brings a plain state of the wrapped process to the device.

        Raises:
          TypeError: If it is not a state of the wrapped process.
        """
        return references_to(self._server.take_in(plain_state))

    def close(self) -> None:
        """Ends the local workers, and frees the memory of all states of this process."""
        if os.getpid() != self._server.owner:
            return  # everything belongs to the parent
        self._server.closed = True
        self._clients.close()  # ends a round that another thread is waiting for
        with self._round:
            self._server.close()

    def __enter__(self) -> "ResidentProcess":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._server.closed:
            return "<ResidentProcess on nothing: closed>"
        return f"<ResidentProcess on {self.device}, clients in {self._clients.name}>"

    def __reduce__(self) -> Value:  # for copies too
        raise TypeError(
            "A `ResidentProcess` cannot be copied or pickled: states live where it runs, once. Use "
            "the same object, or build another with `ResidentProcess(resident.process)`; states "
            "move between the two."
        )

    def _get(self, computation: Computation, state: State) -> Structure:
        result = self._server.get(computation, state)
        return leaves.pack(result, computation.type_signature.result)

    def _set(self, name: str, computation: Computation, state: State, part: Structure) -> State:
        part_type = computation.type_signature.parameter[1]
        arrays = leaves.as_arrays(leaves.flatten(part, part_type, name), part_type, name)
        return references_to(self._server.set(computation, state, arrays))


def _chosen(device: str | DevicePolicy | None) -> str:
    """The requested device, else the first GPU, else the CPU."""
    chosen = select_device(device)
    if chosen is None:
        chosen = "/GPU:0" if tf.config.list_logical_devices("GPU") else "/CPU:0"
        logging.getLogger(__name__).info("A `ResidentProcess` runs on %s.", chosen[1:])
    return chosen


def _targets(workers: int | Sequence[str] | None) -> list[str | None] | None:
    """Each worker's `'host:port'`, or None for one to be started; None without workers."""
    if workers is None:
        return None
    if isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1:
        return [None] * workers
    if isinstance(workers, list | tuple) and workers:
        for target in workers:
            host, _, port = target.rpartition(":") if isinstance(target, str) else ("", "", "")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError(f"`workers` must name each worker 'host:port'; found {target!r}.")
        if len(set(workers)) < len(workers):
            raise ValueError(f"`workers` must name each worker once; found {workers!r}.")
        return list(workers)
    raise ValueError(
        "`workers` must be None, a positive number of local workers, or a list of 'host:port'; "
        f"found {workers!r}."
    )
