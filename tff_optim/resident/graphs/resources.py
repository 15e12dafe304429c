"""Makes lookup tables and iterators of a graph anew in each call.

In a session they have names, by which the operations of one call find them. In the Python process calls
run concurrently, and would find each other's. Anonymous ones have no name: operations get their handles,
and they end with the call.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident.graphs.nodes import unpack

_ANONYMOUS = {
    "HashTableV2": "AnonymousHashTable",
    "MutableHashTableV2": "AnonymousMutableHashTable",
    "MutableHashTableOfTensorsV2": "AnonymousMutableHashTableOfTensors",
    "MutableDenseHashTableV2": "AnonymousMutableDenseHashTable",
    "IteratorV2": "AnonymousIteratorV3",
}
_NAMES = ("shared_name", "container", "use_node_name_sharing")


def own_in_every_call(variables: Sequence[Any], graph: tf.compat.v1.GraphDef) -> set[str]:
    """Makes the tables and iterators of a graph and its functions anonymous.

    Args:
      variables: The nodes of the variables, which are no longer in the graph.
      graph: The graph, which is changed.

    Returns:
      The names of the nodes that make variables, tables and iterators.

    Raises:
      ValueError: If the graph has a named resource without an anonymous form, or two nodes share one.
    """
    made: dict[Any, str] = {}
    named = [(node, True) for node in variables]
    named += [(node, False) for node in _nodes(graph) if "shared_name" in node.attr]
    for node, is_variable in named:
        found_by = node.op, node.attr["shared_name"].s or node.name
        if found_by in made or not (is_variable or node.op in _ANONYMOUS):
            raise ValueError(
                "`process` must keep nothing between the operations of its graphs but variables, "
                f"lookup tables and iterators, each made once; found {node.op} ({node.name}). Run "
                "it in plain TFF, or with `workers` if it is in the clients' graph."
            )
        made[found_by] = node.name
        if not is_variable:
            _make_anonymous(node)
    return set(made.values())


def own_iterators(computation: Any) -> Any:
    """Makes the iterators of a computation anonymous, for a session.

    There calls that run beside each other lose iterators with names; tables and queues are each
    call's own.

    Args:
      computation: A `tff.Computation` without placements, in TensorFlow.
    """
    proto = tff.framework.serialize_computation(computation)
    graph = unpack(proto.tensorflow)
    for node in _nodes(graph):
        if node.op == "IteratorV2":
            _make_anonymous(node)
    proto.tensorflow.graph_def.Pack(graph)
    return tff.framework.deserialize_computation(proto)


def _nodes(graph: tf.compat.v1.GraphDef) -> Iterator[Any]:
    return itertools.chain(graph.node, *(f.node_def for f in graph.library.function))


def _make_anonymous(node: Any) -> None:
    node.op = _ANONYMOUS[node.op]
    for name in _NAMES:
        if name in node.attr:
            del node.attr[name]
