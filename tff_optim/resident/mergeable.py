"""A round in pieces: TFF's mergeable form, compiled for values that stay in the worker."""

import itertools
from collections.abc import Sequence
from typing import Any

import attrs
import tensorflow_federated as tff

from tff_optim.resident import handover


@attrs.frozen(eq=False)
class MergeableRound:
    """`next` of a process, cut at its aggregation.

    Attributes:
        up_to_merge: `<S@SERVER, {D*}@CLIENTS> -> A@SERVER`, run on each piece of a cohort.
        merge: `<A@SERVER, A@SERVER> -> A@SERVER`.
        after_merge: `<<S@SERVER, {D*}@CLIENTS>, A@SERVER> -> <S@SERVER, M@SERVER>`; the client
            data that it is given make no difference to its result.
        carrier: What moves `A`.
    """

    up_to_merge: Any
    merge: Any
    after_merge: Any
    carrier: handover.Carrier


def build_mergeable_round(next_computation: Any) -> MergeableRound:
    """Cuts a process's `next` at its aggregation.

    Raises:
        ValueError: One aggregation depends on the result of another, or the process has no
            form that can be merged.
    """
    chain = dependent_aggregations(next_computation)
    if chain is not None:
        raise ValueError(
            "`clients_per_step` and more than one worker need a process whose aggregations do not "
            f"depend on each other, but {chain[1]} depends on the result of {chain[0]}. Use one "
            "worker without `clients_per_step`, or a one-pass aggregation rule."
        )
    try:
        form = tff.backends.native.compile_to_mergeable_comp_form(next_computation)
    except (TypeError, ValueError) as e:
        raise ValueError(
            "`clients_per_step` and more than one worker need a process that TFF can split at its "
            f"aggregation, and it cannot split this one: {e}"
        ) from e
    return MergeableRound(
        up_to_merge=handover.compile_native(form.up_to_merge),
        merge=handover.lift(form.merge, num_arguments=2),
        after_merge=handover.compile_native(form.after_merge),
        carrier=handover.build_carrier(form.up_to_merge.type_signature.result.member),
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


def split(
    client_data: Sequence[Any], clients_per_step: int | None, num_workers: int
) -> list[list[Sequence[Any]]]:
    """Deals a cohort out to workers, and each worker's share into pieces.

    Clients keep their order. Every worker's pieces have `clients_per_step` clients, the last
    one possibly fewer. The first worker has at least one piece, if an empty one.

    Returns:
        One list of pieces for each worker that has any.
    """
    total = len(client_data)
    size = clients_per_step or max(-(-total // num_workers), 1)
    pieces = [client_data[i : i + size] for i in range(0, total, size)] or [client_data]
    used = min(num_workers, len(pieces))
    bounds = [len(pieces) * i // used for i in range(used + 1)]
    return [pieces[a:b] for a, b in itertools.pairwise(bounds)]
