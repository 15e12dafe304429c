"""Compares clients' data with what a process takes, and says which client differs, and how."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.messages import shown


def check_client_data(data: Any, data_type: tff.Type, client: Any) -> None:
    """Raises unless a client's data is what a process takes.

    A `tf.data.Dataset` is judged by its `element_spec`, a list of batches by its first one, whose
    dtypes TFF converts by itself. No data is read.

    Example:
      >>> element = tff.TensorType(np.float32, [None, 2])
      >>> data = tf.data.Dataset.from_tensor_slices(np.ones([4, 2], np.float32))
      >>> check_client_data(data.batch(2), tff.SequenceType(element), "ann")
      >>> check_client_data(data, tff.SequenceType(element), "ann")
      Traceback (most recent call last):
        ...
      TypeError: The data of client 'ann' must be elements of float32[?,2]; found float32[2]. The
      element has 1 dimension and not 2: batch it, `dataset.batch(32)`.

    Args:
      data: A `tf.data.Dataset`, or a list of batches.
      data_type: What the process takes of one client; only a `tff.SequenceType` is checked.
      client: The client's id or position, for the message.

    Raises:
      TypeError: The data differs; the message names the client, what was found, what to do.
    """
    if not isinstance(data_type, tff.SequenceType):
        return
    wanted = data_type.element
    if isinstance(data, tf.data.Dataset):
        found = tff.types.tensorflow_to_type(data.element_spec)
        if wanted.is_assignable_from(found):
            return
        parts = dict(_leaves_of_type(found))
        problem = _difference(dict(_leaves_of_type(wanted)), parts, dtypes=True)
        problem = problem or "The structure differs: give an `OrderedDict` or tuple in this order."
    elif isinstance(data, list | tuple):
        if not len(data):
            return
        found = "a list of batches"
        problem = _difference(
            dict(_leaves_of_type(wanted)), dict(_leaves_of_value(data[0])), dtypes=False
        )
        if problem is None:
            return
    else:
        found = f"{type(data).__name__}, {shown(data)}"
        problem = "Give a `tf.data.Dataset` of batches, or a list of them."
    raise TypeError(
        f"The data of client {client!r} must be elements of {wanted}; found {found}. {problem}"
    )


def _difference(wanted: dict, found: dict, dtypes: bool) -> str | None:
    """The first difference of two mappings from paths to (shape, dtype), and what to do."""
    if len(wanted) == len(found) and all(p.isdigit() for path in found for p in path):
        found = dict(zip(wanted, found.values(), strict=True))  # a tuple where names are wanted
    if found.keys() == {()} and () not in wanted:
        (shape, _), names = found[()], [_at(path) for path in wanted]
        return (
            f"A batch must hold {names} together; the first is one array of shape {shape}: make a "
            "`tf.data.Dataset.from_tensor_slices(...).batch(32)` of the arrays."
        )
    missing = [_at(path) for path in wanted if path not in found]
    besides = [_at(path) for path in found if path not in wanted]
    if missing or besides:
        return (
            f"It lacks {missing} and has {besides} besides: bring it into the form of the model's "
            "`input_spec` with `dataset.map(...)`."
        )
    for path, (shape, dtype) in wanted.items():
        found_shape, found_dtype = found[path]
        where = f"The element at {_at(path)!r}" if path else "The element"
        if None not in (shape.rank, found_shape.rank) and found_shape.rank != shape.rank:
            dimensions = f"{found_shape.rank} dimension{'s' * (found_shape.rank != 1)}"
            cures = {
                shape.rank - 1: "batch it, `dataset.batch(32)`.",
                shape.rank + 1: "is it batched twice? Else reshape it with `dataset.map(...)`.",
            }
            cure = cures.get(found_shape.rank, "reshape it with `dataset.map(...)`.")
            return f"{where} has {dimensions} and not {shape.rank}: {cure}"
        if dtypes and found_dtype != dtype:
            return (
                f"{where} is {found_dtype} and not {dtype}: cast it, "
                f"`dataset.map(...)` with `tf.cast(..., tf.{dtype})`."
            )
        fits = shape.is_compatible_with(found_shape)
        if not fits:
            return f"{where} has shape {found_shape} and not {shape}: reshape it, or the model."
        if dtypes and any(n is not None and m is None for n, m in _dimensions(shape, found_shape)):
            return (
                f"{where} has shape {found_shape}, of which the model fixes more, {shape}: "
                "`dataset.batch(n, drop_remainder=True)`, or `None` in the model's `input_spec`."
            )
    return None


def _dimensions(shape: tf.TensorShape, other: tf.TensorShape) -> list[tuple]:
    if shape.rank is None or other.rank is None:
        return []
    return list(zip(shape.as_list(), other.as_list(), strict=True))


def _at(path: tuple[str, ...]) -> str:
    return "/".join(path)


def _leaves_of_type(type_spec: tff.Type, path: tuple[str, ...] = ()) -> Iterator[tuple]:
    if isinstance(type_spec, tff.StructType):
        for i, (name, member) in enumerate(tff.structure.iter_elements(type_spec)):
            yield from _leaves_of_type(member, (*path, name or str(i)))
    else:
        shape = tf.TensorShape(getattr(type_spec, "shape", None))
        yield path, (shape, np.dtype(getattr(type_spec, "dtype", object)).name)


def _leaves_of_value(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple]:
    if isinstance(value, Mapping):
        for name, member in value.items():
            yield from _leaves_of_value(member, (*path, str(name)))
    elif isinstance(value, tuple):
        names = getattr(value, "_fields", [str(i) for i in range(len(value))])
        for name, member in zip(names, value):
            yield from _leaves_of_value(member, (*path, name))
    else:
        yield path, (tf.TensorShape(np.shape(value)), None)
