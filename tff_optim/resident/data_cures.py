"""Explains how a client's data differ from the type that a process takes, and names a cure.

The cure is a Python expression that mends all differences, in terms of `dataset` or `data` (the
argument), `tf`, `np` and `collections`.
"""

import itertools
import keyword
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core.messages import shown
from tff_optim.resident.graphs.nodes import of_data_set
from tff_optim.resident.leaves import paths_of

_BATCH = 32  # batch size in cures
_MOST = 3  # differences in a message
OF_PYTHON = "It calls functions of this Python process, such as a generator, which no worker can."
_INSTEAD = "Give a `tf.data.Dataset` of batches, or a list of them."


class Unlike(Exception):  # noqa: N818
    """The process does not take the data; the text says why, and what to give."""


@attrs.frozen
class _Leaf:
    """A part of a batch, or its specification, and the code that selects it."""

    value: Any
    code: str


_Leaves = dict[tuple[str, ...], _Leaf]


def check_dataset(dataset: tf.data.Dataset, wanted: tff.Type, code: str = "dataset") -> None:
    """Raises `Unlike` unless the elements of a data set have a type.

    At most one element is read, and only to find the cure.
    """
    if _fits(dataset, wanted):
        return
    specs = [leaf.value for leaf in _parts(dataset.element_spec, wanted).values()]
    if calls_python(dataset):
        _refuse_read([dataset], wanted, f"list({code})", OF_PYTHON)
    if any(isinstance(one, tf.TensorSpec) and one.shape.rank is None for one in specs):
        _refuse_read([dataset], wanted, f"list({code})", "Its shapes are known by reading alone.")
    reasons: list[str] = []
    if specs and all(isinstance(one, tf.data.DatasetSpec) for one in specs):
        reasons.append("The elements are windows, data sets themselves.")
        code, dataset = _without_windows(code, dataset)
    found = _paired(_parts(dataset.element_spec, wanted), wanted, reasons)
    code, dataset = _batched(code, dataset, found, wanted, reasons)
    found = _paired(_parts(dataset.element_spec, wanted), wanted, [])
    if not _fits(dataset, wanted):
        if any(getattr(leaf.value, "dtype", None) == tf.string for leaf in found.values()):
            _check_first_texts(dataset, wanted)
        each = _mended_batch(found, wanted, reasons, _same_dtype)
        if not reasons:
            reasons.append("The parts are in another container, or in an order that may not last.")
        argument = "*batch" if type(dataset.element_spec) is tuple else "batch"
        code = f"{code}.map(lambda {argument}: {each})"
    raise Unlike(_told(reasons, code))


def arrays_of_list(
    data: list[Any], wanted: tff.Type, code: str = "data"
) -> list[list[np.ndarray | tf.Tensor]]:
    """The arrays of each batch of a list, in the order and the dtypes of a type.

    Raises:
      Unlike: If a batch differs in more than the width of its numbers, or numbers are too large.
    """
    if data and all(isinstance(one, tf.data.Dataset) for one in data):
        each = f"[batch for one in {code} for batch in one]"
        _refuse_read(data, wanted, each, "Its elements are data sets themselves.")
    rows = []
    for i, batch in enumerate(data):
        try:
            rows.append(_arrays_of_batch(batch, data, wanted, code))
        except Unlike as unlike:
            raise Unlike(f"Batch {i}: {unlike}") from None
    return rows


def refuse(data: Any, wanted: tff.Type) -> NoReturn:
    """Raises `Unlike` for anything but a data set or a list."""
    if data is None:
        raise Unlike("Give `[]` for a client that has no data.")
    if not isinstance(data, tuple | Mapping | np.ndarray | tf.Tensor):
        raise Unlike(_INSTEAD)
    if isinstance(data, tuple):
        try:
            arrays_of_list(list(data), wanted)
        except Unlike:
            pass  # not batches in a tuple
        else:
            raise Unlike("A tuple is no list of batches. Give `list(data)`.")
    _refuse_arrays(data, wanted, "data")


def _refuse_arrays(arrays: Any, wanted: tff.Type, given: str) -> NoReturn:
    code = f"tf.data.Dataset.from_tensor_slices({given})"
    try:
        dataset = tf.data.Dataset.from_tensor_slices(arrays)
    except (TypeError, ValueError, tf.errors.OpError):
        raise Unlike(_INSTEAD) from None
    check_dataset(dataset, wanted, code)
    raise Unlike(f"Arrays of all batches are no data set yet. Give `{code}`.")


