"""References to values that live elsewhere, as TFF's own value references."""

import abc
import asyncio
import threading
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident import leaves

CLOSED = (
    "`state` lives in a `ResidentProcess` that was closed, and is gone with it. Bring a state that is "
    "needed later to Python with `materialize`, or save it, while its process is open."
)


class Held(abc.ABC):
    """A value that lives in a worker or on a device; it goes when nobody refers to it any more.

    Args:
      type_spec: Its type, without placement.
    """

    def __init__(self, type_spec: tff.Type, names: list[leaves.Leaf]):
        self.type = type_spec
        self.leaves = names
        self._fetched: dict[int, Any] = {}
        self._lock = threading.Lock()

    @property
    @abc.abstractmethod
    def where(self) -> str:
        """How messages call the place."""

    @abc.abstractmethod
    def fetch(self) -> list[Any]:
        """Brings all leaves to Python."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises if the value is gone."""

    def fetch_leaf(self, index: int) -> Any:
        """Brings one leaf to Python; the others come along, each to be asked for once."""
        with self._lock:
            if index not in self._fetched:
                self._fetched = dict(enumerate(self.fetch()))
            return self._fetched.pop(index)

    def references(self) -> Any:
        """The value's structure with a reference at each leaf."""
        return leaves.pack([Reference(self, i) for i in range(len(self.leaves))], self.type)


class _Explained(abc.ABCMeta):
    """TFF's only word about a value that it cannot send to its worker is the value's class."""

    def __repr__(cls) -> str:
        return (
            f"<class '{cls.__module__}.{cls.__qualname__}'>, a leaf of the `state` of a "
            "`ResidentProcess`: give a plain process `materialize(state)`, or the state to the "
            "`ResidentProcess`"
        )


class Reference(tff.program.MaterializableValueReference, metaclass=_Explained):
    """One tensor of a value that lives elsewhere.

    It is as good as the tensor wherever NumPy or TensorFlow take one, which brings it to Python. It
    never changes, so that a copy is the reference itself; pickled, it becomes the tensor.
    """

    def __init__(self, held: Held, index: int):
        self.held = held
        self.index = index

    @property
    def type_signature(self) -> Any:
        """The `tff.TensorType` of the tensor."""
        return self.held.leaves[self.index].type

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The static shape of the tensor."""
        return tuple(self.held.leaves[self.index].shape.as_list())

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the tensor."""
        return np.dtype(self.held.leaves[self.index].dtype.as_numpy_dtype)

    async def get_value(self) -> Any:
        """Brings the tensor to Python."""
        return await asyncio.to_thread(self.held.fetch_leaf, self.index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # it comes from elsewhere: it always is one
        return np.asarray(self.held.fetch_leaf(self.index), dtype)

    def __copy__(self) -> "Reference":
        return self

    def __deepcopy__(self, memo: Any) -> "Reference":
        del memo
        return self

    def __reduce__(self) -> Any:
        return _same, (self.held.fetch_leaf(self.index),)

    def __repr__(self) -> str:
        leaf = self.held.leaves[self.index]
        return f"<{leaf.type} at {leaf.name} in the {self.held.where}>"


def _same(value: Any) -> Any:
    return value


def _to_tensor(
    reference: Reference, dtype: Any = None, name: str | None = None, as_ref: bool = False
) -> tf.Tensor:
    del as_ref
    return tf.convert_to_tensor(reference.held.fetch_leaf(reference.index), dtype, name=name)


tf.register_tensor_conversion_function(Reference, _to_tensor)


def held_by(state: object, type_spec: tff.Type) -> Held | None:
    """Returns the value whose references `state` is made of, all of them and in order.

    None means that the state holds plain values, or references of more than one value.
    """
    found = leaves.flatten(state, type_spec)
    if not found or not all(isinstance(x, Reference) for x in found):
        return None
    held = found[0].held
    if len(held.leaves) != len(found):
        return None
    if any(x.held is not held or x.index != i for i, x in enumerate(found)):
        return None
    return held


def plain_leaves(state: object, type_spec: tff.Type) -> list[Any]:
    """Lists the leaves of a state as plain values, wherever they are now."""
    held = held_by(state, type_spec)
    if held is not None:
        return held.fetch()
    return [
        x.held.fetch_leaf(x.index) if isinstance(x, Reference) else x
        for x in leaves.flatten(state, type_spec)
    ]
