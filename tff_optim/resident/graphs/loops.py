"""Reductions of data sets as loops.

TFF's builders train in `dataset.reduce`. TensorFlow instantiates the reduction's function anew at
every call, for every client: tens of milliseconds, where a step of a small model takes one tenth of
a millisecond. A loop over an iterator calls the same function on the same elements in the same order,
and its function is instantiated once.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

_REDUCE = "ReduceDataset"
_CALL = "StatefulPartitionedCall"


def reductions_as_loops(graph: tf.compat.v1.GraphDef) -> None:
    """Replaces every reduction in a graph and in its functions."""
    functions = {f.signature.name: f for f in graph.library.function}
    added: list[Any] = []
    for node in graph.node:
        if node.op == _REDUCE:
            added += _replace(node, functions)
    for function in functions.values():
        replaced = {node.name for node in function.node_def if node.op == _REDUCE}
        for node in function.node_def:
            if node.name in replaced:
                added += _replace(node, functions)
            for i, tensor in enumerate(node.input):
                node.input[i] = _renamed(tensor, replaced)
        for name, tensor in function.ret.items():
            function.ret[name] = _renamed(tensor, replaced)
    graph.library.function.extend(added)


def _renamed(tensor: str, replaced: set[str]) -> str:
    """Names an output as functions do: with the output argument of the operation that makes it."""
    name, _, output = tensor.partition(":")
    return f"{name}:{output.replace('components', 'output')}" if name in replaced else tensor


def _replace(node: Any, functions: dict[str, Any]) -> list[Any]:
    """Turns a reduction into the call of a loop; returns the loop's functions."""
    step = functions[node.attr["f"].func.name].signature
    types = [tf.dtypes.as_dtype(argument.type) for argument in step.input_arg]
    num_state = len(node.attr["Tstate"].list.type)
    num_others = len(node.attr["Targuments"].list.type)
    state, others = types[:num_state], types[len(types) - num_others :]
    elements = types[num_state : len(types) - num_others]
    name, added = _loop(state, elements, others, step.name)
    node.op = _CALL
    for key in list(node.attr):
        del node.attr[key]
    node.attr["f"].func.name = name
    node.attr["Tin"].list.type.extend([t.as_datatype_enum for t in (tf.variant, *state, *others)])
    node.attr["Tout"].list.type.extend([t.as_datatype_enum for t in state])
    return added


def _loop(
    state: list[tf.DType], elements: list[tf.DType], others: list[tf.DType], step: str
) -> tuple[str, list[Any]]:
    """Traces `<data set, state, others> -> state`, which calls `step` on each element."""

    @tf.function(autograph=False)
    def stand_in(*arguments: Any) -> Any:
        return [tf.identity(x) for x in arguments[: len(state)]]

    called = stand_in.get_concrete_function(*map(_unshaped, (*state, *elements, *others)))

    @tf.function(autograph=False)
    def loop(data: Any, *arguments: Any) -> Any:
        iterator = tf.raw_ops.AnonymousIteratorV3(
            output_types=elements, output_shapes=[tf.TensorShape(None)] * len(elements)
        )
        made = tf.raw_ops.MakeIterator(dataset=data, iterator=iterator)

        def following() -> Any:
            return tf.raw_ops.IteratorGetNextAsOptional(
                iterator=iterator,
                output_types=elements,
                output_shapes=[tf.TensorShape(None)] * len(elements),
            )

        def body(element: Any, *current: Any) -> Any:
            values = tf.raw_ops.OptionalGetValue(
                optional=element,
                output_types=elements,
                output_shapes=[tf.TensorShape(None)] * len(elements),
            )
            new = tf.raw_ops.StatefulPartitionedCall(
                args=[*current, *values, *arguments[len(state) :]], Tout=state, f=called
            )
            with tf.control_dependencies(new):
                return following(), *new

        with tf.control_dependencies([made]):
            first = following()
        return tf.while_loop(
            lambda element, *unused: tf.raw_ops.OptionalHasValue(optional=element),
            body,
            [first, *arguments[: len(state)]],
            shape_invariants=[tf.TensorShape([])] + [tf.TensorShape(None)] * len(state),
        )[1:]

    concrete = loop.get_concrete_function(*map(_unshaped, (tf.variant, *state, *others)))
    library = concrete.graph.as_graph_def().library
    added = [concrete.function_def, *library.function]
    names = {called.function_def.signature.name: step}
    added = [f for f in added if f.signature.name not in names]
    for node in itertools.chain.from_iterable(f.node_def for f in added):
        for function in functions_of(node):
            function.name = names.get(function.name, function.name)
    return concrete.function_def.signature.name, added


def _unshaped(dtype: tf.DType) -> tf.TensorSpec:
    return tf.TensorSpec([] if dtype in (tf.variant, tf.resource) else None, dtype)


def functions_of(node: Any) -> Iterable[Any]:
    """Lists the functions that a node names."""
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func
        yield from value.list.func
