"""Records a client's graph as a program.

TensorFlow can vectorise operations on tensors, but neither variables nor a loop over a data set. TFF's
graphs have both. The recorder runs such a graph once with symbols in place of tensors. It follows all
calls. A variable becomes its value at that point. TFF and this package write a loop over data in
several forms; each becomes one `SCAN`, whose body takes the state and a batch to a new state.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attrs
import tensorflow as tf
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph

from tff_optim.resident import leaves
from tff_optim.resident.clients.in_process.program import (
    IF,
    RANDOM,
    SCAN,
    WHILE,
    NoProgramError,
    Operation,
    Program,
    Value,
)
from tff_optim.resident.graphs.imported import tensorflow_proto
from tff_optim.resident.graphs.nodes import node_of, tensor_names, unpack

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_SAME = ("Identity", "IdentityN", "StopGradient", "PreventGradient")
# A data set with the same elements in the same order.
_SAME_DATA = ("OptionsDataset", "PrefetchDataset", "ModelDataset")


@attrs.frozen(eq=False)
class Recorded:
    """A computation as a program.

    Attributes:
      program: Its inputs are the tensors among the leaves of the parameter, and its outputs the leaves
        of the result. If the graph has assertions, the last output says whether all of them hold.
      checks: The names of the graph's assertions.
    """

    program: Program
    checks: tuple[str, ...]


def record(computation: Any) -> Recorded:
    """Records a computation without placements.

    Raises:
      NoProgramError: If some operation cannot be part of a program.
    """
    proto = tensorflow_proto(computation)
    parameter = computation.type_signature.parameter
    given = [] if parameter is None else list(tensor_names(proto.parameter))
    with tf.Graph().as_default() as graph:
        graph_def = unpack(proto)
        tf.graph_util.import_graph_def(graph_def, name="")
        recorder = _Recorder(graph, {f.signature.name: f for f in graph_def.library.function})
        return recorder.record(
            list(zip(given, [] if parameter is None else leaves.leaves_of(parameter), strict=True)),
            list(tensor_names(proto.result)),
            proto.initialize_op,
        )


class _Source:
    """The data set at one leaf of a client's data."""

    def __init__(self, index: int):
        self.index = index


class _Variable:
    """A variable."""


class _Iterator:
    """An iterator.

    Attributes:
      source: The data set.
      optionals: The next optionals, until a loop takes the rest.
    """

    def __init__(self) -> None:
        self.source: _Source | None = None
        self.optionals: list[Any] = []


class _Element:
    """An optional that holds an element.

    Attributes:
      values: Its tensors, once they were asked for.
    """

    def __init__(self) -> None:
        self.values: list[Value] = []


@attrs.frozen(eq=False)
class _Following:
    """An optional that holds the next element, if there is one."""

    iterator: _Iterator


_EXISTS = object()  # whether there is a next element
_MISSING = object()  # an optional that holds nothing


