"""TFF's computations as TensorFlow functions in the Python process.

A `tff.tensorflow.computation` is a serialized graph with the names of the tensors to feed and to fetch,
and an operation that initialises the graph's variables. TFF's worker runs it in a session, in which each
call starts from fresh variables. Here the graph becomes the body of a function, in which each call has
variables, lookup tables and iterators of its own, so calls may run concurrently.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.core import tracing
from tff_optim.core.devices import device_scope
from tff_optim.resident import leaves, parts
from tff_optim.resident.graphs import loops
from tff_optim.resident.graphs.nodes import ancestors, node_of, tensor_names, unpack
from tff_optim.resident.graphs.resources import own_in_every_call

_names = itertools.count()
# TensorFlow's name for variables without a name (`ResourceHandle::ANONYMOUS_NAME`).
_NO_NAME = "cd2c89b7-88b7-44c8-ad83-06c2a9158347"
# A function that a graph calls several times is optimised once, and not again at each call.
_UNCHANGED = parts.no_grappler().SerializeToString()


class ImportedComputation:
    """`T -> U` as a function of flat lists of tensors, for Python and for other functions.

    Sequences are passed as the variants of their data sets. Called from Python, it runs unoptimised,
    since TensorFlow's optimiser takes longer than one call gains.

    Args:
      computation: A computation without placements.
      device: The device of operations that the computation itself does not place.
      apart: Whether it is not inlined into the functions that call it, and optimised by itself.

    Raises:
      ValueError: If the computation has a resource that calls cannot have for themselves.
    """

    def __init__(self, computation: Any, device: str, apart: bool = False):
        parameter_type = computation.type_signature.parameter
        self.parameter = [] if parameter_type is None else leaves.leaves_of(parameter_type)
        self.result = leaves.leaves_of(computation.type_signature.result)
        self.device = device
        proto = tensorflow_proto(computation)
        graph = unpack(proto)
        inputs = list(tensor_names(proto.parameter)) if parameter_type is not None else []
        outputs = list(tensor_names(proto.result))
        self._variables, function_graph = _as_function_body(
            graph, inputs, outputs, proto.initialize_op
        )
        parameter = [spec_of(leaf) for leaf in self.parameter]
        handles = [tf.TensorSpec([], tf.resource)] * len(self._variables)
        names = [*inputs, *(f"{node.name}:0" for node in self._variables)]
        mentioned = _mentioned(function_graph)

        def body(*arguments: Any) -> list[Any]:
            with device_scope(device):
                given = dict(zip(names, arguments, strict=True))
                used = {name: given[name] for name in mentioned & given.keys()}
                missing = [name for name in outputs if name not in given]
                found = tf.graph_util.import_graph_def(
                    function_graph, used, [*missing] or None, name=""
                )
                produced = dict(zip(missing, found or (), strict=True))
                return [
                    tf.identity(given[name]) if name in given else produced[name]
                    for name in outputs
                ]

        self._function = tf.compat.v1.wrap_function(body, [*parameter, *handles])
        if apart:
            self._function = _kept_out(self._function, self.make_variables, parameter)
        self._apart = apart

    def make_variables(self) -> list[tf.Tensor]:
        """Makes the handles of one call's variables, which are anonymous and end with the call."""
        with device_scope(self.device):
            return [
                tf.raw_ops.VarHandleOp(
                    dtype=node.attr["dtype"].type,
                    shape=tf.TensorShape(node.attr["shape"].shape),
                    shared_name=_NO_NAME,
                )
                for node in self._variables
            ]

    def __call__(
        self, arguments: Sequence[Any], variables: Sequence[tf.Tensor] | None = None
    ) -> list[Any]:
        """Calls it on the leaves of a `T`; returns those of a `U`.

        Args:
          arguments: The leaves.
          variables: The result of `make_variables` if XLA, which cannot make any, compiles the call.
        """
        if not self.result:
            return []
        with device_scope(self.device):
            given = [tf.convert_to_tensor(x) for x in arguments]
            if not self._apart:
                given += self.make_variables() if variables is None else variables
            if not (self._apart or tf.executing_eagerly()):
                return self._function(*given)
            return call_as_it_is(self._function, given, [spec_of(leaf) for leaf in self.result])


