"""A process cut into TensorFlow computations: TFF's own MapReduce form of its rounds.

TFF's executor turns a value into a message and back wherever it is broadcast or aggregated: 0.15 s
for 40 MB. In MapReduce form a round is a handful of TensorFlow computations without placements. In
a worker they are called on handles; in the Python process they are functions. Nothing but the
clients' data goes in, and nothing but the metrics comes out.
"""

import os
import weakref
from typing import Any

import attrs
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident import leaves
from tff_optim.resident.graphs.first_values import without_unread

_SECURE = "federated_secure_"
_BYTES_AT_ONCE = 16 << 20


class NoMapReduceFormError(ValueError):
    """A process whose rounds cannot be split into clients' parts that are added up."""


@attrs.frozen(eq=False)
class RoundParts:
    """`next` of a process, cut at its broadcast and at its aggregation.

    `S` is the server's state, `C` what the clients are sent, `D` a client's data, `U` what it
    returns, `A` an aggregate, `R` the result of the aggregation, `M` the metrics.

    Attributes:
      prepare: `S -> C`.
      zero: `( -> A)`, the aggregate of no clients.
      work: `<D, C> -> <U, ...>`, a client's work on its data; the rest is empty.
      accumulate: `<A, U> -> A`, an aggregate with one more update.
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


def clients_at_once(context_type: tff.Type, least: int, most: int) -> int:
    """Chooses how many clients a place runs at once.

    Args:
      context_type: What a client is sent, and about what it returns.
      least: How many to a processor core, however large that is.
      most: How many of a small one: they share what has to be done for each step, and the wait for
        its slowest client. No bound below what `least` asks for.
    """
    least *= os.cpu_count() or 1
    fitting = _BYTES_AT_ONCE // max(leaves.num_bytes(context_type), 1)
    return min(max(fitting, least), max(most, least))


def no_grappler() -> tf.compat.v1.ConfigProto:
    """Leaves graphs as they are.

    TFF's default looks for memory to save by computing values twice; in the gradient of a ResNet
    it makes a graph with two nodes of one name, on which TensorFlow aborts the process. What is
    worth optimising is optimised where the graph runs.
    """
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    return config


def cut(next_computation: Any) -> RoundParts:
    """Cuts a process's `next` at its broadcast and at its aggregation.

    It takes seconds, and is done once for each.

    Raises:
      NoMapReduceFormError: One aggregation depends on the result of another, or the process has
        no MapReduce form.
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
            raise NoMapReduceFormError(
                f"{_NEEDED} whose aggregations do not depend on each other, but {chain[1]} depends "
                f"on the result of {chain[0]}. Use one worker and none of these arguments, or a "
                "one-pass aggregation rule."
            ) from error
        raise NoMapReduceFormError(
            f"{_NEEDED} that TFF can split at its aggregation, and it cannot split this one: {error}"
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


_NEEDED = "`device`, `server_device`, `clients_per_step` and more than one worker need a process"


def check_no_secure_sum(next_computation: Any) -> None:
    """Raises where a process adds up under encryption, which nothing here can run."""
    proto = tff.framework.serialize_computation(next_computation)
    if _SECURE.encode() not in proto.SerializeToString():
        return  # which takes a twentieth of the time of looking at its parts
    found: list[str] = []

    def look(part: Any) -> tuple[Any, bool]:
        if isinstance(part, tff.framework.Intrinsic) and part.uri.startswith(_SECURE):
            found.append(part.uri)
        return part, False

    tff.framework.transform_postorder(next_computation.to_building_block(), look)
    if found:
        raise ValueError(
            "`process` must be without secure sums, which TFF's worker cannot take; found "
            f"`{found[0]}`. Simulate with the aggregator that is made secure."
        )


def _is_aggregation(block: Any) -> bool:
    """Whether a call takes values from the clients to the server."""
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
