"""A value of a TFF type as a flat list of named tensors, and back."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

# What TensorFlow's reader raises for a checkpoint that is damaged: the byte decides which.
READ_ERRORS = (tf.errors.OpError, ValueError, IndexError, RuntimeError)


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


def flatten(value: object, type_spec: tff.Type, name: str = "state") -> list[Any]:
    """Lists what `value` holds at the leaves of `type_spec`.

    Args:
      value: A structure.
      type_spec: The type that it should have.
      name: The argument that it was given as, for messages.

    Raises:
      TypeError: `value` has another structure than `type_spec`.
    """
    return list(_walk_value(value, type_spec, "", name))


def _walk_value(value: Any, type_spec: tff.Type, path: str, argument: str) -> Iterable[Any]:
    if not isinstance(type_spec, tff.StructType):
        yield value
        return
    try:
        elements = tff.structure.to_elements(tff.structure.from_container(value))
    except TypeError:
        elements = None
    if elements is None or len(elements) != len(type_spec):
        raise TypeError(
            f"`{argument}` must have the structure of the process's {argument} at "
            f"{path or 'the top'}: {_expected(type_spec)}; found {_outline(value, elements)}. "
            f"{_SOURCES.get(argument, _OTHER_SOURCE).format(argument)}"
        )
    for i, ((found_name, element), (name, element_type)) in enumerate(
        zip(elements, tff.structure.iter_elements(type_spec), strict=True)
    ):
        if found_name not in (name, None):
            raise TypeError(
                f"`{argument}` must name its elements as the process does at "
                f"{path or 'the top'}: {_expected(type_spec)}; found {_outline(value, elements)}. "
                f"{_SOURCES.get(argument, _OTHER_SOURCE).format(argument)}"
            )
        yield from _walk_value(element, element_type, f"{path}/{name or i}".lstrip("/"), argument)


_SOURCES = {
    "state": "Take a state from `initialize`, `next`, `restore` or the plain process.",
    "client_data": "Give each client's data as the type of the process's `next` says.",
}
_OTHER_SOURCE = "Take what `get_{0}` returns and change values in it."


def _expected(type_spec: tff.StructType) -> str:
    names = [name for name, _ in tff.structure.iter_elements(type_spec)]
    return _listed(names)


def _outline(value: Any, elements: Any) -> str:
    if elements is None:
        return type(value).__name__
    return _listed([name for name, _ in elements])


def _listed(names: list[str | None]) -> str:
    if all(name is None for name in names):
        return f"{len(names)} elements"
    return f"the elements {', '.join(str(name) for name in names)}"


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


def as_arrays(value: object, type_spec: tff.Type, name: str = "state") -> list[Any]:
    """Lists the leaves of a plain value as NumPy arrays, after checking them.

    Args:
      value: A structure.
      type_spec: The type that it must have.
      name: The argument that it was given as, for messages.

    Raises:
      TypeError: A leaf has another dtype or shape than its type says.
    """
    arrays = []
    for leaf, item in zip(leaves_of(type_spec), flatten(value, type_spec, name), strict=True):
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
                f"`{name}` must hold {leaf.type} at {leaf.name}; found {array.dtype}"
                f"{list(array.shape)}. It comes from another model or optimizer: "
                f"{_SOURCES.get(name, _OTHER_SOURCE).format(name)}"
            )
        arrays.append(array)
    return arrays


def check_same(found: Sequence[Leaf], wanted: Sequence[Leaf]) -> None:
    """Checks that a state that lives somewhere has the tensors that a process's state has.

    Raises:
      TypeError: It has others.
    """
    for here, there in zip(found, wanted, strict=True):
        if here.name != there.name or not there.type.is_assignable_from(here.type):
            raise TypeError(
                f"`state` must hold {there.type} at {there.name}; found {here.type} at "
                f"{here.name}: a state of another `ResidentProcess`, of another model or "
                f"optimizer. {_SOURCES['state']}"
            )


def num_bytes(type_spec: tff.Type) -> int:
    """Adds up the bytes of the leaves whose size is known before the run."""
    total = 0
    for leaf in leaves_of(type_spec):
        if leaf.is_tensor and leaf.shape.is_fully_defined() and leaf.dtype != tf.string:
            total += leaf.shape.num_elements() * leaf.dtype.size
    return total


# A checkpoint must hold a tensor, and a state may have none. It also marks files as ours.
MARK = "tff_optim_resident_format"
_FORMAT = 1


def write_checkpoint(prefix: Any, names: Sequence[Leaf], tensors: Sequence[Any]) -> Any:
    """Writes leaves, and the mark, as the TensorFlow checkpoint `prefix`."""
    return tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=[*(leaf.name for leaf in names), MARK],
        shape_and_slices=[""] * (len(names) + 1),
        tensors=[*tensors, tf.constant(_FORMAT, tf.int32)],
    )


def read_checkpoint(prefix: Any, names: Sequence[Leaf]) -> list[tf.Tensor]:
    """Reads leaves from the TensorFlow checkpoint `prefix`."""
    tensors = tf.raw_ops.RestoreV2(
        prefix=prefix,
        tensor_names=[*(leaf.name for leaf in names), MARK],
        shape_and_slices=[""] * (len(names) + 1),
        dtypes=[*(leaf.dtype for leaf in names), tf.int32],
    )
    return [tf.ensure_shape(t, leaf.shape) for t, leaf in zip(tensors[:-1], names, strict=True)]
