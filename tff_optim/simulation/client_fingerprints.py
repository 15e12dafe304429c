"""Fingerprints of clients' data by their first element, read without side effects on the data set."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tff_optim.core.types import ClientDataset, ClientId, Value
from tff_optim.resident.graphs.fingerprints import of_parts
from tff_optim.resident.graphs.nodes import node_of, of_data_set

_LARGEST = 100  # clients with a fingerprint
# Data sets to leave out, so that elements come in their original order and are computed anew. A shuffled
# one goes on where its last reader stopped, and a cache keeps what is read.
_PASSED = ("Shuffle", "Cache")
_PYTHON = ("PyFunc", "EagerPyFunc", "Generator")
_NO_GLOBAL_SEED = (0, 87654321)  # the first of a shuffle's two seeds, unless a program sets one


def chosen(ids: list[ClientId]) -> list[ClientId]:
    """The clients with a fingerprint: all, or 100 of them spread over the list."""
    step = max(len(ids) / _LARGEST, 1.0)
    return [ids[int(i * step)] for i in range(min(len(ids), _LARGEST))]


def of_data(data: ClientDataset) -> str:
    """The specification, the number and the first of the elements of a client's data, in short.

    The way in which a data set is shuffled counts, but not the resulting order. Generators and other
    sources with a state are not read.

    Example:
      >>> data = tf.data.Dataset.range(6).batch(2)
      >>> of_data(data)
      '3 of TensorSpec(shape=(None,), dtype=tf.int64, name=None), first ...'
      >>> of_data(data.shuffle(3)) == of_data(data.shuffle(3)) != of_data(data)
      True
    """
    if isinstance(data, tf.data.Dataset):
        spec, count = data.element_spec, int(data.cardinality())
        known = {tf.data.UNKNOWN_CARDINALITY: "some", tf.data.INFINITE_CARDINALITY: "endless"}
        return f"{known.get(count, count)} of {spec}, first {_first(data)}"
    batches = list(data[:1]) if isinstance(data, list | tuple) else [data]
    count = len(data) if isinstance(data, list | tuple) else 1
    try:
        leaves = [np.asarray(leaf) for leaf in tf.nest.flatten(batches)]
    except Exception:  # drawing the client raises an error that explains it
        return f"{count} of {type(data).__name__}"
    kinds = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)
    values = of_parts(*(leaf.tobytes() if leaf.dtype != object else leaf for leaf in leaves))
    return f"{count} of {kinds}, first {values[:8]}"


def _first(data: tf.data.Dataset) -> str:
    """The fingerprint of the first element, before any shuffling."""
    try:
        graph, passed = _without_order(of_data_set(data))
        found = {_read(graph, data.element_spec) for _ in range(2)}
    except Exception:  # of any source; drawing the client raises an error that explains it
        return "not read"
    return of_parts(*found, *passed)[:8] if len(found) == 1 else "another each time"


def _read(graph: bytes, spec: Value) -> str:
    copy = tf.data.experimental.from_variant(tf.raw_ops.DatasetFromGraph(graph_def=graph), spec)
    leaves = [leaf for one in copy.take(1) for leaf in tf.nest.flatten(one, expand_composites=True)]
    return of_parts(*(tf.io.serialize_tensor(leaf).numpy() for leaf in leaves))


def _without_order(graph: Value) -> tuple[bytes, list[int]]:
    """The graph of a data set without shuffles and caches, and the arguments of its shuffles.

    Raises:
      ValueError: If a Python function, which may have a state, makes elements.
    """
    numbers: list[int] = []
    _pass(graph.node, numbers)
    for function in graph.library.function:
        instead = _pass(function.node_def, numbers)
        for name, tensor in function.ret.items():
            function.ret[name] = _followed(tensor, instead)
    return graph.SerializeToString(), numbers


def _pass(nodes: Value, numbers: list[int]) -> dict[str, str]:
    """Replaces each node to leave out by its input; returns these inputs by the node's name."""
    by_name = {node.name: node for node in nodes}
    instead = {node.name: node.input[0] for node in nodes if node.op.startswith(_PASSED)}
    for node in nodes:
        if node.op.startswith(_PYTHON):
            raise ValueError(node.op)
        if node.op.startswith("Shuffle"):
            given = [by_name.get(node_of(name)) for name in node.input[1:]]
            tensors = [one.attr["value"].tensor for one in given if one and one.op == "Const"]
            given_numbers = [t.int64_val[0] for t in tensors if len(t.int64_val) == 1]
            # Under `tf.random.set_seed` the second seed may count the operations made before.
            among_operations = given_numbers[1:2] and given_numbers[1] not in _NO_GLOBAL_SEED
            numbers += given_numbers[:2] if among_operations else given_numbers
        for i, tensor in enumerate(node.input):
            node.input[i] = _followed(tensor, instead)
    return instead


def _followed(tensor: str, instead: Mapping[str, str]) -> str:
    while node_of(tensor) in instead:
        tensor = instead[node_of(tensor)]
    return tensor
