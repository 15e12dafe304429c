"""A process cut into TensorFlow computations: TFF's own MapReduce form of its rounds.

TFF's executor serializes every value that it broadcasts or aggregates, which takes 0.15 s for 40 MB. In
MapReduce form a round is a handful of TensorFlow computations without placements. They run as functions
in the Python process, or on values in a worker.
"""

import weakref
from typing import Any

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident.graphs.first_values import without_unread

_SECURE = "federated_secure_"


@attrs.frozen(eq=False)
class RoundParts:
    """`next` of a process, cut at its broadcast and at its aggregation.

    `S` is the server's state, `C` the clients' context (the values that the server broadcasts), `D` a
    client's data, `U` its update, `A` an aggregate, `R` the result of the aggregation, `M` the metrics.

    Attributes:
      prepare: `S -> C`.
      zero: `( -> A)`, the aggregate of no clients.
      work: `<D, C> -> <U, ...>`, a client's work on its data; the rest is empty.
      accumulate: `<A, U> -> A`, which adds an update.
      merge: `<A, A> -> A`.
      report: `A -> R`.
      update: `<S, <R, ...>> -> <S, M>`; the rest is empty.
    """

    prepare: Any
    zero: Any
    work: Any
    accumulate: Any
    merge: Any
    report: Any
    update: Any

    @property
    def context_type(self) -> tff.Type:
        """`C`."""
        return self.work.type_signature.parameter[1]

    @property
    def aggregate_type(self) -> tff.Type:
        """`A`."""
        return self.zero.type_signature.result


def no_grappler() -> tf.compat.v1.ConfigProto:
    """Leaves graphs as they are.

    TFF's default saves memory by computing values twice. For the gradient of a ResNet it makes a graph
    with two nodes of one name, on which TensorFlow aborts the process. Graphs are optimised where they
    run anyway.
    """
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    return config


def compile_native(computation: Any) -> Any:
    """Compiles a computation without aggregations as plain TFF does, for its worker.

    The worker optimises nothing by itself. This applies the Grappler passes of plain TFF except for the
    one of `no_grappler`.
    """
    config = tf.compat.v1.ConfigProto()
    options = config.graph_options.rewrite_options
    options.memory_optimization = options.NO_MEM_OPT
    options.constant_folding = options.AGGRESSIVE
    options.arithmetic_optimization = options.AGGRESSIVE
    options.loop_optimization = options.AGGRESSIVE
    options.function_optimization = options.AGGRESSIVE
    return tff.backends.native.transform_to_native_form(computation, grappler_config=config)


def cut(next_computation: Any) -> RoundParts:
    """Cuts a process's `next` at its broadcast and at its aggregation.

    This takes seconds, so results are cached.

    Raises:
      ValueError: If one aggregation depends on the result of another, or the process has no
        MapReduce form.
    """
    if next_computation not in _cuts:
        _cuts[next_computation] = _cut(next_computation)
    return _cuts[next_computation]


_cuts: weakref.WeakKeyDictionary[Any, RoundParts] = weakref.WeakKeyDictionary()


def _cut(next_computation: Any) -> RoundParts:
    try:
        form = tff.backends.mapreduce.get_map_reduce_form_for_computation(
            next_computation, grappler_config=no_grappler()
        )
    except (
        TypeError,
        ValueError,
        tff.backends.mapreduce.compiler.MapReduceFormCompilationError,
    ) as error:
        chain = dependent_aggregations(next_computation)
        if chain is not None:
            raise ValueError(
                "`process` must be one whose aggregations do not depend on each other; found "
                f"{chain[1]}, which depends on the result of {chain[0]}. Use a one-pass aggregation "
                "rule, or run it in plain TFF."
            ) from error
        raise ValueError(
            "`process` must be one that TFF can split at its broadcast and its aggregation; found "
            f"that it cannot: {error}"
        ) from error
    return RoundParts(
        prepare=form.prepare,
        zero=form.zero,
        work=without_unread(form.work),
        accumulate=form.accumulate,
        merge=form.merge,
        report=form.report,
        update=form.update,
    )


def check_no_secure_sum(next_computation: Any) -> None:
    """Raises if a process has secure sums, which nothing here can run."""
    proto = tff.framework.serialize_computation(next_computation)
    if _SECURE.encode() not in proto.SerializeToString():
        return  # twenty times as fast as the search below
    found: list[str] = []

    def look(part: Any) -> tuple[Any, bool]:
        if isinstance(part, tff.framework.Intrinsic) and part.uri.startswith(_SECURE):
            found.append(part.uri)
        return part, False

    tff.framework.transform_postorder(next_computation.to_building_block(), look)
    if found:
        raise ValueError(
            "`process` must be without secure sums, which need clients of their own; found "
            f"`{found[0]}`. Simulate with the aggregator that is made secure."
        )


def _is_aggregation(block: Any) -> bool:
    """Whether a call aggregates values from clients to the server."""
    if not isinstance(block, tff.framework.Call):
        return False
    function = block.function
    return (
        isinstance(function, tff.framework.Intrinsic)
        and isinstance(block.type_signature, tff.FederatedType)
        and block.type_signature.placement is tff.SERVER
        and _mentions_clients(function.type_signature.parameter)
    )


def _mentions_clients(type_spec: Any) -> bool:
    if isinstance(type_spec, tff.FederatedType):
        return type_spec.placement is tff.CLIENTS
    if isinstance(type_spec, tff.StructType):
        return any(_mentions_clients(element) for element in type_spec)
    return False


def dependent_aggregations(next_computation: Any) -> tuple[str, str] | None:
    """Names two aggregations of which the second depends on the first, or returns None."""
    # In call-dominant form every call is a local of one block, in the order of evaluation.
    dominant = tff.framework.to_call_dominant(next_computation.to_building_block())
    block = dominant.result if isinstance(dominant, tff.framework.Lambda) else dominant
    if not isinstance(block, tff.framework.Block):
        return None
    after: dict[str, str] = {}  # local -> the aggregation that its value depends on
    for name, value in block.locals:
        source = next((after[ref] for ref in _references(value) if ref in after), None)
        if _is_aggregation(value):
            label = f"`{value.function.uri}` of {value.type_signature.compact_representation()}"
            if source is not None:
                return source, label
            source = label
        if source is not None:
            after[name] = source
    return None


def _references(block: Any) -> list[str]:
    names: list[str] = []

    def look(part: Any) -> tuple[Any, bool]:
        if isinstance(part, tff.framework.Reference):
            names.append(part.name)
        return part, False

    tff.framework.transform_postorder(block, look)
    return names
