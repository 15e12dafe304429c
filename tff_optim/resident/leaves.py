"""A value of a TFF type as a flat list of named tensors, and back."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff


@attrs.frozen
class Leaf:
    """One tensor (or sequence) of a type.

    Attributes:
        name: Its path, such as `global_model_weights/trainable/0`.
        type: Its TFF type.
    """

    name: str
    type: tff.Type

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor, which TensorFlow's checkpoint ops can write."""
        return isinstance(self.type, tff.TensorType)

    @property
    def shape(self) -> tf.TensorShape:
        """Its static shape."""
        return tf.TensorShape(self.type.shape)

    @property
    def dtype(self) -> tf.DType:
        """Its TensorFlow dtype."""
        return tf.dtypes.as_dtype(self.type.dtype)


# The recursive functions here are no closures: a closure that calls itself is a cycle, and keeps
# what it has seen, such as a state and its memory in the worker, until Python looks for cycles.


def leaves_of(type_spec: tff.Type) -> list[Leaf]:
    """Lists the leaves of an unplaced type, in TFF's order."""
    return [Leaf("/".join(path) or "value", leaf) for path, leaf in _walk_type(type_spec, ())]


def _walk_type(type_spec: tff.Type, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
    if not isinstance(type_spec, tff.StructType):
        yield path, type_spec
        return
    for i, (name, element) in enumerate(tff.structure.iter_elements(type_spec)):
        yield from _walk_type(element, (*path, name or str(i)))


def flatten(value: object, type_spec: tff.Type) -> list[Any]:
    """Lists what `value` holds at the leaves of `type_spec`.

    Raises:
        TypeError: `value` has another structure than `type_spec`.
    """
    return list(_walk_value(value, type_spec, ""))


def _walk_value(value: Any, type_spec: tff.Type, path: str) -> Iterable[Any]:
    if not isinstance(type_spec, tff.StructType):
        yield value
        return
    try:
        elements = tff.structure.to_elements(tff.structure.from_container(value))
    except TypeError:
        elements = None
    if elements is None or len(elements) != len(type_spec):
        raise TypeError(
            f"`state` must have the structure of the process's state at {path or 'the top'}: "
            f"expected {type_spec}, found {type(value).__name__}. Take a state from "
            "`initialize`, `next`, `restore` or the plain process."
        )
    for i, ((found_name, element), (name, element_type)) in enumerate(
        zip(elements, tff.structure.iter_elements(type_spec), strict=True)
    ):
        if found_name not in (name, None):
            raise TypeError(
                f"`state` must name its elements as the process does at {path or 'the top'}: "
                f"expected {name!r}, found {found_name!r}."
            )
        yield from _walk_value(element, element_type, f"{path}/{name or i}".lstrip("/"))


def pack(values: Sequence[Any], type_spec: tff.Type) -> Any:
    """Puts flat values into the Python containers that `type_spec` remembers."""
    return tff.types.type_to_py_container(_structured(iter(values), type_spec), type_spec)


def _structured(values: Iterator[Any], type_spec: tff.Type) -> Any:
    if not isinstance(type_spec, tff.StructType):
        return next(values)
    return tff.structure.Struct(
        [
            (name, _structured(values, element))
            for name, element in tff.structure.iter_elements(type_spec)
        ]
    )


def as_arrays(value: object, type_spec: tff.Type) -> list[Any]:
    """Lists the leaves of a plain value as NumPy arrays, after checking them.

    Raises:
        TypeError: A leaf has another dtype or shape than its type says.
    """
    arrays = []
    for leaf, item in zip(leaves_of(type_spec), flatten(value, type_spec), strict=True):
        if not leaf.is_tensor:
            arrays.append(item)
            continue
        if isinstance(item, tf.Tensor | tf.Variable):
            item = item.numpy()
        # A Python number has no dtype of its own.
        wanted = leaf.dtype.as_numpy_dtype
        array = np.asarray(item, wanted if isinstance(item, bool | int | float) else None)
        same_dtype = array.dtype.kind in "OSU" if leaf.dtype == tf.string else array.dtype == wanted
        if not same_dtype or not leaf.shape.is_compatible_with(array.shape):
            raise TypeError(
                f"`state` must hold {leaf.type} at {leaf.name}, found {array.dtype}"
                f"{list(array.shape)}. It comes from another model or optimizer."
            )
        arrays.append(array)
    return arrays


def num_bytes(type_spec: tff.Type) -> int:
    """Adds up the bytes of the leaves whose size is known before the run."""
    total = 0
    for leaf in leaves_of(type_spec):
        if leaf.is_tensor and leaf.shape.is_fully_defined() and leaf.dtype != tf.string:
            total += leaf.shape.num_elements() * leaf.dtype.size
    return total
