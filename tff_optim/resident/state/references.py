"""References to the tensors of a state on a device, as TFF's own value references."""

import abc
import asyncio
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident import leaves
from tff_optim.resident.state.variables import OnDevice


class _Explained(abc.ABCMeta):
    """Explains itself as a class, since TFF's error for a value that it cannot send shows the class."""

    def __repr__(cls) -> str:
        return (
            f"<class '{cls.__module__}.{cls.__qualname__}'>, a leaf of the `state` of a "
            "`ResidentProcess`: give a plain process `materialize(state)`, or the state to the "
            "`ResidentProcess`"
        )


class Reference(tff.program.MaterializableValueReference, metaclass=_Explained):
    """One tensor of a state on a device.

    NumPy and TensorFlow take it for the tensor, which brings the value to Python. It never changes, so
    its copy is the reference itself. Pickling it pickles the tensor.
    """

    def __init__(self, held: OnDevice, index: int):
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
        del copy  # the fetched value always is one
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


def references_to(held: OnDevice) -> Any:
    """The structure of a state with a reference at each leaf."""
    found = [Reference(held, i) for i in range(len(held.leaves))]
    return leaves.pack(found, held.sets.type)
