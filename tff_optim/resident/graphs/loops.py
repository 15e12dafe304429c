"""Loops over data sets in clients' graphs, made such that they read a data set in one go.

TFF's builders train in `dataset.reduce`, or in a loop over an iterator. TensorFlow instantiates the
function of a reduction anew at every call, for every client: tens of milliseconds, where a step of a
small model takes one tenth of a millisecond. A loop calls the same function on the same elements in
the same order, and its function is instantiated once. `elements` says where the elements come from.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from tff_optim.core import tracing
from tff_optim.resident.graphs.elements import Elements, Gathered, Stacked, pack, unpack
from tff_optim.resident.graphs.nodes import node_of

_REDUCE = "ReduceDataset"
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_MADE, _FILLED, _NEXT = "AnonymousIteratorV3", "MakeIterator", "IteratorGetNextAsOptional"
# In the place of an iterator is a table with one of these: elements and the number of the next one,
# or an iterator.
_GATHERED, _STACKED, _ITERATOR = range(3)


def read_in_one_go(graph: tf.compat.v1.GraphDef, arrays: Mapping[str, Gathered]) -> None:
    """Replaces every reduction, and every iterator, in a graph and in its functions.

    Args:
      graph: The graph.
      arrays: Nodes of the graph that give no data sets but batches of arrays, packed, and which.
    """
    rewriting = _Rewriting(graph)
    graph.node.extend(rewriting.replace(graph.node, arrays, "{}"))
    for function in graph.library.function:
        rewriting.replace_in_function(function, {})
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
        self.added: dict[str, Any] = {}
        self._functions = {function.signature.name: function for function in graph.library.function}
        bodies = (function.node_def for function in graph.library.function)
        self._iterates = _can_replace_iterators([graph.node, *bodies])

    def replace_in_function(self, function: Any, arrays: Mapping[str, Gathered]) -> None:
        """Replaces nodes of a function, some of whose arguments are arrays."""
        outputs = {_REDUCE: "output"}
        if self._iterates:
            outputs |= {_MADE: "table_handle", _NEXT: "output"}
        renamed = {node.name: outputs[node.op] for node in function.node_def if node.op in outputs}
        added = self.replace(function.node_def, arrays, "{}:output:0")
        function.node_def.extend(added)
        as_data_sets = {node.input[0]: f"{node.name}:output:0" for node in added}
        for node in function.node_def:
            for i, tensor in enumerate(node.input):
                node.input[i] = _renamed(tensor, renamed)
        for name, tensor in function.ret.items():
            function.ret[name] = _renamed(as_data_sets.get(tensor, tensor), renamed)

    def replace(self, nodes: Any, arrays: Mapping[str, Gathered], output: str) -> list[Any]:
        """Replaces nodes of a graph or of a function.

        Args:
          nodes: The nodes.
          arrays: Those nodes or arguments that are arrays.
          output: How the first output of a call is named there.

        Returns:
          More nodes, which make data sets of arrays for those that can do nothing else with them.
        """
        iterators = {node.name: _elements_of(node) for node in nodes if node.op == _MADE}
        added: dict[str, Any] = {}
        for node in nodes:
            given = {
                i: arrays[node_of(tensor)]
                for i, tensor in enumerate(node.input)
                if node_of(tensor) in arrays and not tensor.startswith("^")
            }
            if node.op == _REDUCE:
                self._replace_reduction(node, given.get(0))
            elif node.op == _FILLED and self._iterates:
                of_iterator = iterators[node_of(node.input[1])]
                self._call(node, _filling(of_iterator, given.get(0)))
            elif node.op == _NEXT and self._iterates:
                self._call(node, _following(_elements_of(node)))
            elif node.op == _MADE and self._iterates:
                _make_table(node)
            elif node.op in _CALLS and given:
                node.attr["f"].func.name = self._with_arrays(node.attr["f"].func.name, given)
            else:
                for i, batches in given.items():
                    name = f"{node_of(node.input[i])}_as_data_set"
                    if name not in added:
                        added[name] = type(node)(name=name, input=[node.input[i]])
                        self._call(added[name], _data_set(batches))
                    node.input[i] = output.format(name)
        return list(added.values())

    def _with_arrays(self, name: str, given: Mapping[int, Gathered]) -> str:
        """Names a function that takes some of its arguments as arrays."""
        clone_name = "_".join([name, "of_arrays", *map(str, given)])
        if clone_name not in self.added:
            clone = type(self._functions[name])()
            clone.CopyFrom(self._functions[name])
            clone.signature.name = clone_name
            self.added[clone_name] = clone
            arguments = [argument.name for argument in clone.signature.input_arg]
            self.replace_in_function(clone, {arguments[i]: given[i] for i in given})
        return clone_name

    def _replace_reduction(self, node: Any, arrays: Gathered | None) -> None:
        step = self._functions[node.attr["f"].func.name]
        arguments = step.signature.input_arg
        types = [tf.dtypes.as_dtype(argument.type) for argument in arguments]
        begin = len(node.attr["Tstate"].list.type)
        end = len(types) - len(node.attr["Targuments"].list.type)
        shapes = [_shapes_in(step.arg_attr[i].attr["_output_shapes"])[0] for i in range(begin, end)]
        called, loop = _reduction(
            Stacked(types[begin:end], shapes), arrays, types[:begin], types[end:]
        )
        self._call(node, loop, {called: step.signature.name})

    def _call(self, node: Any, function: Any, names: Mapping[str, str] | None = None) -> None:
        """Makes a node the call of a traced function, in which stand-ins have other names."""
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


def _can_replace_iterators(bodies: Iterable[Any]) -> bool:
    """Whether all iterators are of elements that can be stacked, and are read in a known way."""
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


def _elements_of(node: Any) -> Stacked:
    """The elements of an iterator."""
    types = [tf.dtypes.as_dtype(one) for one in node.attr["output_types"].list.type]
    return Stacked(types, _shapes_in(node.attr["output_shapes"]))


def _shapes_in(attribute: Any) -> list[tf.TensorShape]:
    return [tf.TensorShape(shape) for shape in attribute.list.shape] or [tf.TensorShape(None)]


def _renamed(tensor: str, outputs: Mapping[str, str]) -> str:
    """Names an output as functions do: with the output argument of the operation that makes it."""
    name, _, rest = tensor.partition(":")
    if name not in outputs:
        return tensor
    return f"{name}:{outputs[name]}:{rest.partition(':')[2]}"


def _reduction(
    stacked: Stacked, arrays: Gathered | None, state: list[tf.DType], others: list[tf.DType]
) -> tuple[str, Any]:
    """Traces `<data, state, others> -> state`, which calls a step on each element.

    Returns:
      What the step is called there, and the function.
    """

    def stand_in(*arguments: Any) -> Any:
        return [tf.identity(x) for x in arguments[: len(state)]]

    called = _traced(stand_in, *state, *stacked.dtypes, *others)

    def loop(data: Any, *arguments: Any) -> Any:
        begin, rest = arguments[: len(state)], arguments[len(state) :]
        elements = _of_arrays(arrays, data) if arrays is not None else _of_data_set(stacked, data)

        # One loop, however the elements come: the graph of the step is in it once.
        def body(i: Any, following: Any, *current: Any) -> Any:
            new = tf.raw_ops.StatefulPartitionedCall(
                args=[*current, *elements.element(i, following), *rest], Tout=state, f=called
            )
            with tf.control_dependencies(new):
                return i + 1, elements.following(), *new

        return tf.while_loop(
            lambda i, following, *unused: elements.is_there(i, following),
            body,
            [tf.constant(0), elements.first, *begin],
            shape_invariants=[tf.TensorShape([])] * 2 + [tf.TensorShape(None)] * len(begin),
        )[2:]

    return called.function_def.signature.name, _traced(loop, tf.variant, *state, *others)


class _InTurn(NamedTuple):
    """The elements of a loop, one after the other.

    Attributes:
      first: What the loop begins with besides the number 0.
      is_there: `number, what it has -> whether there is an element`.
      element: `number, what it has -> the tensors of the element`.
      following: What the loop has in its next turn besides the number.
    """

    first: Any
    is_there: Callable[[Any, Any], Any]
    element: Callable[[Any, Any], list[Any]]
    following: Callable[[], Any]


def _of_arrays(arrays: Gathered, data: Any) -> _InTurn:
    held = arrays.unpack(data)
    number = arrays.number(held)
    return _InTurn(
        tf.constant(0),
        lambda i, unused: i < number,
        lambda i, unused: arrays.element(held, i),
        lambda: tf.constant(0),
    )


def _of_data_set(stacked: Stacked, data: Any) -> _InTurn:
    """Elements that are read in one go, or one by one by an iterator, each as an optional."""
    iterator = tf.raw_ops.AnonymousIteratorV3(
        output_types=stacked.dtypes, output_shapes=stacked.shapes
    )

    def following() -> Any:
        return stacked.following(iterator)

    def first() -> Any:
        made = tf.raw_ops.MakeIterator(dataset=data, iterator=iterator)
        with tf.control_dependencies([made]):
            return following()

    def is_there(unused: Any, optional: Any) -> Any:
        return tf.raw_ops.OptionalHasValue(optional=optional)

    def element(unused: Any, optional: Any) -> list[Any]:
        return unpack(optional, stacked.dtypes)

    if not stacked.are_possible:
        return _InTurn(first(), is_there, element, following)
    fit = stacked.fit(data)
    begin, *held = tf.cond(
        fit,
        lambda: [tf.raw_ops.OptionalNone(), *stacked.read(data)],
        lambda: [first(), *stacked.nothing()],
    )
    number = stacked.number(held)
    return _InTurn(
        begin,
        lambda i, optional: (i < number) | is_there(i, optional),
        lambda i, optional: tf.nest.flatten(
            tf.cond(fit, lambda: stacked.element(held, i), lambda: element(i, optional))
        ),
        lambda: tf.cond(fit, tf.raw_ops.OptionalNone, following),
    )


def _following_in(elements: Elements, held: list[Any], i: Any) -> Any:
    """The element of a number among those that are held, as an optional."""
    return tf.cond(
        i < elements.number(held), lambda: pack(elements.element(held, i)), tf.raw_ops.OptionalNone
    )


def _make_table(node: Any) -> None:
    """Makes the node of an iterator that of a table."""
    node.op = "AnonymousMutableHashTable"
    node.attr.clear()
    node.attr["key_dtype"].type = tf.int64.as_datatype_enum
    node.attr["value_dtype"].type = tf.variant.as_datatype_enum


def _insert(table: Any, key: int, value: Any) -> Any:
    return tf.raw_ops.LookupTableInsertV2(
        table_handle=table, keys=tf.constant(key, tf.int64), values=value
    )


def _find(table: Any, key: int) -> Any:
    return tf.raw_ops.LookupTableFindV2(
        table_handle=table,
        keys=tf.constant(key, tf.int64),
        default_value=tf.raw_ops.OptionalNone(),
    )


def _filling(stacked: Stacked, arrays: Gathered | None) -> Any:
    """Traces `<data, table> -> <>`, which takes the place of beginning with an iterator."""

    def with_elements(table: Any, key: int, held: list[Any]) -> Any:
        with tf.control_dependencies([_insert(table, key, pack([tf.constant(0), *held]))]):
            return tf.constant(0)

    def with_iterator(data: Any, table: Any) -> Any:
        iterator = tf.raw_ops.AnonymousIteratorV3(
            output_types=stacked.dtypes, output_shapes=stacked.shapes
        )
        made = tf.raw_ops.MakeIterator(dataset=data, iterator=iterator)
        with tf.control_dependencies([made]):
            return with_elements(table, _ITERATOR, [iterator])

    def fill(data: Any, table: Any) -> Any:
        if arrays is not None:
            done = with_elements(table, _GATHERED, arrays.unpack(data))
        else:
            done = tf.cond(
                stacked.fit(data),
                lambda: with_elements(table, _STACKED, stacked.read(data)),
                lambda: with_iterator(data, table),
            )
        with tf.control_dependencies([done]):
            return []

    return _traced(fill, tf.variant, tf.resource)


def _following(stacked: Stacked) -> Any:
    """Traces `table -> optional`, which takes the place of an iterator's next element."""

    def of_elements(table: Any, key: int, elements: Elements) -> Any:
        i, *held = unpack(_find(table, key), [tf.int32, *elements.types])
        element = _following_in(elements, held, i)
        with tf.control_dependencies([_insert(table, key, pack([i + 1, *held]))]):
            return tf.identity(element)

    def of_iterator(table: Any) -> Any:
        _, iterator = unpack(_find(table, _ITERATOR), [tf.int32, tf.resource])
        return stacked.following(iterator)

    def following(table: Any) -> Any:
        def has(key: int) -> Any:
            return tf.raw_ops.OptionalHasValue(optional=_find(table, key))

        gathered = Gathered(stacked.dtypes, stacked.shapes)
        return tf.cond(
            has(_STACKED),
            lambda: of_elements(table, _STACKED, stacked),
            lambda: tf.cond(
                has(_GATHERED),
                lambda: of_elements(table, _GATHERED, gathered),
                lambda: of_iterator(table),
            ),
        )

    return _traced(following, tf.resource)


def _data_set(arrays: Gathered) -> Any:
    """Traces `data -> data set`."""
    return _traced(arrays.dataset, tf.variant)


def _traced(function: Callable[..., Any], *types: tf.DType) -> Any:
    specs = [
        tf.TensorSpec([] if dtype in (tf.variant, tf.resource) else None, dtype) for dtype in types
    ]
    return tracing.function(function, autograph=False).get_concrete_function(*specs)


def functions_of(node: Any) -> Iterable[Any]:
    """Lists the functions that a node names."""
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func
        yield from value.list.func
