"""States in variables on a device of the Python process."""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.devices import device_scope
from tff_optim.resident import leaves
from tff_optim.resident.state.references import CLOSED, Held


class VariableSets:
    """Sets of variables for values of one type; a set is used again once nobody holds its value.

    So a state that somebody keeps stays what it was, and a run that keeps none takes two sets in
    turn: nothing is allocated in a round, and nothing copied.

    Args:
      type_spec: The type, of tensors alone.
      device: Where the variables are; None to leave it to TensorFlow.

    Raises:
      ValueError: The type has something else than tensors in it.
    """

    def __init__(self, type_spec: tff.Type, device: str | None):
        self.type = type_spec
        self.leaves = leaves.leaves_of(type_spec)
        odd = [leaf.name for leaf in self.leaves if not leaf.is_tensor]
        if odd:
            raise ValueError(
                "`process` must have a state of tensors alone to run on a `device` or `server_device`; "
                f"found something else at {odd}. Run the process in TFF's "
                "worker: leave the argument out."
            )
        self._device = device
        self._free: list[list[tf.Variable]] = []
        self._lock = threading.RLock()  # Python may collect a value inside of any call
        self.closed = False

    def take(self) -> list[tf.Variable]:
        """Returns variables that nobody else uses; their values are arbitrary."""
        with self._lock:
            if self._free:
                return self._free.pop()
        with device_scope(self._device):
            return [
                tf.Variable(_any_value(leaf), trainable=False, shape=leaf.shape)
                for leaf in self.leaves
            ]

    def give_back(self, variables: list[tf.Variable]) -> None:
        """Lets variables be used again; more than one set is not kept."""
        with self._lock:
            if not self._free and not self.closed:
                self._free.append(variables)

    def hold(self, arrays: Sequence[Any]) -> "OnDevice":
        """Brings leaves into variables."""
        variables = self.take()
        with device_scope(self._device):
            for variable, array in zip(variables, arrays, strict=True):
                variable.assign(tf.convert_to_tensor(array, variable.dtype))
        return OnDevice(self, variables)

    def close(self) -> None:
        """Lets go of the variables."""
        with self._lock:
            self.closed = True
            self._free.clear()


class OnDevice(Held):
    """A value in variables, which are used again when nobody refers to it any more."""

    def __init__(self, sets: VariableSets, variables: list[tf.Variable]):
        super().__init__(sets.type, sets.leaves)
        self.sets = sets
        self.variables = variables
        weakref.finalize(self, sets.give_back, variables).atexit = False

    @property
    def where(self) -> str:
        """The devices of the variables."""
        devices = sorted({_short(v.device) for v in self.variables}) or ["CPU:0"]
        return f"Python process on {', '.join(devices)}"

    def check(self) -> None:
        """Raises if the place of the value was closed."""
        if self.sets.closed:
            raise RuntimeError(CLOSED)

    def fetch(self) -> list[Any]:
        """Brings all leaves to Python."""
        self.check()
        return [plain(v) for v in self.variables]


def plain(tensor: tf.Tensor | tf.Variable) -> Any:
    """Returns what plain TFF returns for a tensor."""
    value = tensor.numpy()
    return value[()] if isinstance(value, np.ndarray) else value


def _any_value(leaf: leaves.Leaf) -> tf.Tensor:
    shape = [size or 0 for size in leaf.shape.as_list()]
    return tf.fill(shape, "") if leaf.dtype == tf.string else tf.zeros(shape, leaf.dtype)


def _short(device: str) -> str:
    return device.partition("device:")[2] or device
