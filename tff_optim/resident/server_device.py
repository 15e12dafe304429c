"""A learning process whose server step runs on a device of the Python process.

TFF's worker has no GPU code. Here it runs the clients' work and the aggregation, and the
server's optimizer runs in Python's TensorFlow: its state stays on the device, and only the
aggregate and the new weights cross, once a round.
"""

import asyncio
import collections
import logging
import time
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.devices import device_scope, select_device
from tff_optim.resident import leaves
from tff_optim.resident.process import ResidentProcess
from tff_optim.resident.references import Resident, resident_of


@attrs.frozen
class HandoverTimes:
    """What it takes to bring an aggregate out of the worker and weights into it.

    Attributes:
        num_bytes: The size of the aggregate and the weights together.
        file_seconds: Through a file in shared memory; None where the worker sees no such file.
        message_seconds: Through gRPC messages.
        chosen: `'file'` or `'message'`, the faster one, which every round uses.
    """

    num_bytes: int
    file_seconds: float | None
    message_seconds: float
    chosen: str


class ServerDeviceProcess:
    """A learning process, given as its parts, whose server step runs on a chosen device.

    It gives the numbers of `tff.learning.templates.compose_learning_process` with
    `build_apply_optimizer_finalizer(server_optimizer)`, to rounding: an aggregate that is not
    finite changes nothing and is counted. Its states have the same structure, with references
    as leaves, and are used in the same ways as those of `ResidentProcess`.

    Args:
        initial_model_weights_fn: An unplaced computation of the initial
            `tff.learning.models.ModelWeights`.
        model_weights_distributor: A `tff.learning.templates.DistributionProcess`.
        client_work: A `tff.learning.templates.ClientWorkProcess`.
        model_update_aggregator: A `tff.templates.AggregationProcess`.
        server_optimizer: A `tff.learning.optimizers.Optimizer`.
        server_device: A device that TensorFlow sees, such as `'GPU:0'`.
        **settings: `workers`, `clients_per_step` and the rest of `ResidentProcess`.

    Raises:
        ValueError: TensorFlow sees no such device.
        TypeError: A part is not what it must be.
    """

    def __init__(
        self,
        initial_model_weights_fn: Any,
        model_weights_distributor: tff.learning.templates.DistributionProcess,
        client_work: tff.learning.templates.ClientWorkProcess,
        model_update_aggregator: tff.templates.AggregationProcess,
        server_optimizer: tff.learning.optimizers.Optimizer,
        *,
        server_device: str,
        **settings: Any,
    ):
        self._device = _find_device(server_device)
        if not isinstance(server_optimizer, tff.learning.optimizers.Optimizer):
            raise TypeError(
                "`server_optimizer` must be a `tff.learning.optimizers.Optimizer`, found "
                f"{type(server_optimizer).__name__}. Wrap a Keras optimizer with "
                "`build_keras_optimizer`."
            )
        self._optimizer = server_optimizer
        self._weights_type = initial_model_weights_fn.type_signature.result
        parts = (
            initial_model_weights_fn,
            model_weights_distributor,
            client_work,
            model_update_aggregator,
        )
        # The process as plain TFF runs it: only its types are used.
        plain = tff.learning.templates.compose_learning_process(
            *parts,
            tff.learning.templates.build_apply_optimizer_finalizer(
                server_optimizer, self._weights_type
            ),
        )
        self._state_type = plain.initialize.type_signature.result.member
        self._hparams_type = plain.get_hparams.type_signature.result
        clients_half = tff.learning.templates.compose_learning_process(
            *parts, _collecting_finalizer(self._weights_type)
        )
        self._inner = ResidentProcess(clients_half, **settings)
        self._get_aggregate = tff.tensorflow.computation(
            lambda state: state.finalizer, self._inner.state_type
        )
        self._step = tf.function(self._python_step)
        self._num_weights = len(leaves.leaves_of(self._weights_type))
        self._num_optimizer = len(leaves.leaves_of(self._state_type.finalizer))
        self._files: bool | None = None
        self._times: HandoverTimes | None = None

    @property
    def handover_times(self) -> HandoverTimes | None:
        """What the two ways took when they were measured; None before the first round."""
        return self._times

    def initialize(self) -> Any:
        """Computes the initial state: the worker's part there, the optimizer's on the device."""
        inner = self._inner.initialize()
        weights = leaves.flatten(self._inner.get_model_weights(inner), self._weights_type)
        trainable = leaves.pack(weights, self._weights_type).trainable
        specs = tf.nest.map_structure(lambda w: tf.TensorSpec(w.shape, w.dtype), trainable)
        with device_scope(self._device):
            optimizer_state = self._optimizer.initialize(specs)
        tensors = self._optimizer_tensors(optimizer_state)
        return self._new_state(inner, self._on_device(weights), tensors)

    def next(self, state: Any, client_data: Sequence[Any]) -> Any:
        """Runs one round; arguments, result and errors are those of `ResidentProcess.next`.

        Raises:
            RuntimeError: A tensor of the new state is on another device than was asked for.
        """
        held = self._held(state)
        inner, metrics = self._inner.next(held.inner, client_data)
        if self._files is None:
            self._measure(inner, held.weights)
        aggregate = self._inner.read("aggregate", self._get_aggregate, inner, self._files)
        update = self._on_device(leaves.flatten(aggregate, self._weights_type.trainable))
        with device_scope(self._device):
            optimizer_state, weights, non_finite = self._step(
                held.optimizer_state, held.weights, update
            )
        inner = self._inner.write(
            "set_model_weights",
            self._inner.process.set_model_weights,
            inner,
            leaves.pack([w.numpy() for w in weights], self._weights_type),
            self._files,
        )
        metrics["finalizer"]["update_non_finite"] = non_finite.numpy()
        new_state = self._new_state(inner, weights, optimizer_state)
        return tff.learning.templates.LearningProcessOutput(new_state, metrics)

    def get_model_weights(self, state: Any) -> Any:
        """Brings the model weights of a state to Python."""
        return leaves.pack([w.numpy()[()] for w in self._held(state).weights], self._weights_type)

    def set_model_weights(self, state: Any, model_weights: Any) -> Any:
        """Returns a state with other model weights."""
        held = self._held(state)
        arrays = leaves.as_arrays(model_weights, self._weights_type)
        inner = self._inner.set_model_weights(held.inner, leaves.pack(arrays, self._weights_type))
        return self._new_state(inner, self._on_device(arrays), held.optimizer_state)

    def get_hparams(self, state: Any) -> Any:
        """The hyperparameters of a state, those of the clients' work and of the optimizer."""
        held = self._held(state)
        flat = leaves.flatten(
            collections.OrderedDict(
                client_work=self._inner.get_hparams(held.inner)["client_work"],
                finalizer=self._optimizer.get_hparams(self._optimizer_state(held)),
            ),
            self._hparams_type,
        )
        types = leaves.leaves_of(self._hparams_type)
        arrays = [
            np.asarray(x, leaf.dtype.as_numpy_dtype)[()]
            for x, leaf in zip(flat, types, strict=True)
        ]
        return leaves.pack(arrays, self._hparams_type)

    def set_hparams(self, state: Any, hparams: Any) -> Any:
        """Returns a state with other hyperparameters, given as `get_hparams` returns them."""
        held = self._held(state)
        inner_hparams = self._inner.get_hparams(held.inner)
        inner_hparams["client_work"] = hparams["client_work"]
        inner = self._inner.set_hparams(held.inner, inner_hparams)
        optimizer_state = self._optimizer.set_hparams(
            self._optimizer_state(held), hparams["finalizer"]
        )
        return self._new_state(inner, held.weights, self._optimizer_tensors(optimizer_state))

    def materialize(self, state: Any) -> Any:
        """Brings a state to Python: the state of the composed process."""
        return leaves.pack(self._held(state).fetch(), self._state_type)

    def restore(self, plain_state: Any) -> Any:
        """Takes a state of the composed process to the worker and the device."""
        arrays = leaves.as_arrays(plain_state, self._state_type)
        weights, optimizer_state = arrays[: self._num_weights], arrays[-self._num_optimizer :]
        if not self._num_optimizer:
            optimizer_state = []
        plain = leaves.pack(arrays, self._state_type)
        trainable = plain.global_model_weights.trainable
        inner = self._inner.restore(plain._replace(finalizer=trainable))
        return self._new_state(inner, self._on_device(weights), self._on_device(optimizer_state))

    def close(self) -> None:
        """Ends the workers."""
        self._inner.close()

    def __enter__(self) -> "ServerDeviceProcess":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _python_step(
        self, optimizer_state: list[Any], weights: list[Any], update: list[Any]
    ) -> tuple[list[Any], list[Any], Any]:
        """The server step as TFF's own finalizer takes it, on flat lists of tensors."""
        with device_scope(self._device):
            model = leaves.pack(weights, self._weights_type)
            state_type = self._state_type.finalizer
            new_state, new_trainable = self._optimizer.next(
                leaves.pack(optimizer_state, state_type),
                model.trainable,
                leaves.pack(update, self._weights_type.trainable),
            )
            flat_state = leaves.flatten(new_state, state_type)
            flat_weights = leaves.flatten(
                model._replace(trainable=new_trainable), self._weights_type
            )
            finite = tf.reduce_all(
                [tf.reduce_all(tf.math.is_finite(u)) for u in update if u.dtype.is_floating]
            )
            kept_state, kept_weights = tf.cond(
                finite,
                lambda: (
                    [tf.identity(x) for x in flat_state],
                    [tf.identity(x) for x in flat_weights],
                ),
                lambda: (
                    [tf.identity(x) for x in optimizer_state],
                    [tf.identity(x) for x in weights],
                ),
            )
            return kept_state, kept_weights, tf.cast(tf.logical_not(finite), tf.int32)

    def _on_device(self, arrays: Sequence[Any]) -> list[tf.Tensor]:
        with device_scope(self._device):
            return [tf.identity(tf.convert_to_tensor(x)) for x in arrays]

    def _optimizer_state(self, held: "_Held") -> Any:
        return leaves.pack(held.optimizer_state, self._state_type.finalizer)

    def _optimizer_tensors(self, optimizer_state: Any) -> list[tf.Tensor]:
        types = leaves.leaves_of(self._state_type.finalizer)
        flat = leaves.flatten(optimizer_state, self._state_type.finalizer)
        with device_scope(self._device):
            return [
                tf.identity(tf.convert_to_tensor(x, leaf.dtype))
                for x, leaf in zip(flat, types, strict=True)
            ]

    def _new_state(
        self, inner: Any, weights: list[tf.Tensor], optimizer_state: list[tf.Tensor]
    ) -> Any:
        names = [leaf.name for leaf in leaves.leaves_of(self._state_type)]
        device_names = names[: self._num_weights] + names[len(names) - self._num_optimizer :]
        _check_devices(device_names, [*weights, *optimizer_state], self._device)
        held = _Held(self._state_type, self._inner, inner, list(weights), list(optimizer_state))
        return leaves.pack([DeviceReference(held, i) for i in range(len(names))], self._state_type)

    def _held(self, state: Any) -> "_Held":
        """Returns what a state's references stand for, restoring a plain or mixed state."""
        found = leaves.flatten(state, self._state_type)
        first = found[0].held if found and isinstance(found[0], DeviceReference) else None
        if first is not None and all(
            isinstance(x, DeviceReference) and x.held is first and x.index == i
            for i, x in enumerate(found)
        ):
            return first
        plain = [x.held.fetch()[x.index] if isinstance(x, DeviceReference) else x for x in found]
        restored = self.restore(leaves.pack(plain, self._state_type))
        return leaves.flatten(restored, self._state_type)[0].held

    def _measure(self, inner: Any, weights: list[tf.Tensor]) -> None:
        """Times both ways of crossing, out and in, and keeps the faster one."""
        model = leaves.pack([w.numpy() for w in weights], self._weights_type)
        setter = self._inner.process.set_model_weights
        seconds: dict[bool, float] = {}
        for files in (True, False):
            if files and not self._inner.home().shares_files:
                continue
            for _ in range(2):  # the first time compiles
                begin = time.perf_counter()
                self._inner.read("aggregate", self._get_aggregate, inner, files)
                self._inner.write("set_model_weights", setter, inner, model, files)
                seconds[files] = time.perf_counter() - begin
        self._files = seconds.get(True, float("inf")) < seconds[False]
        self._times = HandoverTimes(
            num_bytes=leaves.num_bytes(self._weights_type)
            + leaves.num_bytes(self._weights_type.trainable),
            file_seconds=seconds.get(True),
            message_seconds=seconds[False],
            chosen="file" if self._files else "message",
        )
        logging.getLogger(__name__).info("Server step on %s: %s", self._device, self._times)


