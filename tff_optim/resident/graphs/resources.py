"""Lookup tables and iterators of a graph, made anew in every call of it.

In a session they have names, under which the operations of one call find them. In the Python
process calls run beside each other and would find each other's. An anonymous one has no name: what
uses it is given its handle, and it goes with the call.
"""

from typing import Any

_ANONYMOUS = {
    "HashTableV2": "AnonymousHashTable",
    "MutableHashTableV2": "AnonymousMutableHashTable",
    "MutableHashTableOfTensorsV2": "AnonymousMutableHashTableOfTensors",
    "MutableDenseHashTableV2": "AnonymousMutableDenseHashTable",
    "IteratorV2": "AnonymousIteratorV3",
}
_NAMES = ("shared_name", "container", "use_node_name_sharing")


def own_in_every_call(node: Any) -> bool:
    """Makes a node's table or iterator an anonymous one, where it has any.

    Returns:
      Whether the node makes one.

    Raises:
      ValueError: The node makes something that is found by a name and has no anonymous form.
    """
    if "shared_name" not in node.attr:
        return False
    if node.op not in _ANONYMOUS:
        raise ValueError(
            "`process` must keep nothing between the operations of its graphs but variables, lookup "
            f"tables and iterators; found {node.op} ({node.name}). Run it in plain TFF."
        )
    node.op = _ANONYMOUS[node.op]
    for name in _NAMES:
        if name in node.attr:
            del node.attr[name]
    return True