def call_as_it_is(function: Any, arguments: Sequence[Any], specs: Sequence[Any]) -> list[Any]:
    """Calls a concrete function without optimising it at the call.

    Args:
      function: The function.
      arguments: Its flat arguments.
      specs: The specs of its results.
    """
    # A `StatefulPartitionedCall` would wait for the one before it, though calls share nothing.
    results = tf.raw_ops.PartitionedCall(
        args=arguments, Tout=[spec.dtype for spec in specs], f=function, config_proto=_UNCHANGED
    )
    for result, spec in zip(results, specs, strict=True):
        result.set_shape(spec.shape)
    return list(results)


def _kept_out(function: Any, make_variables: Callable[[], Any], parameter: Any) -> Any:
    """Keeps a function from being inlined, after which Grappler would optimise it again."""

    def call(*arguments: Any) -> list[Any]:
        return function(*arguments, *make_variables())

    return tracing.function(
        call,
        input_signature=parameter,
        autograph=False,
        experimental_attributes={"_noinline": True},
    ).get_concrete_function()


def spec_of(leaf: leaves.Leaf) -> tf.TensorSpec:
    """The spec of a leaf as an argument of a function."""
    if leaf.is_tensor:
        return tf.TensorSpec(leaf.shape, leaf.dtype)
    return tf.TensorSpec([], tf.variant)


def tensorflow_proto(computation: Any) -> Any:
    """The `tensorflow` part of a serialized computation; several graphs are merged into one."""
    proto = tff.framework.serialize_computation(computation)
    if proto.WhichOneof("computation") != "tensorflow":
        block = tff.backends.mapreduce.consolidate_and_extract_local_processing(
            computation.to_building_block(), parts.no_grappler()
        )
        proto = block.proto
    return proto.tensorflow


def _canonical(tensor: str) -> str:
    return tensor if ":" in tensor or tensor.startswith("^") else f"{tensor}:0"


def _mentioned(graph: tf.compat.v1.GraphDef) -> set[str]:
    return {_canonical(tensor) for node in graph.node for tensor in node.input}


def _as_function_body(
    graph: tf.compat.v1.GraphDef,
    inputs: Sequence[str],
    outputs: Sequence[str],
    initializer: str,
) -> tuple[list[Any], tf.compat.v1.GraphDef]:
    """Turns a session's graph into the body of a function.

    Returns:
      The nodes of the variables, and the graph without them and without the inputs. Nodes that use a
      variable or a table wait for the initialisation, as a session's second call would.
    """
    nodes = {node.name: node for node in graph.node}
    first = ancestors(nodes, [initializer])
    needed = first | ancestors(nodes, map(node_of, outputs))
    variables = [nodes[name] for name in sorted(needed) if nodes[name].op == "VarHandleOp"]
    given = {node_of(name) for name in inputs} | {node.name for node in variables}
    result = tf.compat.v1.GraphDef(versions=graph.versions)
    result.node.extend(n for n in graph.node if n.name in needed and n.name not in given)
    result.library.CopyFrom(graph.library)
    resources = own_in_every_call(variables, result)
    for node in result.node:
        if "_class" in node.attr:
            del node.attr["_class"]  # a node placed with a variable follows its handle anyway
        kept = [t for t in node.input if not (t.startswith("^") and node_of(t) in given)]
        uses = any(node_of(tensor) in resources for tensor in kept)
        if initializer and uses and node.name not in first:
            kept.append(f"^{initializer}")
        del node.input[:]
        node.input.extend(kept)
    loops.read_in_one_go(result)
    _rename_functions(result)
    return variables, result


def _rename_functions(graph: tf.compat.v1.GraphDef) -> None:
    """Gives the functions of a graph names that no other graph has."""
    number = next(_names)
    library = graph.library
    renamed = {f.signature.name: f"{f.signature.name}_imported_{number}" for f in library.function}
    for function in graph.library.function:
        function.signature.name = renamed[function.signature.name]
    for gradient in graph.library.gradient:
        gradient.function_name = renamed.get(gradient.function_name, gradient.function_name)
        gradient.gradient_func = renamed.get(gradient.gradient_func, gradient.gradient_func)
    bodies = [function.node_def for function in graph.library.function]
    for node in itertools.chain(graph.node, *bodies):
        node.op = renamed.get(node.op, node.op)
        for function in loops.functions_of(node):
            function.name = renamed.get(function.name, function.name)