class _Held:
    """What the references of one state stand for."""

    def __init__(
        self,
        type_spec: tff.Type,
        process: ResidentProcess,
        inner: Any,
        weights: list[tf.Tensor],
        optimizer_state: list[tf.Tensor],
    ):
        self.leaves = leaves.leaves_of(type_spec)
        self.inner = inner
        self.weights = weights
        self.optimizer_state = optimizer_state
        self._inner_type = process.state_type

    def fetch(self) -> list[Any]:
        """Brings all leaves to Python."""
        resident = resident_of(self.inner, self._inner_type)
        assert isinstance(resident, Resident)
        num_middle = len(self.leaves) - len(self.weights) - len(self.optimizer_state)
        middle: list[Any] = []
        if num_middle:
            middle = resident.fetch()[len(self.weights) :][:num_middle]
        here = [t.numpy()[()] if t.dtype != tf.string else t.numpy() for t in self.weights]
        return [*here, *middle, *(t.numpy() for t in self.optimizer_state)]


class DeviceReference(tff.program.MaterializableValueReference):
    """One tensor of a state that lives on a device of this process, or in its worker."""

    def __init__(self, held: _Held, index: int):
        self.held = held
        self.index = index

    @property
    def type_signature(self) -> Any:
        """The `tff.TensorType` of the tensor."""
        return self.held.leaves[self.index].type

    @property
    def device(self) -> str | None:
        """The device that holds the tensor; None where the worker does."""
        tensor = self._tensor()
        return None if tensor is None else _place(tensor)

    async def get_value(self) -> Any:
        """Brings the tensor to Python."""
        tensor = self._tensor()
        if tensor is not None:
            return tensor.numpy()
        return (await asyncio.to_thread(self.held.fetch))[self.index]

    def _tensor(self) -> tf.Tensor | None:
        held = self.held
        if self.index < len(held.weights):
            return held.weights[self.index]
        offset = self.index - (len(held.leaves) - len(held.optimizer_state))
        return held.optimizer_state[offset] if offset >= 0 else None


