"""The parts of a round, compiled for values that stay in TFF's workers."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import attrs
import tensorflow_federated as tff

from tff_optim.resident import parts as parts_lib
from tff_optim.resident.clients.in_workers import handover


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


def compile_round(parts: parts_lib.RoundParts) -> MapReduceRound:
    """Compiles the parts of a round for TFF's worker."""
    state_type, _ = parts.update.type_signature.parameter
    data_type, context_type = parts.work.type_signature.parameter
    aggregate_type = parts.aggregate_type

    @tff.federated_computation(data_type, context_type)
    def work(data: Any, context: Any) -> Any:
        return parts.work(data, context)[0]  # the other outputs would be the inputs of secure sums

    @tff.federated_computation(aggregate_type)
    def settle(aggregate: Any) -> Any:
        return [aggregate[i] for i in range(len(aggregate_type))]

    @tff.federated_computation(state_type, aggregate_type)
    def finish(state: Any, aggregate: Any) -> Any:
        return parts.update(state, [parts.report(aggregate), [], [], []])

    return MapReduceRound(
        prepare=handover.compile_native(parts.prepare),
        zero=handover.compile_native(parts.zero),
        work=handover.compile_native(work),
        accumulate=handover.compile_native(parts.accumulate),
        merge=handover.compile_native(parts.merge),
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


def split(client_data: Sequence[Any], num_workers: int) -> list[Sequence[Any]]:
    """Deals a cohort out to workers in equal shares, in order.

    Returns:
      One share for each worker that has any client; one empty share of no clients.
    """
    used = max(min(num_workers, len(client_data)), 1)
    bounds = [len(client_data) * i // used for i in range(used + 1)]
    return [client_data[a:b] for a, b in itertools.pairwise(bounds)]