class _Recorder:
    def __init__(self, graph: tf.Graph, functions: dict[str, Any]):
        self._graph = graph
        self._functions = functions
        self._bodies: dict[str, Any] = {}
        self._operations: list[Operation] = []
        self._state: dict[_Variable, Value] = {}
        self._variables: dict[bytes, _Variable] = {}
        self._checks = _Variable()
        self._checked: dict[str, None] = {}
        self._inside: list[str] = []
        self._handlers: dict[str, Callable[[Any, list[Any]], list[Any]]] = {
            "Const": self._const,
            "NoOp": lambda op, inputs: [],
            "Assert": self._assert,
            "VarHandleOp": self._variable,
            "VarIsInitializedOp": lambda op, inputs: [self._constant(True)],
            "ReadVariableOp": lambda op, inputs: [self._read(op, inputs[0])],
            "AssignVariableOp": lambda op, inputs: self._assign(op, *inputs),
            "AssignAddVariableOp": lambda op, inputs: self._change("AddV2", op, *inputs),
            "AssignSubVariableOp": lambda op, inputs: self._change("Sub", op, *inputs),
            "VariableShape": lambda op, inputs: self._shape_of_variable(op, inputs[0]),
            "ResourceGather": self._gather,
            "If": self._if,
            "StatelessIf": self._if,
            "While": self._while,
            "StatelessWhile": self._while,
            "ReduceDataset": self._reduce,
            "AnonymousIteratorV3": lambda op, inputs: [_Iterator()],
            "AnonymousIteratorV2": lambda op, inputs: [_Iterator(), None],
            "IteratorV2": lambda op, inputs: [_Iterator()],
            "DeleteIterator": lambda op, inputs: [],
            "MakeIterator": self._make_iterator,
            "IteratorGetNextAsOptional": self._next,
            "OptionalHasValue": self._has_value,
            "OptionalGetValue": self._get_value,
            "RepeatDataset": self._repeat,
            **dict.fromkeys(_CALLS, lambda op, inputs: self._follow(op.get_attr("f").name, inputs)),
            **dict.fromkeys(_SAME, lambda op, inputs: inputs),
            **dict.fromkeys(_SAME_DATA, lambda op, inputs: inputs[:1]),
        }

    def record(
        self, given: list[tuple[str, leaves.Leaf]], results: list[str], initializer: str
    ) -> Recorded:
        known: dict[Any, Any] = {}
        inputs = []
        for index, (name, leaf) in enumerate(given):
            item: Any = Value(leaf.dtype, leaf.shape) if leaf.is_tensor else _Source(index)
            known[self._graph.get_tensor_by_name(_canonical(name)).ref()] = item
            if leaf.is_tensor:
                inputs.append(item)
        self._state[self._checks] = self._constant(True)
        if initializer:  # before all others, as in a session's first call
            self._run([self._graph.get_operation_by_name(node_of(initializer))], known)
        ends = [self._graph.get_tensor_by_name(_canonical(name)) for name in results]
        self._run([end.op for end in ends], known)
        outputs = [self._value(known[end.ref()], end.op) for end in ends]
        if self._checked:
            outputs.append(self._state[self._checks])
        program = Program(tuple(inputs), tuple(self._operations), tuple(outputs))
        return Recorded(program, tuple(self._checked))

    def _run(self, ends: Sequence[Any], known: dict[Any, Any]) -> None:
        """Runs some operations of a graph, each after all that it depends on."""
        done: set[Any] = known.setdefault("done", set())
        stack = list(reversed(ends))
        while stack:
            op = stack[-1]
            if op.name in done or _is_known(op, known):
                stack.pop()
                continue
            before = [*(x.op for x in op.inputs if x.ref() not in known), *op.control_inputs]
            ahead = [x for x in before if x.name not in done and not _is_known(x, known)]
            if ahead:
                stack.extend(reversed(ahead))
                continue
            stack.pop()
            done.add(op.name)
            found = self._results(op, [known[x.ref()] for x in op.inputs])
            for tensor, item in zip(op.outputs, found, strict=True):
                known[tensor.ref()] = item

    def _results(self, op: Any, inputs: list[Any]) -> list[Any]:
        if op.type in self._functions:
            return self._follow(op.type, inputs)
        return self._handlers.get(op.type, self._plain)(op, inputs)

    def _plain(self, op: Any, inputs: list[Any]) -> list[Any]:
        """Records an operation on tensors."""
        definition = op.op_def
        if definition.is_stateful and op.type not in RANDOM:
            raise NoProgramError(f"{op.type} ({op.name}), which does more than compute")
        if any(value.HasField("func") or value.list.func for value in op.node_def.attr.values()):
            raise NoProgramError(f"{op.type} ({op.name}), which calls a function")
        values = [self._value(item, op) for item in inputs]
        attributes = {k: v for k, v in op.node_def.attr.items() if not k.startswith("_")}
        return self._add(op.type, op.name, values, map(Value.like, op.outputs), attributes)

    def _add(
        self,
        kind: str,
        name: str,
        inputs: Sequence[Value],
        outputs: Iterable[Value],
        attributes: dict[str, Any] | None = None,
        programs: Sequence[Program] = (),
        source: int | None = None,
    ) -> list[Any]:
        made = tuple(outputs)
        self._operations.append(
            Operation(kind, name, tuple(inputs), made, attributes or {}, tuple(programs), source)
        )
        return list(made)

    def _value(self, item: Any, op: Any) -> Value:
        if not isinstance(item, Value):
            kinds = {_Variable: "a variable", _Source: "the client's data set"}
            what = kinds.get(type(item), "an iterator of the client's data set")
            raise NoProgramError(f"{op.type} ({op.name}) of {what}")
        return item

    def _const(self, op: Any, inputs: list[Any]) -> list[Any]:
        (result,) = self._plain(op, inputs)
        if op.outputs[0].shape.rank == 0:
            result.known = tf.make_ndarray(op.get_attr("value"))[()]
        return [result]

    def _constant(self, number: bool | int) -> Value:
        dtype = tf.bool if isinstance(number, bool) else tf.int32
        proto = tf.make_tensor_proto(number, dtype)
        attributes = {
            "value": tf.compat.v1.AttrValue(tensor=proto),
            "dtype": tf.compat.v1.AttrValue(type=dtype.as_datatype_enum),
        }
        result = Value(dtype, tf.TensorShape([]), number)
        self._add("Const", "constant", [], [result], attributes)
        return result

    def _assert(self, op: Any, inputs: list[Any]) -> list[Any]:
        self._checked[op.name] = None
        both = [self._state[self._checks], self._value(inputs[0], op)]
        (after,) = self._add("LogicalAnd", op.name, both, [Value.like(both[0])])
        self._state[self._checks] = after
        return []

    # Variables.

    def _variable(self, op: Any, inputs: list[Any]) -> list[Any]:
        name = op.get_attr("shared_name") or op.name.encode()
        return [self._variables.setdefault(name, _Variable())]

    def _cell(self, op: Any, item: Any) -> _Variable:
        if not isinstance(item, _Variable):
            raise NoProgramError(
                f"{op.type} ({op.name}) of something that is no variable of the client"
            )
        return item

    def _read(self, op: Any, item: Any) -> Value:
        variable = self._cell(op, item)
        if variable not in self._state:
            raise NoProgramError(f"{op.type} ({op.name}) of a variable without a first value")
        return self._state[variable]

    def _assign(self, op: Any, item: Any, value: Any) -> list[Any]:
        self._state[self._cell(op, item)] = self._value(value, op)
        return []

    def _change(self, kind: str, op: Any, item: Any, by: Any) -> list[Any]:
        old = self._read(op, item)
        attributes = {"T": op.node_def.attr["dtype"]}
        new = self._add(kind, op.name, [old, self._value(by, op)], [Value.like(old)], attributes)
        return self._assign(op, item, *new)

    def _shape_of_variable(self, op: Any, item: Any) -> list[Any]:
        value = self._read(op, item)
        attributes = {
            "T": tf.compat.v1.AttrValue(type=value.dtype.as_datatype_enum),
            "out_type": op.node_def.attr["out_type"],
        }
        return self._add("Shape", op.name, [value], map(Value.like, op.outputs), attributes)

    def _gather(self, op: Any, inputs: list[Any]) -> list[Any]:
        values = [self._read(op, inputs[0]), self._value(inputs[1], op), self._constant(0)]
        attributes = {
            "batch_dims": op.node_def.attr["batch_dims"],
            "Tparams": op.node_def.attr["dtype"],
            "Tindices": op.node_def.attr["Tindices"],
            "Taxis": tf.compat.v1.AttrValue(type=tf.int32.as_datatype_enum),
        }
        return self._add("GatherV2", op.name, values, map(Value.like, op.outputs), attributes)

    # Functions and control flow.

    def _body(self, name: str) -> Any:
        if name not in self._bodies:
            with self._graph.as_default():
                self._bodies[name] = function_def_to_graph(self._functions[name])
        return self._bodies[name]

    def _follow(self, name: str, inputs: Sequence[Any]) -> list[Any]:
        """Runs a function."""
        body = self._body(name)
        known = {tensor.ref(): item for tensor, item in zip(body.inputs, inputs, strict=True)}
        self._run(body.get_operations(), known)
        return [known[tensor.ref()] for tensor in body.outputs]

    @contextlib.contextmanager
    def _apart(self, where: str) -> Iterator[list[Operation]]:
        """Collects the operations of an inner program, and restores the variables' values after it."""
        outer, state = self._operations, dict(self._state)
        self._operations = []
        self._inside.append(where)
        try:
            yield self._operations
        finally:
            self._operations, self._state = outer, state
            self._inside.pop()

    def _if(self, op: Any, inputs: list[Any]) -> list[Any]:
        condition, *arguments = inputs
        names = [op.get_attr(branch).name for branch in ("then_branch", "else_branch")]
        if isinstance(condition, Value) and condition.known is not None:
            return self._follow(names[not condition.known], arguments)
        branches = []
        for name in names:
            with self._apart("a branch") as operations:
                found = [self._value(item, op) for item in self._follow(name, arguments)]
                branches.append((operations, found, dict(self._state)))
        (_, _, if_true), (_, _, if_false) = branches
        changed = [
            variable
            for variable in {**if_true, **if_false}
            if if_true.get(variable) is not if_false.get(variable)
        ]
        if any(variable not in self._state for variable in changed):
            raise NoProgramError(f"{op.type} ({op.name}) with the first value of a variable in it")
        programs = [
            Program((), tuple(operations), (*found, *(state[one] for one in changed)))
            for operations, found, state in branches
        ]
        after = [Value.like(self._state[variable]) for variable in changed]
        outputs = [*map(Value.like, op.outputs), *after]
        self._add(IF, op.name, [self._value(condition, op)], outputs, programs=programs)
        self._state.update(zip(changed, after, strict=True))
        return outputs[: len(op.outputs)]

    def _while(self, op: Any, inputs: list[Any]) -> list[Any]:
        if any(isinstance(item, _Iterator | _Following) for item in inputs):
            return self._loop_over_data(op, inputs)
        test, body = op.get_attr("cond").name, op.get_attr("body").name
        slots = [i for i, item in enumerate(inputs) if isinstance(item, Value)]

        def arguments(state: list[Value]) -> list[Any]:
            given = dict(zip(slots, state, strict=True))
            return [given.get(i, item) for i, item in enumerate(inputs)]

        def condition(state: list[Value]) -> list[Value]:
            return [self._value(item, op) for item in self._follow(test, arguments(state))]

        def turn(state: list[Value]) -> tuple[list[Value], list[Value]]:
            found = self._follow(body, arguments(state))
            self._check_kept(op, inputs, found)
            return [self._value(found[i], op) for i in slots], []

        return arguments(self._loop(op, [inputs[i] for i in slots], turn, condition))

    def _loop(
        self,
        op: Any,
        start: list[Value],
        turn: Callable[[list[Value]], tuple[list[Value], list[Value]]],
        condition: Callable[[list[Value]], list[Value]] | None = None,
        source: _Source | None = None,
    ) -> list[Value]:
        """Adds a loop, whose state is some values and all variables.

        Args:
          op: The operation that it replaces.
          start: The values before the loop.
          turn: Records an iteration. Returns the new values, and those that stand for a batch.
          condition: Records the condition of a loop that is not over data.
          source: The data set of a loop over data.
        """
        variables = list(self._state)
        before = [*start, *self._state.values()]
        inner = list(map(Value.like, before))
        mine, theirs = inner[: len(start)], dict(zip(variables, inner[len(start) :], strict=True))
        tested: list[Operation] = []
        goes_on: list[Value] = []
        if condition is not None:
            with self._apart("a loop") as tested:
                self._state.update(theirs)
                goes_on = condition(mine)
        with self._apart("a loop") as operations:
            self._state.update(theirs)
            found, batch = turn(mine)
            if len(self._state) > len(variables):
                raise NoProgramError(
                    f"{op.type} ({op.name}) with the first value of a variable in it"
                )
            results = [*found, *(self._state[variable] for variable in variables)]
        # A value that does not change is not state but comes from outside.
        moving = [i for i, value in enumerate(inner) if results[i] is not value]
        same = {inner[i]: before[i] for i in range(len(inner)) if i not in moving}
        inputs = tuple(inner[i] for i in moving)
        programs = [
            Program((*inputs, *batch), tuple(operations), tuple(results[i] for i in moving))
        ]
        if condition is not None:
            programs.insert(0, Program(inputs, tuple(tested), tuple(goes_on)))
        after = list(before)
        for i in moving:
            after[i] = Value.like(before[i])
        self._add(
            SCAN if condition is None else WHILE,
            op.name,
            [before[i] for i in moving],
            [after[i] for i in moving],
            programs=[program.with_others(same) for program in programs],
            source=None if source is None else source.index,
        )
        self._state.update(zip(variables, after[len(start) :], strict=True))
        return after[: len(start)]

    def _check_kept(self, op: Any, before: list[Any], after: list[Any]) -> None:
        for old, new in zip(before, after, strict=True):
            if not isinstance(old, Value | _Following) and new is not old:
                raise NoProgramError(
                    f"{op.type} ({op.name}), which exchanges variables or data sets"
                )

    # Loops over data.

    def _check_outside(self, op: Any, source: Any) -> None:
        if not isinstance(source, _Source):
            raise NoProgramError(
                f"{op.type} ({op.name}) of something else than the client's data set"
            )
        if self._inside:
            raise NoProgramError(
                f"{op.type} ({op.name}), a pass over the data in {self._inside[-1]}"
            )

    def _reduce(self, op: Any, inputs: list[Any]) -> list[Any]:
        source, *rest = inputs
        self._check_outside(op, source)
        num_state, name = len(op.get_attr("Tstate")), op.get_attr("f").name
        start = [self._value(item, op) for item in rest[:num_state]]
        others = rest[num_state:]
        specs = self._body(name).inputs[num_state:]

        def turn(state: list[Value]) -> tuple[list[Value], list[Value]]:
            batch = list(map(Value.like, specs[: len(specs) - len(others)]))
            found = self._follow(name, [*state, *batch, *others])
            return [self._value(item, op) for item in found], batch

        return self._loop(op, start, turn, source=source)

    def _make_iterator(self, op: Any, inputs: list[Any]) -> list[Any]:
        source, iterator = inputs
        self._check_outside(op, source)
        iterator.source = source
        iterator.optionals = [_Following(iterator)]
        return []

    def _next(self, op: Any, inputs: list[Any]) -> list[Any]:
        (iterator,) = inputs
        if not isinstance(iterator, _Iterator) or not iterator.optionals:
            raise NoProgramError(
                f"{op.type} ({op.name}), by which a loop takes several batches in a turn"
            )
        return [iterator.optionals.pop()]

    def _has_value(self, op: Any, inputs: list[Any]) -> list[Any]:
        if isinstance(inputs[0], _Following):
            return [_EXISTS]
        return [self._constant(inputs[0] is not _MISSING)]

    def _get_value(self, op: Any, inputs: list[Any]) -> list[Any]:
        (element,) = inputs
        if not isinstance(element, _Element):
            raise NoProgramError(f"{op.type} ({op.name}), which takes a batch outside of a loop")
        if not element.values:
            element.values = list(map(Value.like, op.outputs))
        return list(element.values)

    def _repeat(self, op: Any, inputs: list[Any]) -> list[Any]:
        data, count = inputs
        if not isinstance(count, Value) or count.known != 1:
            raise NoProgramError(f"{op.type} ({op.name}), a pipeline in the client's graph")
        return [data]

    def _loop_over_data(self, op: Any, inputs: list[Any]) -> list[Any]:
        """Records a loop over an iterator, as AutoGraph writes it, or over its optionals.

        AutoGraph's loop asks for an element in its body, once more than there are elements. The other
        begins with an element, and asks for the next one at the end.
        """
        test, body = op.get_attr("cond").name, op.get_attr("body").name
        odd = NoProgramError(
            f"{op.type} ({op.name}), a loop over data that may end before the data do"
        )
        iterators = {
            item if isinstance(item, _Iterator) else item.iterator
            for item in inputs
            if isinstance(item, _Iterator | _Following)
        }
        (iterator,) = iterators
        self._check_outside(op, iterator.source)

        def goes_on(items: list[Any]) -> Any:
            with self._apart("a condition"):
                (found,) = self._follow(test, items)
            return found

        first = goes_on(inputs)
        ahead = [i for i, item in enumerate(inputs) if isinstance(item, _Following)]
        flags = [i for i, item in enumerate(inputs) if item is first]
        if first is not _EXISTS and not (flags and first.known):
            raise odd
        slots = [i for i, x in enumerate(inputs) if isinstance(x, Value) and i not in flags]

        def arguments(state: list[Value], optional: Any) -> list[Any]:
            given = dict(zip(slots, state, strict=True)) | dict.fromkeys(ahead, optional)
            return [given.get(i, item) for i, item in enumerate(inputs)]

        def turn(state: list[Value]) -> tuple[list[Value], list[Value]]:
            element = _Element()
            iterator.optionals = [_Following(iterator) if ahead else element]
            found = self._follow(body, arguments(state, element))
            again = goes_on(found)
            if (
                iterator.optionals
                or not all(isinstance(found[i], _Following) for i in ahead)
                or not (again is _EXISTS or (flags and again.known))
            ):
                raise odd
            self._check_kept(op, inputs, found)
            return [self._value(found[i], op) for i in slots], element.values

        start = [self._value(inputs[i], op) for i in slots]
        after = arguments(self._loop(op, start, turn, source=iterator.source), _MISSING)
        iterator.optionals = []
        if flags:  # AutoGraph's last turn, without an element
            iterator.optionals = [_MISSING]
            after = self._follow(body, after)
        end = goes_on(after)
        if not isinstance(end, Value) or end.known is None or end.known:
            raise odd
        return after


def _is_known(op: Any, known: dict[Any, Any]) -> bool:
    return bool(op.outputs) and all(tensor.ref() in known for tensor in op.outputs)


def _canonical(tensor: str) -> str:
    return tensor if ":" in tensor else f"{tensor}:0"
