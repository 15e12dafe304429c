"""First values of variables that nothing reads.

In every call a client's work draws first values for the model's variables at random, and then overwrites
them with the server's weights. Drawing 7.5e6 numbers takes longer than a batch of that model. Values
that are overwritten before anything can read them need not be drawn, which changes no bit of a result.
"""

from collections.abc import Mapping
from typing import Any

import tensorflow_federated as tff

from tff_optim.resident.graphs.nodes import ancestors, node_of, tensor_names, unpack

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")


def without_unread(computation: Any) -> Any:
    """Removes first values that are overwritten before anything can read them.

    Args:
      computation: A `tff.Computation` without placements.

    Returns:
      A computation with the same results.
    """
    proto = tff.framework.serialize_computation(computation)
    if proto.WhichOneof("computation") != "tensorflow" or not proto.tensorflow.initialize_op:
        return computation
    graph = unpack(proto.tensorflow)
    unread = _unread(graph, proto.tensorflow.initialize_op, tensor_names(proto.tensorflow.result))
    for node in graph.node:
        kept = [tensor for tensor in node.input if node_of(tensor) not in unread]
        del node.input[:]
        node.input.extend(kept)
    proto.tensorflow.graph_def.Pack(graph)
    return tff.framework.deserialize_computation(proto)


def _unread(graph: Any, initializer: str, results: Any) -> set[str]:
    """Names the assignments of first values that nothing reads."""
    nodes = {node.name: node for node in graph.node}
    functions = {function.signature.name: function for function in graph.library.function}
    first = ancestors(nodes, [initializer])
    ends = set(map(node_of, results))
    later = {name: nodes[name] for name in ancestors(nodes, ends) - first}
    variables = [node for node in graph.node if node.op == "VarHandleOp"]
    shared = [node.attr["shared_name"].s for node in variables]
    unread = set()
    for variable in variables:
        users = [nodes[name] for name in _users(variable.name, nodes) if name in first]
        if (
            [user.op for user in users] == ["AssignVariableOp"]
            and shared.count(variable.attr["shared_name"].s) == 1
            and (
                not _users(variable.name, later)
                or _is_overwritten(variable.name, later, ends, functions)
            )
        ):
            unread.add(users[0].name)
    return unread


def _is_overwritten(
    handle: str, nodes: Mapping[str, Any], ends: set[str], functions: Mapping[str, Any]
) -> bool:
    """Whether a variable is assigned before any other node of a body can use it.

    Args:
      handle: The name of the variable's handle.
      nodes: The nodes of the body by their names.
      ends: The names of the nodes for which the body runs.
      functions: The functions of the graph by their names.
    """
    users = _users(handle, nodes)
    before = [ancestors(nodes, [name]) for name in users]
    before.append(ancestors(nodes, ends))
    return any(
        all(first in names for names in before) and _assigns(nodes[first], handle, functions)
        for first in users
    )


def _assigns(node: Any, handle: str, functions: Mapping[str, Any]) -> bool:
    """Whether a node assigns a variable before it does anything else with it."""
    given = _given(node)
    if given.count(handle) != 1:
        return False
    position = given.index(handle)
    if node.op == "AssignVariableOp":
        return position == 0
    if node.op not in _CALLS:
        return False
    function = functions[node.attr["f"].func.name]
    nodes = {inner.name: inner for inner in function.node_def}
    ends = {node_of(name) for name in (*function.ret.values(), *function.control_ret.values())}
    return _is_overwritten(function.signature.input_arg[position].name, nodes, ends, functions)


def _users(handle: str, nodes: Mapping[str, Any]) -> list[str]:
    return [name for name, node in nodes.items() if handle in _given(node)]


def _given(node: Any) -> list[str]:
    """Names the nodes or arguments that are a node's data inputs, in order."""
    return [node_of(tensor) for tensor in node.input if not tensor.startswith("^")]