def calls_python(dataset: tf.data.Dataset) -> bool:
    """Whether a data set calls functions of the Python process, which workers cannot."""
    graph = of_data_set(dataset)
    nodes = itertools.chain(graph.node, *(one.node_def for one in graph.library.function))
    return any(node.op in ("PyFunc", "EagerPyFunc", "PyFuncStateless") for node in nodes)


def _refuse_read(datasets: list[Any], wanted: tff.Type, code: str, reason: str) -> NoReturn:
    """Raises `Unlike` with a cure that makes a list of data sets; the first element decides."""
    try:
        arrays_of_list(list(datasets[0].take(1)), wanted, code)
    except Unlike as unlike:
        raise Unlike(f"{reason} {unlike}") from None
    raise Unlike(f"{reason} Give `{code}`.")


def _arrays_of_batch(batch: Any, data: list[Any], wanted: tff.Type, code: str) -> list[Any]:
    if batch is None:
        raise Unlike(f"It is None. Give `[batch for batch in {code} if batch is not None]`.")
    found = _parts(batch, wanted)
    if found.keys() == {()} and isinstance(wanted, tff.StructType):
        names = [_at(path) for path, _ in paths_of(wanted)]
        if len(data) == len(names) and all(np.ndim(one) for one in data):
            _refuse_arrays(tuple(data), wanted, f"tuple({code})")
        is_array = isinstance(batch, np.ndarray | tf.Tensor | tf.Variable)
        one = f"one array of shape {list(batch.shape)}" if is_array else shown(batch)
        raise Unlike(f"It must hold {', '.join(names)} together; found {one}. {_INSTEAD}")
    reasons: list[str] = []
    found = _paired(found, wanted, reasons)
    arrays = [_read(found[path].value) for path, _ in paths_of(wanted)]
    found = {
        path: _Leaf(_spec_of(array), found[path].code)
        if not isinstance(array, tf.RaggedTensor) or tf.is_tensor(found[path].value)
        else _Leaf(_spec_of(array), f"tf.ragged.constant({found[path].code})")
        for (path, _), array in zip(paths_of(wanted), arrays, strict=True)
    }
    one_example = _is_example(found, wanted)
    if one_example:
        reasons.append(f"It is an example and no batch: {_dimensions_of_first(found, wanted)}.")
        found = {
            path: _Leaf(
                tf.TensorSpec([len(data), *leaf.value.shape], leaf.value.dtype),
                f"np.stack([{leaf.code} for batch in {code}])",
            )
            for path, leaf in found.items()
        }
    for array, (path, leaf_type) in zip(arrays, paths_of(wanted), strict=True):
        _check_text(array, path, leaf_type)
    each = _mended_batch(found, wanted, reasons, _safe_dtype)
    if reasons:
        raise Unlike(
            _told(reasons, f"[{each}]" if one_example else f"[{each} for batch in {code}]")
        )
    return [
        _converted(array, path, leaf_type)
        for array, (path, leaf_type) in zip(arrays, paths_of(wanted), strict=True)
    ]


def _parts(
    found: Any, wanted: tff.Type | None, code: str = "batch", path: tuple[str, ...] = ()
) -> _Leaves:
    """The parts of a batch or of a specification, at the paths of a type.

    As in TFF, parts without names take the type's names by position. A list is a batch, or a part of
    one, if the type has parts there; otherwise it is an array.
    """
    members: list[Any] = []
    parts: list[Any]
    if isinstance(wanted, tff.StructType):
        members = list(tff.structure.iter_elements(wanted))
    if isinstance(found, tff.structure.Struct):
        found = tff.structure.to_odict_or_tuple(found, recursive=False)
    if isinstance(found, Mapping):
        parts = [(name, part, f"{code}[{name!r}]") for name, part in found.items()]
    elif isinstance(found, tuple) and hasattr(found, "_fields"):
        names = found._fields if any(name for name, _ in members) else [None] * len(found)
        parts = [
            (name, part, f"{code}.{field}")
            for name, field, part in zip(names, found._fields, found, strict=True)
        ]
    elif isinstance(found, tuple) or (isinstance(found, list) and members):
        parts = [(None, part, f"{code}[{i}]") for i, part in enumerate(found)]
    else:
        return {path: _Leaf(found, code)}
    by_position = [name or str(i) for i, (name, _) in enumerate(members)]
    types = {name: member for name, (_, member) in zip(by_position, members, strict=True)}
    leaves: _Leaves = {}
    for i, (name, part, part_code) in enumerate(parts):
        if name is None:
            name = by_position[i] if len(parts) == len(members) else str(i)
        leaves |= _parts(part, types.get(name), part_code, (*path, str(name)))
    return leaves


