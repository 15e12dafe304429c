"""What made a state: the step that the server takes, told from others by its operations."""

import collections
import hashlib
import json
from typing import Any

import tensorflow_federated as tff

from tff_optim.resident import parts
from tff_optim.resident.graphs.nodes import node_of, tensor_names, unpack


def fingerprint(next_computation: Any) -> str | None:
    """Returns a text that is equal for processes whose server takes the same kind of step.

    It counts the operations that the new state is computed with. Constants do not count: another
    learning rate is the same optimizer; nor do clients and metrics. States of Adam and of Yogi,
    equal in all names and shapes, differ in it. None for a process without a MapReduce form, whose
    server's half cannot be told from the clients'.
    """
    try:
        update = parts.cut(next_computation).update
    except parts.NoMapReduceFormError:
        return None
    proto = tff.framework.serialize_computation(update).tensorflow
    graph = unpack(proto)
    state = proto.result.struct.element[0]
    counts = _Counts(graph)
    counts.add(graph.node, list(tensor_names(state)))
    text = json.dumps(sorted(counts.found.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Counts:
    """How often each operation is used, in functions that are called too."""

    def __init__(self, graph: Any):
        self._functions = {f.signature.name: f for f in graph.library.function}
        self.found: collections.Counter[str] = collections.Counter()

    def add(self, nodes: Any, tensors: list[str]) -> None:
        """Counts what some tensors are computed with."""
        by_name = {node.name: node for node in nodes}
        seen: set[str] = set()
        ahead = list(tensors)
        while ahead:
            name = node_of(ahead.pop())
            if name in seen or name not in by_name:
                continue
            seen.add(name)
            node = by_name[name]
            ahead.extend(node.input)
            called = [
                value.func.name for _, value in sorted(node.attr.items()) if value.HasField("func")
            ]
            if node.op in self._functions:
                called.append(node.op)
            elif node.op not in _NOTHING:
                self.found[node.op] += 1
            for function in called:
                body = self._functions[function]
                results = [*body.ret.values(), *body.control_ret.values()]
                self.add(body.node_def, results)


# What says nothing of the numbers.
_NOTHING = frozenset({"Const", "Identity", "IdentityN", "NoOp", "Placeholder"})
