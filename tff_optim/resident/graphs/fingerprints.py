"""Fingerprints of TFF computations: equal for equal computations, whatever their parts are called.

Names of tensors, functions and variables contain counters of the program, so they differ between two
programs that build the same computation. A node is therefore identified by its operation, its attributes
and the fingerprints of its inputs, down to arguments and constants. A called function is identified by
its body, a variable by its position in the order of creation, and a reference by its binding.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow_federated as tff

from tff_optim.resident.graphs.nodes import node_of, tensor_names, unpack

# Attributes that are names or say how to run something: they change no number.
_NO_NUMBERS = frozenset(
    {
        "config",
        "config_proto",
        "container",
        "debug_name",
        "executor_type",
        "message",
        "metadata",
        "parallel_iterations",
        "shared_name",
        "token",
        "use_node_name_sharing",
    }
)
# The number of inputs before the words of a message, which name tensors.
_MESSAGES = {"Assert": 1, "PrintV2": 0}
# The number of inputs before the seed.
_SEEDED = {
    **dict.fromkeys(["StatelessRandomGetKeyCounter", "StatelessRandomGetKeyCounterAlg"], 0),
    **{
        f"Stateless{numbers}{version}": 1
        for numbers in (
            *("RandomNormal", "RandomUniform", "TruncatedNormal"),
            *("RandomUniformInt", "RandomUniformFullInt"),
        )
        for version in ("", "V2")
    },
}


def of_computation(computation: Any, *, without: tff.Type | None = None) -> str:
    """Returns a text that is equal for computations with the same operations and constants.

    Seeds of variables' first values do not count: Keras draws a new one whenever it builds an
    initializer without a seed.

    Args:
      computation: A `tff.Computation`.
      without: The type of values whose computation without arguments does not count, such as the initial
        weights of a model, which are constants in some graphs.
    """
    left_out = None if without is None else _written(tff.types.serialize_type(without))
    return _Terms(left_out).add(tff.framework.serialize_computation(computation), {}, 0)


def of_results(
    computation: Any, results: Iterable[int] | None = None, *, constants: bool = True
) -> str:
    """The fingerprint of some results of a computation in TensorFlow; see `of_computation`.

    Args:
      computation: A `tff.Computation` without placements.
      results: The positions of these leaves of the result; None for all.
      constants: Whether constants count.
    """
    proto = tff.framework.serialize_computation(computation).tensorflow
    return _of_graph(proto, results, constants=constants)


def of_parts(*parts: Any) -> str:
    """Returns a text for a sequence of bytes, texts and numbers."""
    found = hashlib.sha256()
    for part in parts:
        encoded = part if isinstance(part, bytes) else str(part).encode()
        found.update(b"%d:" % len(encoded))
        found.update(encoded)
    return found.hexdigest()[:32]


class _Terms:
    """Fingerprints of terms of TFF's language, whose leaves are TensorFlow graphs.

    Args:
      left_out: The type of values whose computation does not count.
    """

    def __init__(self, left_out: bytes | None):
        self._left_out = left_out
        self._graphs: dict[bytes, str] = {}

    def add(self, term: Any, bound: Mapping[str, int], depth: int) -> str:
        """The fingerprint of a term.

        Args:
          term: A `Computation` message.
          bound: For each bound name, how many names were bound before it.
          depth: How many names are bound.
        """
        kind = term.WhichOneof("computation")
        part = getattr(term, kind)
        if kind == "tensorflow":
            function = term.type.function
            if _written(function.result) == self._left_out and not function.HasField("parameter"):
                return of_parts("left out")
            return self._graph(part)
        if kind == "reference":
            return of_parts(kind, bound[part.name])
        if kind == "lambda":
            inner = {**bound, part.parameter_name: depth}
            parameter = _written(term.type.function.parameter)
            return of_parts(kind, parameter, self.add(part.result, inner, depth + 1))
        if kind == "block":
            values = []
            for local in part.local:
                values.append(self.add(local.value, bound, depth))
                bound, depth = {**bound, local.name: depth}, depth + 1
            return of_parts(kind, *values, self.add(part.result, bound, depth))
        if kind == "call":
            given = [part.argument] if part.HasField("argument") else []
            return of_parts(kind, *(self.add(one, bound, depth) for one in (part.function, *given)))
        if kind == "struct":
            members = [(one.name, self.add(one.value, bound, depth)) for one in part.element]
            return of_parts(kind, *(text for member in members for text in member))
        if kind == "selection":
            return of_parts(kind, part.index, self.add(part.source, bound, depth))
        # Messages of intrinsics, placements and literals contain no names.
        return of_parts(kind, _written(part), _written(term.type))

    def _graph(self, proto: Any) -> str:
        written = _written(proto)
        if written not in self._graphs:
            self._graphs[written] = _of_graph(proto)
        return self._graphs[written]


def _written(message: Any) -> bytes:
    return message.SerializeToString(deterministic=True)


def _of_graph(proto: Any, results: Iterable[int] | None = None, *, constants: bool = True) -> str:
    """The fingerprint of results of a graph, and of the first values of its variables."""
    graph = unpack(proto)
    known = {
        node_of(name): of_parts("argument", number)
        for number, name in enumerate(tensor_names(proto.parameter))
    }
    ends = list(tensor_names(proto.result))
    chosen = ends if results is None else [ends[i] for i in results]
    first = [f"^{proto.initialize_op}"] if proto.initialize_op else []
    return of_parts(
        _Nodes(graph, constants=constants, seeds=True).of(graph.node, chosen, known),
        _Nodes(graph, constants=constants, seeds=False).of(graph.node, first, known),
    )


class _Nodes:
    """Fingerprints of the nodes of a graph, and of the functions that they call.

    Args:
      graph: A `GraphDef`.
      constants: Whether constants count.
      seeds: Whether the seeds of random numbers count.
    """

    def __init__(self, graph: Any, *, constants: bool, seeds: bool):
        self._functions = {f.signature.name: f for f in graph.library.function}
        self._bodies: dict[str, str] = {}
        self._constants, self._seeds = constants, seeds

    def of(self, nodes: Any, ends: list[str], known: Mapping[str, str]) -> str:
        """The fingerprint of some tensors, and of all nodes that run for them.

        Args:
          nodes: `NodeDef`s in the order of creation.
          ends: The tensors; with a `^`, nodes that run for their side effects.
          known: Fingerprints of arguments by name.
        """
        inputs = {node.name: self._inputs(node) for node in nodes if node.name not in known}
        by_name = {node.name: node for node in nodes}
        reached = _in_order(inputs, map(node_of, ends))
        shares = _states(node for node in nodes if node.name in reached)
        found = dict(known)
        for name in reached:
            found[name] = self._node(by_name[name], inputs[name], found, shares.get(name, ""))
        return of_parts(*_texts(ends, found), "all", *sorted(map(found.__getitem__, reached)))

    def _inputs(self, node: Any) -> list[str]:
        """The inputs that count."""
        most = _MESSAGES.get(node.op)
        if not self._seeds:
            most = _SEEDED.get(node.op, most)
        return list(node.input) if most is None else list(node.input)[:most]

    def _node(self, node: Any, inputs: list[str], found: Mapping[str, str], state: Any) -> str:
        if node.op == "Const" and not self._constants:
            return of_parts(node.op, node.attr["dtype"].type)
        op = self._body(node.op) if node.op in self._functions else node.op
        attributes = []
        for name in sorted(node.attr):
            seed = name in ("seed", "seed2") and not self._seeds
            if not (seed or name.startswith("_") or name in _NO_NUMBERS):
                attributes += [name, self._attribute(node.attr[name])]
        return of_parts(op, *attributes, state, "inputs", *_texts(inputs, found))

    def _attribute(self, value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "func":
            return self._body(value.func.name)
        if kind == "list" and value.list.func:
            return of_parts(*(self._body(one.name) for one in value.list.func))
        return _written(value)

    def _body(self, name: str) -> str:
        """The fingerprint of a function."""
        if name not in self._bodies:
            function = self._functions[name]
            signature = function.signature
            known = {
                argument.name: of_parts("argument", number)
                for number, argument in enumerate(signature.input_arg)
            }
            ends = [function.ret[result.name] for result in signature.output_arg]
            ends += [f"^{node}" for node in function.control_ret.values()]
            self._bodies[name] = self.of(function.node_def, ends, known)
        return self._bodies[name]


def _in_order(inputs: Mapping[str, list[str]], ends: Iterable[str]) -> dict[str, None]:
    """The nodes that `ends` depend on, each after its inputs, except within a cycle."""
    done: dict[str, None] = {}
    begun: set[str] = set()
    stack = list(ends)
    while stack:
        name = stack[-1]
        ahead = [] if name in done else [node_of(one) for one in inputs.get(name, ())]
        ahead = [one for one in ahead if one in inputs and one not in done and one not in begun]
        begun.add(name)
        if ahead:
            stack.extend(ahead)
            continue
        if name in inputs:
            done[name] = None
        stack.pop()
    return done


def _states(nodes: Iterable[Any]) -> dict[str, int]:
    """Numbers resources that nodes share by name, such as variables, in the order of creation."""
    numbers: dict[tuple[str, bytes], int] = {}
    return {
        node.name: numbers.setdefault(
            (node.op, node.attr["shared_name"].s or node.name.encode()), len(numbers)
        )
        for node in nodes
        if "shared_name" in node.attr
    }


def _texts(tensors: Iterable[str], found: Mapping[str, str]) -> list[str]:
    """Fingerprints of tensors in their order, and of control inputs, whose order does not matter."""
    data, control = [], []
    for tensor in tensors:
        text = found.get(node_of(tensor), "a cycle")
        if tensor.startswith("^"):
            control.append(text)
        else:
            _, _, output = tensor.partition(":")
            data.append(f"{text}:{output or 0}")
    return [*data, "^", *sorted(control)]