def _fits(dataset: tf.data.Dataset, wanted: tff.Type) -> bool:
    specs = _parts(dataset.element_spec, wanted).values()
    if not all(isinstance(leaf.value, tf.TensorSpec) for leaf in specs):
        return False  # TFF knows no other parts
    if not wanted.is_assignable_from(tff.types.tensorflow_to_type(dataset.element_spec)):
        return False
    return _keeps_order(dataset.element_spec, wanted)


def _keeps_order(spec: Any, wanted: tff.Type) -> bool:
    """Whether a data set's tensors, which TensorFlow sorts by name, keep the order of the type."""
    if not isinstance(wanted, tff.StructType):
        return True
    names = [name for name, _ in tff.structure.iter_elements(wanted)]
    is_sorted = None in names or names == sorted(names)
    if not is_sorted and not (isinstance(spec, Mapping) and hasattr(spec, "move_to_end")):
        return False
    parts = spec.values() if isinstance(spec, Mapping) else spec
    types = [member for _, member in tff.structure.iter_elements(wanted)]
    return all(_keeps_order(part, member) for part, member in zip(parts, types, strict=True))


def _paired(found: _Leaves, wanted: tff.Type, reasons: list[str]) -> _Leaves:
    """The parts at the paths of the type; differences are added to the reasons."""
    paths = [path for path, _ in paths_of(wanted)]
    missing = [path for path in paths if path not in found]
    besides = [path for path in found if path not in paths]
    if not missing:
        if besides:
            reasons.append(f"It has {_listed(besides)} besides.")
        return {path: found[path] for path in paths}
    if len(missing) == len(besides) and (
        len(missing) == 1 or all(name.isdigit() for path in missing for name in path)
    ):
        reasons.append(f"It has {_listed(besides)} for {_listed(missing)}.")
        others = dict(zip(missing, besides, strict=True))
        return {path: found[others.get(path, path)] for path in paths}
    also = f" and has {_listed(besides)} besides" if besides else ""
    raise Unlike(
        f"It lacks {_listed(missing)}{also}. Give each batch the parts of the model's `input_spec`, "
        "or build the model for these."
    )


def _without_windows(code: str, dataset: tf.data.Dataset) -> tuple[str, tf.data.Dataset]:
    is_tuple = type(dataset.element_spec) is tuple

    def batches(*windows: Any) -> tf.data.Dataset:
        parts = windows if is_tuple else windows[0]
        return tf.data.Dataset.zip(tf.nest.map_structure(lambda one: one.batch(_BATCH), parts))

    each = f"tf.nest.map_structure(lambda one: one.batch({_BATCH}), windows)"
    argument = "*windows" if is_tuple else "windows"
    code = f"{code}.flat_map(lambda {argument}: tf.data.Dataset.zip({each}))"
    return code, dataset.flat_map(batches)


def _batched(
    code: str,
    dataset: tf.data.Dataset,
    found: _Leaves,
    wanted: tff.Type,
    reasons: list[str],
) -> tuple[str, tf.data.Dataset]:
    """Batches a data set of examples; unbatches one of batches of batches, or of other sizes."""
    pairs = _shapes(found, wanted)
    sizes = {shape[0] for shape, _ in pairs if shape.rank}
    size = next(iter(sizes)) if len(sizes) == 1 else None
    batch = f".batch({size}, drop_remainder=True)" if size else f".batch({_BATCH})"

    def again(one: tf.data.Dataset) -> tf.data.Dataset:
        return one.batch(size or _BATCH, drop_remainder=size is not None)

    if _is_example(found, wanted):
        first = _dimensions_of_first(found, wanted)
        reasons.append(f"The elements are examples and no batches: {first}.")
        return f"{code}{batch}", again(dataset)
    if all(None not in (have.rank, shape.rank) and have.rank > shape.rank for shape, have in pairs):
        reasons.append(f"The elements are batched twice: {_dimensions_of_first(found, wanted)}.")
        code, dataset = f"{code}.unbatch()", dataset.unbatch()
        pairs = [(shape, have[1:]) for shape, have in pairs]
    if size and any(have.rank == shape.rank and have[0] != size for shape, have in pairs):
        reasons.append(f"The model takes batches of {size} alone, and others are possible.")
        return f"{code}.unbatch(){batch}", again(dataset.unbatch())
    return code, dataset


def _shapes(found: _Leaves, wanted: tff.Type) -> list[tuple[tf.TensorShape, tf.TensorShape]]:
    """For each part the shape of the type, and the one that was found."""
    unknown = tf.TensorShape(None)
    return [
        (tf.TensorShape(leaf.shape), getattr(found[path].value, "shape", unknown))
        for path, leaf in paths_of(wanted)
    ]


