"""Metrics of a round as flat records: numbers by name, and a record for each client."""

import math
from collections.abc import Iterator, Mapping, Sequence

import attrs
import numpy as np

from tff_optim.core.messages import shown
from tff_optim.core.types import ClientId, Json, Metrics, Record, Value

_LARGEST = 256  # numbers of one metric that are shown one by one
_SAMPLE = "sample_"
_FILLED = "sample_clients"
_UNCHANGED = ("update_non_finite", "unchanged")  # of TFF's finalizers, of `aggregators`


def flatten(metrics: Metrics) -> Record:
    r"""Names every number in a structure of metrics.

    Names are paths, joined by slashes. An array becomes a number for each element; one of more than 256
    elements becomes its `mean`, `min` and `max`. Numbers of single clients from `aggregators` are left
    to `client_records`.

    Example:
      >>> flatten({"train": {"loss": np.float32(0.5), "by_class": np.array([1, 2])}})
      {'train/loss': 0.5, 'train/by_class/0': 1, 'train/by_class/1': 2}

    Args:
      metrics: Nested mappings, sequences and attrs objects of numbers, arrays and strings.

    Returns:
      Python bools, ints, floats and strings by name; a byte that is no text is written as `\xff`.

    Raises:
      ValueError: If two numbers have the same name.
      TypeError: If a value is none of these, such as a complex number.
    """
    found: Record = {}
    for name, value in _named(metrics):
        if name in found:
            raise ValueError(f"`metrics` must have a name for each number; found {name!r} twice.")
        found[name] = _plain(value, name)
    return found


def check_names(flat: Mapping[str, Json], argument: str, taken: Sequence[str]) -> None:
    """Raises `ValueError` if a metric has a reserved name; "NAME/" reserves all that start with it."""
    for name in flat:
        if any(name == one or (one.endswith("/") and name.startswith(one)) for one in taken):
            raise ValueError(
                f"`{argument}` must not give a metric the name of a column that the loop writes; "
                f"found {name!r}. Rename it."
            )


def alike(one: Mapping[str, Json], other: Mapping[str, Json]) -> bool:
    """Whether flat metrics have the same names, strings and, up to rounding, numbers."""
    return set(one) == set(other) and all(_alike(value, other[name]) for name, value in one.items())


def _alike(one: Value, other: Value) -> bool:
    if one == other or isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    try:
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6)
    except OverflowError:  # a whole number above 1e308
        return False


def why_unchanged(record: Mapping[str, Json]) -> Record:
    """The metrics that say that a round left the model alone, and why; otherwise empty.

    Example:
      >>> why_unchanged({"aggregator/unchanged": 1, "aggregator/non_finite_clients": 2, "a_clients": 0})
      {'aggregator/unchanged': 1, 'aggregator/non_finite_clients': 2}
      >>> why_unchanged({"finalizer/update_non_finite": 0, "aggregator/non_finite_clients": 2})
      {}
    """
    signs = {name for name in record if name.rpartition("/")[2] in _UNCHANGED and record[name]}
    counts = {name for name in record if name.endswith("_clients") and record[name]}
    return {name: record[name] for name in record if name in signs | counts} if signs else {}


def client_records(metrics: Metrics, cohort: Sequence[ClientId]) -> list[Record]:
    """Assigns a round's numbers of single clients to the clients' ids.

    `sample_size` of the builders of `aggregators` asks for these numbers, which have a row for each
    client in the order of the cohort. `sample_scores` becomes a column `aggregator/scores`, or one for
    each layer by its name.

    Example:
      >>> sample = {"sample_clients": 1, "sample_weights": {"dense": np.array([0.7, 0.0])}}
      >>> client_records({"aggregator": sample}, ["ann", "bob"])
      [{'client': 'ann', 'aggregator/weights/dense': 0.7}, {'client': 'bob'}]

    Args:
      metrics: As for `flatten`.
      cohort: The ids of the round's clients, in the order of their data.

    Returns:
      One record for each client of the cohort.
    """
    records: list[Record] = [{"client": client} for client in cohort]
    filled = {p[:-1]: int(v) for p, v in _leaves(metrics, clients=True) if p[-1] == _FILLED}
    for path, value in _leaves(metrics, clients=True):
        level = next(i for i, name in enumerate(path) if name.startswith(_SAMPLE))
        if path[-1] == _FILLED:
            continue
        name = "/".join([*path[:level], path[level].removeprefix(_SAMPLE), *path[level + 1 :]])
        for record, row in zip(records[: filled[path[:level]]], value):
            record[name] = _plain(row, name)
    return records


def _named(metrics: Metrics) -> Iterator[tuple[str, Json]]:
    """Single numbers by name."""
    for path, value in _leaves(metrics, clients=False):
        name = "/".join(path)
        if value.ndim == 0:
            yield name, value
        elif value.size > _LARGEST and value.dtype.kind in "biuf":
            yield from {
                f"{name}/mean": value.mean(),
                f"{name}/min": value.min(),
                f"{name}/max": value.max(),
            }.items()
        else:
            for index in np.ndindex(value.shape):
                yield "/".join([name, *map(str, index)]), value[index]


def _leaves(
    value: Value, *, clients: bool, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Arrays by path: those that belong to single clients, or the others."""
    if attrs.has(type(value)):
        value = attrs.asdict(value, recurse=False)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, list | tuple):
        value = {str(i): member for i, member in enumerate(value)}
    if not isinstance(value, Mapping):
        if not clients and path:
            # NumPy cannot convert tensors of `tf.bfloat16` itself.
            yield path, np.asarray(value.numpy() if hasattr(value, "numpy") else value)
        return
    sampled = {name for name in value if _FILLED in value and str(name).startswith(_SAMPLE)}
    for name, member in value.items():
        inner = (*path, str(name))
        if name not in sampled:
            yield from _leaves(member, clients=clients, path=inner)
        elif clients:
            yield from _leaves(member, clients=False, path=inner)


def _plain(value: Value, name: str) -> Json:
    """A Python value: bool, int, float, string or None."""
    value = np.asarray(value).item()
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"`metrics` must hold bools, whole numbers, floats of at most 64 bits and texts; found "
        f"{shown(value)} at {name!r}. Turn it into one of these, or into several."
    )
