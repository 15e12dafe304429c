"""Names in the graphs of TFF's computations."""

from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf


def unpack(proto: Any) -> tf.compat.v1.GraphDef:
    """Unpacks the graph of the `tensorflow` part of a serialized computation."""
    graph = tf.compat.v1.GraphDef()
    proto.graph_def.Unpack(graph)
    return graph


def of_data_set(dataset: tf.data.Dataset) -> tf.compat.v1.GraphDef:
    """The graph of a data set, without external states such as those of random number generators."""
    variant = tf.data.experimental.to_variant(dataset)
    written = tf.raw_ops.DatasetToGraphV2(input_dataset=variant, external_state_policy=1)
    return tf.compat.v1.GraphDef.FromString(written.numpy())


def tensor_names(binding: Any) -> Iterable[str]:
    """Lists the names of the tensors of a binding, in the order of its leaves."""
    kind = binding.WhichOneof("binding")
    if kind == "tensor":
        yield binding.tensor.tensor_name
    elif kind == "sequence":
        yield binding.sequence.variant_tensor_name
    elif kind == "struct":
        for element in binding.struct.element:
            yield from tensor_names(element)


def node_of(tensor: str) -> str:
    """Names the node of a tensor or of a control input."""
    return tensor.removeprefix("^").partition(":")[0]


def ancestors(nodes: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Names some nodes and all nodes that run before them.

    Args:
      nodes: The nodes of a graph or of a function by their names; others are left out.
      names: The names of the nodes to start from.
    """
    found: set[str] = set()
    ahead = list(names)
    while ahead:
        name = ahead.pop()
        if name in nodes and name not in found:
            found.add(name)
            ahead.extend(map(node_of, nodes[name].input))
    return found