def _is_example(found: _Leaves, wanted: tff.Type) -> bool:
    """Whether each part lacks a dimension, and one of them lacks exactly that of the batch."""
    pairs = _shapes(found, wanted)
    if any(None in (have.rank, shape.rank) or have.rank >= shape.rank for shape, have in pairs):
        return False
    return any(
        shape[1:].is_compatible_with(have) and _is_known_as(have, shape[1:])
        for shape, have in pairs
    )


def _is_known_as(have: tf.TensorShape, shape: tf.TensorShape) -> bool:
    """Whether `have` knows each size that `shape` knows, for compatible shapes."""
    if shape.rank is None:
        return True
    return all(m is not None for n, m in zip(shape, have, strict=True) if n is not None)


def _dimensions_of_first(found: _Leaves, wanted: tff.Type) -> str:
    path, _ = next(paths_of(wanted))
    shape, have = _shapes(found, wanted)[0]
    plural = "s" * (have.rank != 1)
    return f"{_at(path)} has {have.rank} dimension{plural} and not {shape.rank}"


def _mended_batch(
    found: _Leaves,
    wanted: tff.Type,
    reasons: list[str],
    change_dtype: Callable[[str, tf.DType, tf.DType], str | None],
) -> str:
    """The code for a batch as the type has it."""
    codes = [
        _mended(found[path], path, leaf_type, reasons, change_dtype)
        for path, leaf_type in paths_of(wanted)
    ]
    return _packed(iter(codes), wanted)


def _mended(
    leaf: _Leaf,
    path: tuple[str, ...],
    wanted: tff.TensorType,
    reasons: list[str],
    change_dtype: Callable[[str, tf.DType, tf.DType], str | None],
) -> str:
    """The code that mends a part; each difference is added to the reasons."""
    spec, code, where = leaf.value, leaf.code, _at(path)
    shape, dtype = tf.TensorShape(wanted.shape), tf.as_dtype(wanted.dtype.type)
    if isinstance(spec, tf.RaggedTensorSpec) and spec.shape.rank == shape.rank:
        reasons.append(f"{where} is ragged; the code pads it with zeros and cuts what is longer.")
        code = f"{code}.to_tensor(shape={shape.as_list()})"
        spec = tf.TensorSpec(shape, spec.dtype)
    elif isinstance(spec, tf.SparseTensorSpec):
        reasons.append(f"{where} is sparse.")
        code = f"tf.sparse.to_dense({code})"
        spec = tf.TensorSpec(spec.shape, spec.dtype)
    if not isinstance(spec, tf.TensorSpec):
        kind = "None" if spec is None or "NoneTensor" in type(spec).__name__ else shown(spec)
        raise Unlike(
            f"{where} is {kind} and not {wanted}. Give it values, or build the model without it."
        )
    cast = change_dtype(code, spec.dtype, dtype)
    if cast is not None:
        reasons.append(f"{where} is {spec.dtype.name} and not {dtype.name}.")
        code = cast
    have = spec.shape
    if shape.is_compatible_with(have) and _is_known_as(have, shape):
        return code
    reasons.append(f"{where} has shape {_dims(have)} and not {_dims(shape)}.")
    if shape.is_compatible_with(have):
        return f"tf.ensure_shape({code}, {shape.as_list()})"
    sizes = [math.prod(one[1:]) if one[1:].is_fully_defined() else None for one in (have, shape)]
    if have.rank != shape.rank and have.rank and sizes[0] is not None and sizes[0] == sizes[1]:
        return f"tf.reshape({code}, {[shape[0] or -1, *shape[1:]]})"
    if have.rank == shape.rank - 1 and shape[-1] is None:
        return f"tf.expand_dims({code}, -1)"
    raise Unlike(
        f"{' '.join(reasons[:_MOST])} Give data of that shape, or build the model for this one."
    )


def _same_dtype(code: str, found: tf.DType, wanted: tf.DType) -> str | None:
    """The code that casts a tensor; None if it has the dtype."""
    if found == wanted:
        return None
    if wanted == tf.string:
        return f"tf.strings.as_string({code})"
    if found == tf.string:
        known = wanted in (tf.float32, tf.float64, tf.int32, tf.int64)
        code = f"tf.strings.to_number({code}, tf.{wanted.name if known else 'float64'})"
        return code if known else f"tf.cast({code}, tf.{wanted.name})"
    if found.is_complex and not wanted.is_complex:
        code = f"tf.math.real({code})"
    return f"tf.cast({code}, tf.{wanted.name})"