def _find_device(name: str) -> str:
    """Returns the `/KIND:INDEX` of a device, after checking that it is there."""
    if not isinstance(name, str):
        raise TypeError(
            f"`server_device` must be a string such as 'GPU:0', found {type(name).__name__}."
        )
    try:
        device = select_device(name)
    except ValueError as e:
        raise ValueError(f"`server_device` names no device that can be used: {e}") from e
    assert device is not None
    return device


def _place(tensor: tf.Tensor) -> str:
    """Where a tensor is; for what TensorFlow keeps in the host's memory, where it belongs."""
    # Integers and texts of a device's steps are such.
    return tensor.backing_device if tensor.dtype.is_floating else tensor.device


def _check_devices(names: Sequence[str], tensors: Sequence[tf.Tensor], device: str) -> None:
    """Raises unless every tensor is in the memory of the device."""
    for name, tensor in zip(names, tensors, strict=True):
        place = _place(tensor)
        if not place.endswith(f"/device:{device[1:]}"):
            raise RuntimeError(
                f"The server state must be on {device}, but {name} is on {place}. The optimizer "
                "places its tensors itself: remove its own device setting."
            )


def _collecting_finalizer(weights_type: Any) -> tff.learning.templates.FinalizerProcess:
    """A finalizer that leaves the weights as they are and keeps the aggregate as its state."""
    aggregate_type = weights_type.trainable

    @tff.tensorflow.computation
    def zeros() -> Any:
        flat = [tf.zeros(leaf.shape, leaf.dtype) for leaf in leaves.leaves_of(aggregate_type)]
        return leaves.pack(flat, aggregate_type)

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_eval(zeros, tff.SERVER)

    @tff.federated_computation(
        initialize.type_signature.result,
        tff.FederatedType(weights_type, tff.SERVER),
        tff.FederatedType(aggregate_type, tff.SERVER),
    )
    def next_fn(state: Any, weights: Any, update: Any) -> Any:
        del state  # the last round's aggregate
        # The count of rejected updates has its place in the metrics; the step fills it in.
        count = tff.federated_zip({"update_non_finite": tff.federated_value(0, tff.SERVER)})
        return tff.templates.MeasuredProcessOutput(update, weights, count)

    return tff.learning.templates.FinalizerProcess(initialize, next_fn)
