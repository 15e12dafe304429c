"""Rewrites loops over data sets in clients' graphs, so that they read a data set in one go.

TFF's builders train in `dataset.reduce`, or in a loop over an iterator. TensorFlow instantiates the
function of a reduction anew for every client, which takes tens of milliseconds, where a step of a small
model takes a tenth of a millisecond. A loop calls the same function on the same elements in the same
order, and instantiates its function once. See `elements` for the source of the elements.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import tensorflow as tf

from tff_optim.core import tracing
from tff_optim.core.types import Function, GraphFunction, Node, Proto, Tensors
from tff_optim.resident.graphs.elements import Stacked, pack, unpack
from tff_optim.resident.graphs.nodes import node_of

_REDUCE = "ReduceDataset"
_MADE, _FILLED, _NEXT = "AnonymousIteratorV3", "MakeIterator", "IteratorGetNextAsOptional"
# A table replaces an iterator. It holds one of these: elements and the number of the next one, or an
# iterator.
_STACKED, _ITERATOR = range(2)


def read_in_one_go(graph: tf.compat.v1.GraphDef) -> None:
    """Replaces every reduction, and every iterator, in a graph and in its functions."""
    rewriting = _Rewriting(graph)
    rewriting.replace(graph.node)
    for function in graph.library.function:
        rewriting.replace_in_function(function)
    known = {function.signature.name for function in graph.library.function}
    graph.library.function.extend(
        function for name, function in rewriting.added.items() if name not in known
    )


class _Rewriting:
    """Replaces nodes.

    Args:
      graph: The graph.

    Attributes:
      added: Functions that are called in place of nodes, by their names.
    """

    def __init__(self, graph: tf.compat.v1.GraphDef):
        self.added: dict[str, Proto] = {}
        self._functions = {function.signature.name: function for function in graph.library.function}
        bodies = (function.node_def for function in graph.library.function)
        self._iterates = _can_replace_iterators([graph.node, *bodies])

    def replace_in_function(self, function: Proto) -> None:
        """Replaces nodes of a function."""
        outputs = {_REDUCE: "output"}
        if self._iterates:
            outputs |= {_MADE: "table_handle", _NEXT: "output"}
        renamed = {node.name: outputs[node.op] for node in function.node_def if node.op in outputs}
        self.replace(function.node_def)
        for node in function.node_def:
            for i, tensor in enumerate(node.input):
                node.input[i] = _renamed(tensor, renamed)
        for name, tensor in function.ret.items():
            function.ret[name] = _renamed(tensor, renamed)

    def replace(self, nodes: Iterable[Node]) -> None:
        """Replaces nodes of a graph or of a function."""
        iterators = {node.name: _elements_of(node) for node in nodes if node.op == _MADE}
        for node in nodes:
            if node.op == _REDUCE:
                self._replace_reduction(node)
            elif node.op == _FILLED and self._iterates:
                self._call(node, _filling(iterators[node_of(node.input[1])]))
            elif node.op == _NEXT and self._iterates:
                self._call(node, _following(_elements_of(node)))
            elif node.op == _MADE and self._iterates:
                _make_table(node)

    def _replace_reduction(self, node: Node) -> None:
        step = self._functions[node.attr["f"].func.name]
        arguments = step.signature.input_arg
        types = [tf.dtypes.as_dtype(argument.type) for argument in arguments]
        begin = len(node.attr["Tstate"].list.type)
        end = len(types) - len(node.attr["Targuments"].list.type)
        shapes = [_shapes_in(step.arg_attr[i].attr["_output_shapes"])[0] for i in range(begin, end)]
        called, loop = _reduction(Stacked(types[begin:end], shapes), types[:begin], types[end:])
        self._call(node, loop, {called: step.signature.name})

    def _call(
        self, node: Node, function: GraphFunction, names: Mapping[str, str] | None = None
    ) -> None:
        """Makes a node a call of a traced function, in which stand-ins have other names."""
        names = names or {}
        definition = function.function_def
        node.op = "StatefulPartitionedCall"
        node.attr.clear()
        node.attr["f"].func.name = definition.signature.name
        for key, arguments in (
            ("Tin", definition.signature.input_arg),
            ("Tout", definition.signature.output_arg),
        ):
            node.attr[key].list.type.extend([argument.type for argument in arguments])
        for one in (definition, *function.graph.as_graph_def().library.function):
            if one.signature.name in names:
                continue
            self.added[one.signature.name] = one
            for called in itertools.chain.from_iterable(map(functions_of, one.node_def)):
                called.name = names.get(called.name, called.name)


def _can_replace_iterators(bodies: Iterable[Iterable[Node]]) -> bool:
    """Whether all iterators have elements that can be stacked, and are read in a known way."""
    for body in bodies:
        made = {node.name for node in body if node.op == _MADE}
        for node in body:
            if "Iterator" not in node.op:
                continue
            if node.op == _FILLED:
                if node_of(node.input[1]) not in made:
                    return False
            elif node.op not in (_MADE, _NEXT) or not _elements_of(node).are_possible:
                return False
    return True


def _elements_of(node: Node) -> Stacked:
    """The elements of an iterator."""
    types = [tf.dtypes.as_dtype(one) for one in node.attr["output_types"].list.type]
    return Stacked(types, _shapes_in(node.attr["output_shapes"]))


def _shapes_in(attribute: Proto) -> list[tf.TensorShape]:
    return [tf.TensorShape(shape) for shape in attribute.list.shape] or [tf.TensorShape(None)]


def _renamed(tensor: str, outputs: Mapping[str, str]) -> str:
    """Names an output as functions do, by the output argument of its operation."""
    name, _, rest = tensor.partition(":")
    if name not in outputs:
        return tensor
    return f"{name}:{outputs[name]}:{rest.partition(':')[2]}"


def _reduction(
    stacked: Stacked, state: list[tf.DType], others: list[tf.DType]
) -> tuple[str, GraphFunction]:
    """Traces `<data, state, others> -> state`, which calls a step on each element.

    Returns:
      The name of the step in it, and the function.
    """

    def stand_in(*arguments: tf.Tensor) -> list[tf.Tensor]:
        return [tf.identity(x) for x in arguments[: len(state)]]

    called = _traced(stand_in, *state, *stacked.dtypes, *others)

    def loop(data: tf.Tensor, *arguments: tf.Tensor) -> Tensors:
        begin, rest = arguments[: len(state)], arguments[len(state) :]
        first, is_there, element, following = _elements(stacked, data)

        # One loop for both sources of elements, so the graph of the step is in it once.
        def body(i: tf.Tensor, optional: tf.Tensor, *current: tf.Tensor) -> tuple[tf.Tensor, ...]:
            new = tf.raw_ops.StatefulPartitionedCall(
                args=[*current, *element(i, optional), *rest], Tout=state, f=called
            )
            with tf.control_dependencies(new):
                return i + 1, following(), *new

        return tf.while_loop(
            lambda i, optional, *unused: is_there(i, optional),
            body,
            [tf.constant(0), first, *begin],
            shape_invariants=[tf.TensorShape([])] * 2 + [tf.TensorShape(None)] * len(begin),
        )[2:]

    return called.function_def.signature.name, _traced(loop, tf.variant, *state, *others)


class _Elements(NamedTuple):
    """The elements of a loop: read in one go, or one by one from an iterator, each as an optional.

    Attributes:
      first: The optional that the loop begins with; without a value if all elements are read.
      is_there: `number, optional -> whether there is an element`.
      element: `number, optional -> its tensors`.
      following: The optional of the next turn.
    """

    first: tf.Tensor
    is_there: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    element: Callable[[tf.Tensor, tf.Tensor], Tensors]
    following: Callable[[], tf.Tensor]


def _elements(stacked: Stacked, data: tf.Tensor) -> _Elements:
    iterator = tf.raw_ops.AnonymousIteratorV3(
        output_types=stacked.dtypes, output_shapes=stacked.shapes
    )

    def following() -> tf.Tensor:
        return stacked.following(iterator)

    def first() -> tf.Tensor:
        made = tf.raw_ops.MakeIterator(dataset=data, iterator=iterator)
        with tf.control_dependencies([made]):
            return following()

    def is_there(unused: tf.Tensor, optional: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.OptionalHasValue(optional=optional)

    def element(unused: tf.Tensor, optional: tf.Tensor) -> Tensors:
        return unpack(optional, stacked.dtypes)

    if not stacked.are_possible:
        return _Elements(first(), is_there, element, following)
    fit = stacked.fit(data)
    begin, *held = tf.cond(
        fit,
        lambda: [tf.raw_ops.OptionalNone(), *stacked.read(data)],
        lambda: [first(), *stacked.nothing()],
    )
    number = stacked.number(held)
    return _Elements(
        begin,
        lambda i, optional: (i < number) | is_there(i, optional),
        lambda i, optional: tf.nest.flatten(
            tf.cond(fit, lambda: stacked.element(held, i), lambda: element(i, optional))
        ),
        lambda: tf.cond(fit, tf.raw_ops.OptionalNone, following),
    )


def _make_table(node: Node) -> None:
    """Makes the node of an iterator one of a table."""
    node.op = "AnonymousMutableHashTable"
    node.attr.clear()
    node.attr["key_dtype"].type = tf.int64.as_datatype_enum
    node.attr["value_dtype"].type = tf.variant.as_datatype_enum


def _insert(table: tf.Tensor, key: int, value: tf.Tensor) -> tf.Operation:
    return tf.raw_ops.LookupTableInsertV2(
        table_handle=table, keys=tf.constant(key, tf.int64), values=value
    )


def _find(table: tf.Tensor, key: int) -> tf.Tensor:
    return tf.raw_ops.LookupTableFindV2(
        table_handle=table,
        keys=tf.constant(key, tf.int64),
        default_value=tf.raw_ops.OptionalNone(),
    )


def _filling(stacked: Stacked) -> GraphFunction:
    """Traces `<data, table> -> <>`, which replaces the start of an iterator."""

    def with_elements(table: tf.Tensor, key: int, held: Tensors) -> tf.Tensor:
        with tf.control_dependencies([_insert(table, key, pack([tf.constant(0), *held]))]):
            return tf.constant(0)

    def with_iterator(data: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        iterator = tf.raw_ops.AnonymousIteratorV3(
            output_types=stacked.dtypes, output_shapes=stacked.shapes
        )
        made = tf.raw_ops.MakeIterator(dataset=data, iterator=iterator)
        with tf.control_dependencies([made]):
            return with_elements(table, _ITERATOR, [iterator])

    def fill(data: tf.Tensor, table: tf.Tensor) -> Tensors:
        done = tf.cond(
            stacked.fit(data),
            lambda: with_elements(table, _STACKED, stacked.read(data)),
            lambda: with_iterator(data, table),
        )
        with tf.control_dependencies([done]):
            return []

    return _traced(fill, tf.variant, tf.resource)


def _following(stacked: Stacked) -> GraphFunction:
    """Traces `table -> optional`, which replaces an iterator's next element."""

    def of_elements(table: tf.Tensor) -> tf.Tensor:
        i, *held = unpack(_find(table, _STACKED), [tf.int32, *stacked.types])

        def one() -> tf.Tensor:
            element = pack(stacked.element(held, i))
            with tf.control_dependencies([_insert(table, _STACKED, pack([i + 1, *held]))]):
                return tf.identity(element)

        return tf.cond(i < stacked.number(held), one, tf.raw_ops.OptionalNone)

    def of_iterator(table: tf.Tensor) -> tf.Tensor:
        _, iterator = unpack(_find(table, _ITERATOR), [tf.int32, tf.resource])
        return stacked.following(iterator)

    def following(table: tf.Tensor) -> tf.Tensor:
        return tf.cond(
            tf.raw_ops.OptionalHasValue(optional=_find(table, _STACKED)),
            lambda: of_elements(table),
            lambda: of_iterator(table),
        )

    return _traced(following, tf.resource)


def _traced(function: Function, *types: tf.DType) -> GraphFunction:
    specs = [
        tf.TensorSpec([] if dtype in (tf.variant, tf.resource) else None, dtype) for dtype in types
    ]
    return tracing.function(function, autograph=False).get_concrete_function(*specs)


def functions_of(node: Node) -> Iterable[Proto]:
    """Lists the functions that a node names."""
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func
        yield from value.list.func