def _safe_dtype(code: str, found: tf.DType, wanted: tf.DType) -> str | None:
    """The code that casts an array to another kind of numbers; None if a conversion is safe."""
    kinds = [
        0 if one == tf.bool else 1 if one.is_integer else 2 if one.is_floating else 3
        for one in (found, wanted)
    ]
    if tf.string not in (found, wanted) and kinds[0] <= kinds[1] and (wanted != tf.bool):
        return None
    if found == tf.string != wanted:
        return f"np.asarray({code}).astype({wanted.as_numpy_dtype.__name__!r})"
    return _same_dtype(code, found, wanted)


def _read(value: Any) -> Any:
    """A part of a batch as an array; a ragged or sparse tensor, or None, stays as it is."""
    if isinstance(value, tf.RaggedTensor | tf.SparseTensor | None):
        return value
    if isinstance(value, tf.Tensor | tf.Variable):
        return value.numpy()
    try:
        array = np.asarray(value)
    except ValueError:  # its rows differ in length
        return _ragged(value)
    if array.dtype == object and not all(isinstance(one, str | bytes) for one in array.flat):
        if any(isinstance(one, str | bytes | int | float | bool) for one in array.flat):
            raise Unlike(f"It must hold numbers of one kind, or text; found {shown(value)}.")
        return _ragged(value)
    return array


def _check_first_texts(dataset: tf.data.Dataset, wanted: tff.Type) -> None:
    for batch in dataset.take(1):
        first = _paired(_parts(batch, wanted), wanted, [])
        for path, leaf_type in paths_of(wanted):
            _check_text(_read(first[path].value), path, leaf_type)


def _check_text(array: Any, path: tuple[str, ...], wanted: tff.TensorType) -> None:
    """Raises `Unlike` for text in place of numbers, unless it spells numbers."""
    dtype = tf.as_dtype(wanted.dtype.type)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "OSU" or dtype == tf.string:
        return
    try:
        array.astype(dtype.as_numpy_dtype)
    except ValueError:
        text = next(iter(array.flat))
        raise Unlike(
            f"{_at(path)} is text, such as {shown(text)}, and not {dtype.name}. Give numbers, such as "
            "those of `tf.keras.layers.StringLookup`."
        ) from None


def _ragged(value: Any) -> tf.RaggedTensor:
    try:
        return tf.ragged.constant(value)
    except (TypeError, ValueError):
        raise Unlike(f"It must hold arrays of numbers or text; found {shown(value)}.") from None


def _spec_of(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        text = array.dtype.kind in "OSU"
        return tf.TensorSpec(array.shape, tf.string if text else tf.as_dtype(array.dtype))
    return None if array is None else tf.type_spec_from_value(array)


def _converted(array: np.ndarray, path: tuple[str, ...], wanted: tff.TensorType) -> np.ndarray:
    dtype = tf.as_dtype(wanted.dtype.type)
    if dtype == tf.string or array.dtype == dtype.as_numpy_dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype.as_numpy_dtype)
    if dtype.is_integer:
        same = np.array_equal(converted.astype(object), array.astype(object))
    else:
        same = np.array_equal(np.isfinite(converted), np.isfinite(array))
    if not same:
        raise Unlike(
            f"{_at(path)} holds numbers that are too large for {dtype.name}. Scale them, or build the "
            "model for a wider dtype."
        )
    return converted


def _packed(codes: Iterator[str], wanted: tff.Type) -> str:
    """The code for a structure."""
    if not isinstance(wanted, tff.StructType):
        return next(codes)
    parts = [(name, _packed(codes, member)) for name, member in tff.structure.iter_elements(wanted)]
    names = [name for name, _ in parts]
    if None in names:
        return f"({', '.join(part for _, part in parts)}{',' * (len(parts) == 1)})"
    if all(name.isidentifier() and not keyword.iskeyword(name) for name in names):
        return f"collections.OrderedDict({', '.join(f'{name}={part}' for name, part in parts)})"
    pairs = ", ".join(f"({name!r}, {part})" for name, part in parts)
    return f"collections.OrderedDict([{pairs}])"


def _told(reasons: list[str], code: str) -> str:
    return f"{' '.join(reasons[:_MOST])} Give `{code}`."


def _dims(shape: tf.TensorShape) -> str:
    return "unknown" if shape.rank is None else str(shape.as_list())


def _at(path: tuple[str, ...]) -> str:
    return repr("/".join(path)) if path else "The element"


def _listed(paths: list[tuple[str, ...]]) -> str:
    return ", ".join(_at(path) for path in paths)
