"""A round as MapReduce: TFF's own form of it, compiled for values that stay in the worker.

TFF's executor turns a value into a message and back wherever it is broadcast or aggregated: 0.15 s
for 40 MB. In MapReduce form a round is a handful of TensorFlow computations without placements,
which are called on handles: nothing but the clients' data goes in, and nothing but the metrics
comes out.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import attrs
import tensorflow_federated as tff

from tff_optim.resident.in_worker import handover


@attrs.frozen(eq=False)
class MapReduceRound:
    """`next` of a process, cut at its broadcast and at its aggregation.

    Attributes:
        prepare: `S -> C`, what the clients are sent.
        zero: `( -> A)`, the aggregate of no clients.
        work: `<D, C> -> U`, a client's work on its data.
        accumulate: `<A, U> -> A`, an aggregate with one more update.
        merge: `<A, A> -> A`.
        settle: `A -> A`, the same value without a trace of where it comes from.
        finish: `<S, A> -> <S, M>`.
        context: What moves `C`.
        aggregate: What moves `A`.
    """

    prepare: Any
    zero: Any
    work: Any
    accumulate: Any
    merge: Any
    settle: Any
    finish: Any
    context: handover.Carrier
    aggregate: handover.Carrier


def build_map_reduce_round(next_computation: Any) -> MapReduceRound:
    """Cuts a process's `next` at its broadcast and at its aggregation.

    Raises:
        ValueError: One aggregation depends on the result of another, or the process has no
            MapReduce form.
    """
    chain = dependent_aggregations(next_computation)
    if chain is not None:
        raise ValueError(
            "`clients_per_step` and more than one worker need a process whose aggregations do not "
            f"depend on each other, but {chain[1]} depends on the result of {chain[0]}. Use one "
            "worker without `clients_per_step`, or a one-pass aggregation rule."
        )
    try:
        form = tff.backends.mapreduce.get_map_reduce_form_for_computation(next_computation)
    except (
        TypeError,
        ValueError,
        tff.backends.mapreduce.compiler.MapReduceFormCompilationError,
    ) as e:
        raise ValueError(
            "`clients_per_step` and more than one worker need a process that TFF can split at its "
            f"aggregation, and it cannot split this one: {e}"
        ) from e
    if any(len(inputs) for inputs in list(form.work.type_signature.result)[1:]):
        raise ValueError(
            "`clients_per_step` and more than one worker need a process without secure sums, which "
            "TFF's worker cannot take. Simulate with the aggregator that is made secure."
        )
    state_type, _ = form.update.type_signature.parameter
    data_type, context_type = form.work.type_signature.parameter
    aggregate_type = form.zero.type_signature.result

    @tff.federated_computation(data_type, context_type)
    def work(data: Any, context: Any) -> Any:
        return form.work(data, context)[0]  # the other outputs would be the inputs of secure sums

    @tff.federated_computation(aggregate_type)
    def settle(aggregate: Any) -> Any:
        return [aggregate[i] for i in range(len(aggregate_type))]

    @tff.federated_computation(state_type, aggregate_type)
    def finish(state: Any, aggregate: Any) -> Any:
        return form.update(state, [form.report(aggregate), [], [], []])

    return MapReduceRound(
        prepare=handover.compile_native(form.prepare),
        zero=handover.compile_native(form.zero),
        work=handover.compile_native(work),
        accumulate=handover.compile_native(form.accumulate),
        merge=handover.compile_native(form.merge),
        settle=handover.compile_native(settle),
        finish=handover.compile_native(finish),
        context=handover.build_carrier(context_type),
        aggregate=handover.build_carrier(aggregate_type),
    )


@functools.lru_cache
def add_clients(work_type: tff.Type, accumulate_type: tff.Type, num_clients: int) -> Any:
    """Builds `<A, [D, D, ...], C, (<D, C> -> U), (<A, U> -> A)> -> A`.

    It adds the work of some clients to an aggregate, in their order, in one call: the worker runs
    them side by side, and Python has little to do for each.
    """
    data_type, context_type = work_type.parameter
    aggregate_type = accumulate_type.result

    @tff.federated_computation(
        aggregate_type, [data_type] * num_clients, context_type, work_type, accumulate_type
    )
    def add(aggregate: Any, cohort: Any, context: Any, work: Any, accumulate: Any) -> Any:
        for i in range(num_clients):
            aggregate = accumulate(aggregate, work(cohort[i], context))
        return aggregate

    return add


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


def split(client_data: Sequence[Any], num_workers: int) -> list[Sequence[Any]]:
    """Deals a cohort out to workers in equal shares, in order.

    Returns:
        One share for each worker that has any client; one empty share of no clients.
    """
    used = max(min(num_workers, len(client_data)), 1)
    bounds = [len(client_data) * i // used for i in range(used + 1)]
    return [client_data[a:b] for a, b in itertools.pairwise(bounds)]
