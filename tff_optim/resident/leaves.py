"""A value of a TFF type as a flat list of named tensors, and back."""

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

# The errors of TensorFlow's reader for a damaged checkpoint, depending on the damaged byte.
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


# The recursive functions here are no closures: a closure that calls itself is a reference cycle, which
# keeps all that it has seen, such as a state's memory, until the garbage collector runs.


def leaves_of(type_spec: tff.Type) -> list[Leaf]:
    """Lists the leaves of an unplaced type, in TFF's order."""
    return [Leaf("/".join(path) or "value", leaf) for path, leaf in paths_of(type_spec)]


def paths_of(
    type_spec: tff.Type, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The paths and types of the leaves of an unplaced type, in TFF's order."""
    if not isinstance(type_spec, tff.StructType):
        yield path, type_spec
        return
    for i, (name, element) in enumerate(tff.structure.iter_elements(type_spec)):
        yield from paths_of(element, (*path, name or str(i)))


def flatten(value: Any, type_spec: tff.Type, name: str = "state", path: str = "") -> list[Any]:
    """Lists the parts of `value` at the leaves of `type_spec`.

    Args:
      value: A structure.
      type_spec: The type that it should have.
      name: The argument's name, for messages.
      path: The path of `value` in the argument, for messages.

    Raises:
      TypeError: If the structure of `value` is not that of `type_spec`.
    """
    if not isinstance(type_spec, tff.StructType):
        return [value]
    try:
        elements = tff.structure.to_elements(tff.structure.from_container(value))
    except TypeError:
        elements = None
    wanted = list(tff.structure.iter_elements(type_spec))
    fits = elements is not None and len(elements) == len(wanted)
    if not fits or any(a[0] not in (b[0], None) for a, b in zip(elements, wanted, strict=True)):
        found = type(value).__name__ if elements is None else _listed(elements)
        rule = (
            "name its elements as the process does"
            if fits
            else f"have the structure of the process's {name}"
        )
        raise TypeError(
            f"`{name}` must {rule} at {path or 'the top'}: {_listed(wanted)}; found {found}. "
            f"{_source(name)}"
        )
    return [
        leaf
        for i, ((_, element), (own, member)) in enumerate(zip(elements, wanted, strict=True))
        for leaf in flatten(element, member, name, f"{path}/{own or i}".lstrip("/"))
    ]


_SOURCES = {
    "state": "Take a state from `initialize`, `next`, `restore` or the plain process.",
    "client_data": "Give each client's data as the type of the process's `next` says.",
}


def _source(argument: str) -> str:
    other = f"Take what `get_{argument}` returns and change values in it."
    return _SOURCES.get(argument, other)


def _listed(elements: list[tuple[str | None, Any]]) -> str:
    if all(name is None for name, _ in elements):
        return f"{len(elements)} elements"
    return f"the elements {', '.join(str(name) for name, _ in elements)}"


def pack(values: Sequence[Any], type_spec: tff.Type) -> Any:
    """Puts flat values into the Python containers of `type_spec`."""
    return tff.types.type_to_py_container(structured(iter(values), type_spec), type_spec)


def structured(values: Iterator[Any], type_spec: tff.Type) -> Any:
    """Puts flat values into TFF's own containers, with the names of a type."""
    if not isinstance(type_spec, tff.StructType):
        return next(values)
    return tff.structure.Struct(
        [
            (name, structured(values, element))
            for name, element in tff.structure.iter_elements(type_spec)
        ]
    )


def as_arrays(found: Sequence[Any], type_spec: tff.Type, name: str = "state") -> list[np.ndarray]:
    """Checks the leaves of a value and makes them NumPy arrays.

    Args:
      found: The leaves.
      type_spec: The type that the value must have, of tensors alone.
      name: The argument's name, for messages.

    Raises:
      TypeError: If the dtype or shape of a leaf is not that of its type.
    """
    arrays = []
    for leaf, item in zip(leaves_of(type_spec), found, strict=True):
        if isinstance(item, tf.Tensor | tf.Variable):
            item = item.numpy()
        # A Python number has no dtype of its own.
        wanted = leaf.dtype.as_numpy_dtype
        array = np.asarray(item, wanted if isinstance(item, bool | int | float) else None)
        same_dtype = array.dtype.kind in "OSU" if leaf.dtype == tf.string else array.dtype == wanted
        if not same_dtype or not leaf.shape.is_compatible_with(array.shape):
            raise TypeError(
                f"`{name}` must hold {leaf.type} at {leaf.name}; found {array.dtype}"
                f"{list(array.shape)}. It comes from another model or optimizer: {_source(name)}"
            )
        arrays.append(array)
    return arrays


def num_bytes(type_spec: tff.Type) -> int:
    """Adds up the bytes of the leaves of known size."""
    total = 0
    for leaf in leaves_of(type_spec):
        if leaf.is_tensor and leaf.shape.is_fully_defined() and leaf.dtype != tf.string:
            total += leaf.shape.num_elements() * leaf.dtype.size
    return total


# What the first version of this package and of `aggregators` called some leaves.
EARLIER = {"step": "iterations", "decay": "memory"}


def earlier(name: str) -> str:
    """The name of a leaf in checkpoints of the first version."""
    path, slash, last = name.rpartition("/")
    return path + slash + EARLIER.get(last, last)


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


def read_checkpoint(
    prefix: Any, wanted: Sequence[Leaf], names: Sequence[str] | None = None
) -> list[tf.Tensor]:
    """Reads leaves from the TensorFlow checkpoint `prefix`; their names there may be others."""
    tensors = tf.raw_ops.RestoreV2(
        prefix=prefix,
        tensor_names=[*(names or (leaf.name for leaf in wanted)), MARK],
        shape_and_slices=[""] * (len(wanted) + 1),
        dtypes=[*(leaf.dtype for leaf in wanted), tf.int32],
    )
    return [tf.ensure_shape(t, leaf.shape) for t, leaf in zip(tensors[:-1], wanted, strict=True)]
