"""States in variables on a device of the Python process."""

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core.devices import device_scope
from tff_optim.resident import forks, leaves

CLOSED = (
    "`state` lives in a `ResidentProcess` that was closed, and is gone with it. Bring a state that is "
    "needed later to Python with `materialize`, or save it, while its process is open."
)


class Variables(list[tf.Variable]):
    """Variables that are reserved as long as somebody refers to this list."""


class VariableSets:
    """Sets of variables for states of one type; a set is reused once nobody refers to its state.

    States that somebody keeps so stay what they are, and a run that keeps none alternates between two
    sets: a round neither allocates nor copies.

    Args:
      type_spec: The type, of tensors alone.
      device: The device of the variables.

    Raises:
      ValueError: If the type contains anything but tensors.
    """

    def __init__(self, type_spec: tff.Type, device: str):
        self.type = type_spec
        self.leaves = leaves.leaves_of(type_spec)
        odd = [leaf.name for leaf in self.leaves if not leaf.is_tensor]
        if odd:
            raise ValueError(
                "`process` must have a state of tensors alone, which is what variables and "
                f"checkpoints hold; found something else at {odd}. Keep the numbers themselves in "
                "the state."
            )
        self._device = device
        self._owner = os.getpid()
        self._free: list[list[tf.Variable]] = []
        self._states: weakref.WeakSet[OnDevice] = weakref.WeakSet()
        self._lock = threading.RLock()  # Python may collect a state during any call
        self._closed = False

    def take(self) -> Variables:
        """Returns variables that nobody else uses; their values are arbitrary."""
        # Made by one thread at a time: of four under load, two mixed up their first values.
        with self._lock, device_scope(self._device):
            variables = self._free.pop() if self._free else None
            if variables is None:
                variables = [
                    tf.Variable(_any_value(leaf), False, shape=leaf.shape) for leaf in self.leaves
                ]
        taken = Variables(variables)
        weakref.finalize(taken, self._give_back, variables).atexit = False
        return taken

    def _give_back(self, variables: list[tf.Variable]) -> None:
        with self._lock:
            if not self._free and not self._closed:  # one free set is enough
                self._free.append(variables)

    def hold(self, values: Sequence[Any]) -> "OnDevice":
        """Brings the leaves of a state into variables."""
        variables = self.take()
        with device_scope(self._device):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(tf.convert_to_tensor(value, variable.dtype))
        return self.state(variables)

    def state(self, variables: Variables) -> "OnDevice":
        """Makes a state of variables that have its values."""
        with self._lock:
            if self._closed:
                raise RuntimeError(CLOSED)
            state = OnDevice(self, variables, self._owner)
            self._states.add(state)
        return state

    def close(self) -> None:
        """Releases all variables, even those of states that somebody still refers to."""
        with self._lock:
            self._closed = True
            self._free.clear()
            for state in self._states:
                state.forget()


class OnDevice:
    """A state in variables, which are reused when nobody refers to it any more."""

    def __init__(self, sets: VariableSets, variables: Variables, owner: int):
        self.sets = sets
        self.leaves = sets.leaves
        self._variables: Variables | None = variables
        self._owner = owner

    @property
    def variables(self) -> Variables:
        """The variables, which keep their values as long as somebody refers to the list.

        Raises:
          RuntimeError: If the process of the state was closed, or belongs to another Python process.
        """
        forks.check_owner("This `state` of a `ResidentProcess`", self._owner)
        if (variables := self._variables) is None:
            raise RuntimeError(CLOSED)
        return variables

    @property
    def where(self) -> str:
        """The devices of the variables."""
        if self._variables is None:
            return "`ResidentProcess` that was closed"
        devices = sorted({v.device.partition("device:")[2] for v in self._variables})
        return f"Python process on {', '.join(devices)}"

    def fetch(self) -> list[Any]:
        """Brings all leaves to Python."""
        return [plain(v) for v in self.variables]

    def fetch_leaf(self, index: int) -> Any:
        """Brings one leaf to Python."""
        variables = self.variables  # keeps them from being reused before they are read
        return plain(variables[index])

    def forget(self) -> None:
        """Releases the variables."""
        self._variables = None


def plain(tensor: tf.Tensor | tf.Variable) -> Any:
    """Returns a tensor's value as plain TFF does."""
    value = tensor.numpy()
    return value[()] if isinstance(value, np.ndarray) else value


def _any_value(leaf: leaves.Leaf) -> tf.Tensor:
    """A first value for a variable of a shape that may have unknown sizes."""
    sizes = [size or 0 for size in leaf.shape.as_list()]
    return tf.fill(sizes, "") if leaf.dtype == tf.string else tf.zeros(sizes, leaf.dtype)
