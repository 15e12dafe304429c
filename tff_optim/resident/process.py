"""ResidentProcess: a learning process whose server state stays where it is computed."""

import os
from collections.abc import Sequence
from typing import Any

import tensorflow_federated as tff

from tff_optim import hyperparameters
from tff_optim.client_data import ClientData, explain
from tff_optim.devices import DevicePolicy
from tff_optim.resident import forks, leaves, parts, places
from tff_optim.resident.place import Source
from tff_optim.resident.state import references


class ResidentProcess:
    """A `tff.learning.templates.LearningProcess` whose server state stays where it is computed.

    It is used like the process it wraps, and gives the same numbers. The leaves of its states
    are `tff.program.MaterializableValueReference`s: TFF's loops, program state managers and
    release managers fetch them when they need them. A plain state, such as a manager loads,
    can be given wherever a state is expected.

    It lives in a worker of TFF, in the first of several, or with `device` in TensorFlow of the
    Python process. A state of one place is taken over by every other, as are checkpoints.

    Rounds run in TFF's MapReduce form, a few clients after the other, so that the memory needed
    depends on the model and not on the cohort. A process in which one aggregation depends on
    another has no such form: its rounds run on all clients at once, as plain TFF runs them, in one
    worker.

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
      device: A device of the Python process for all of it, such as `'GPU:0'` or `'CPU:0'`, or a
        `DevicePolicy`: no worker is started, the state lives in variables on the device.
      server_device: The same for the state and the server's half of a round alone; clients run
        in workers.
      workers: None or 1 for one local worker, N for N local workers, or a list of
        `'host:port'` of running TFF workers. States live in the first one; every worker
        takes an equal share of each cohort.
      clients_per_step: The largest number of clients that a place runs at once, which
        bounds its memory; None for 8 times the number of this machine's cores in a worker,
        and about twice that number in the Python process, such that the first cohort falls
        into equal groups where it can. Of small models it is as many as make 16 MB, up to 128
        in a worker and 32 in the Python process. It makes no difference to the numbers.
      compile_step: Whether XLA compiles the server's step on a device; None for states of 4 MB
        and more in large tensors, where XLA can.
      heartbeat: Seconds between two looks at a worker while it computes, and the time it
        has to answer before it counts as lost.
      start_timeout: Seconds that a worker has to start.

    Raises:
      TypeError: `process` is not a learning process.
      ValueError: An argument is out of range, there is no such device, or the process cannot be
        split as asked.
      WorkerStartError: A worker does not start or answer; raised at the first call.
    """

    def __init__(
        self,
        process: tff.learning.templates.LearningProcess,
        *,
        device: str | DevicePolicy | None = None,
        server_device: str | DevicePolicy | None = None,
        workers: int | Sequence[str] | None = None,
        clients_per_step: int | None = None,
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
        self._settings = places.Settings(
            device=device,
            server_device=server_device,
            workers=workers,
            clients_per_step=clients_per_step,
            compile_step=compile_step,
            heartbeat=heartbeat,
            start_timeout=start_timeout,
        )
        parts.check_no_secure_sum(process.next)
        self._process = process
        self._state_type = process.initialize.type_signature.result.member
        self._metrics_type = process.next.type_signature.result.metrics.member
        self._taken = ClientData(process.next.type_signature.parameter[1].member)
        self._place = places.build_place(process, self._settings)
        self._owner = os.getpid()
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
        """Computes the initial state.

        Returns:
          A state with references as leaves.
        """
        self._check_open()
        return self._place.initialize().references()

    def next(self, state: Any, client_data: Sequence[Any]) -> Any:
        """Runs one round.

        Args:
          state: A state of this process, or a plain state of the wrapped one.
          client_data: One dataset, or list of batches, for each client.

        Returns:
          A `tff.learning.templates.LearningProcessOutput` with the new state, whose leaves
          are references, and the plain metrics.

        Raises:
          TypeError: An argument is not what the wrapped process takes; of data, the message
            names the client by its position.
          WorkerLostError: The worker that held the state is gone.
        """
        if not isinstance(client_data, list | tuple):
            raise TypeError(
                "`client_data` must be a list with an entry for each client; found "
                f"{type(client_data).__name__}."
            )
        data = [self._taken(one, client) for client, one in enumerate(client_data)]
        try:
            new_state, metrics = self._place.next(self._source(state), data)
        except Exception as error:
            explain(error, enumerate(data))
            raise
        return tff.learning.templates.LearningProcessOutput(
            new_state.references(), leaves.pack(metrics, self._metrics_type)
        )

    def get_model_weights(self, state: Any) -> Any:
        """Brings the model weights of a state to Python."""
        return self._get(self._process.get_model_weights, state)

    def get_hparams(self, state: Any) -> Any:
        """Brings the hyperparameters of a state to Python."""
        return self._get(self._process.get_hparams, state)

    def set_model_weights(self, state: Any, model_weights: Any) -> Any:
        """Returns a state with other model weights."""
        return self._set("model_weights", self._process.set_model_weights, state, model_weights)

    def set_hparams(self, state: Any, hparams: Any) -> Any:
        """Returns a state with other hyperparameters.

        Args:
          state: A state.
          hparams: Some of what `get_hparams` returns, as Python or NumPy numbers of any width;
            what is left out stays as it is.

        Raises:
          TypeError: A value is not a number.
          ValueError: A name is unknown, or a number is not finite.
        """
        hparams = hyperparameters.complete(self.get_hparams(state), hparams)
        return self._set("hparams", self._process.set_hparams, state, hparams)

    def materialize(self, state: Any) -> Any:
        """Brings a state to Python: the state of the wrapped process."""
        source = self._source(state)
        plain = source.fetch() if isinstance(source, references.Held) else source
        return leaves.pack(plain, self._state_type)

    def restore(self, plain_state: Any) -> Any:
        """Takes a plain state of the wrapped process to where this one runs.

        Raises:
          TypeError: It is not a state of the wrapped process.
        """
        return self._place.take_in(self._source(plain_state)).references()

    def close(self) -> None:
        """Ends the local workers and closes the connections; states of this process are gone."""
        self._closed = True
        self._place.close()

    def __enter__(self) -> "ResidentProcess":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ResidentProcess on {'nothing: closed' if self._closed else self._place.name}>"

    def __copy__(self) -> "ResidentProcess":
        raise TypeError(
            "A `ResidentProcess` cannot be copied or pickled: states live where it runs, once. Use "
            "the same object, or build another with `ResidentProcess(resident.process)`; states "
            "move between the two."
        )

    def __deepcopy__(self, memo: Any) -> "ResidentProcess":
        return self.__copy__()

    def __reduce__(self) -> Any:
        return self.__copy__()

    def _check_open(self) -> None:
        forks.check_owner("This `ResidentProcess`", self._owner)
        if self._closed:
            raise RuntimeError(
                "This `ResidentProcess` was closed. Use it inside of its `with` block, or build "
                "another one and go on from a checkpoint or a plain state."
            )

    def _source(self, state: Any) -> Source:
        """Finds what a state's references stand for; checks a plain or mixed state."""
        self._check_open()
        held = references.held_by(state, self._state_type)
        if held is None:
            plain = references.plain_leaves(state, self._state_type)
            return leaves.as_arrays(leaves.pack(plain, self._state_type), self._state_type)
        leaves.check_same(held.leaves, leaves.leaves_of(self._state_type))
        held.check()
        return held

    def _get(self, computation: Any, state: Any) -> Any:
        result = self._place.get(computation, self._source(state))
        return leaves.pack(result, computation.type_signature.result)

    def _set(self, name: str, computation: Any, state: Any, part: Any) -> Any:
        part_type = computation.type_signature.parameter[1]
        arrays = leaves.as_arrays(part, part_type, name)
        return self._place.set(computation, self._source(state), arrays).references()
