"""One aggregation as three plain functions: on each client, over clients, on the server."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow_federated as tff

from aggregators.reduction import Reduction, federated_reduction, of_lifted


class ScoredUpdate(NamedTuple):
    """What a client sends when it has measured more than its update.

    Attributes:
      delta: The update: the weights it started from minus those it trained.
      scores: float32 of shape `[num_layers]`: how far each layer moved, by some score.
      loss: float32: mean loss per example, where and how the client work says.
      steps: int32: optimizer steps taken.
      non_finite: bool: whether the update was not finite, and was sent as zeros.
    """

    delta: Any
    scores: Any
    loss: Any
    steps: Any
    non_finite: Any


def build_one_pass_process(
    value_type: Any,
    weight_type: Any,
    *,
    initial_state: Callable[[], Any],
    client_part: Callable[[Any, Any, Any], Any],
    reduction: Reduction,
    server_part: Callable[[Any, Any], tuple[Any, Any, Any]],
) -> tff.templates.AggregationProcess:
    """Builds a weighted aggregation process that reads its clients once.

    `<S@SERVER, {V}@CLIENTS, {W}@CLIENTS> -> <S@SERVER, R@SERVER, M@SERVER>` with one broadcast of
    the state, one computation per client, one `federated_aggregate` and one computation on the
    server: TFF's costs are per client and intrinsic, so there are no more of them.

    Args:
      value_type: TFF type `V` of a client's value.
      weight_type: TFF type `W` of a client's weight.
      initial_state: Function of nothing that returns the state, constant tensors.
      client_part: `(value, weight, state) -> part`, run on each client.
      reduction: Reduces the parts; has a `lift`, which runs on the clients too.
      server_part: `(state, reduced) -> (new state, result, measurements)`.

    Returns:
      A `tff.templates.AggregationProcess`.
    """
    # The lambda is for callables that TFF takes for a type, such as a class.
    initial = tff.tensorflow.computation(lambda: initial_state())
    state_type = initial.type_signature.result

    @tff.tensorflow.computation(value_type, weight_type, state_type)
    def on_client(value: Any, weight: Any, state: Any) -> Any:
        return reduction.lift(client_part(value, weight, state))  # type: ignore[misc]

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_eval(initial, tff.SERVER)

    @tff.federated_computation(
        tff.FederatedType(state_type, tff.SERVER),
        tff.FederatedType(value_type, tff.CLIENTS),
        tff.FederatedType(weight_type, tff.CLIENTS),
    )
    def next_fn(state: Any, value: Any, weight: Any) -> Any:
        parts = tff.federated_map(on_client, (value, weight, tff.federated_broadcast(state)))
        reduced = federated_reduction(parts, of_lifted(reduction))
        on_server = tff.tensorflow.computation(
            server_part, [state_type, reduced.type_signature.member]
        )
        new_state, result, measured = tff.federated_map(on_server, (state, reduced))
        return tff.templates.MeasuredProcessOutput(new_state, result, measured)

    return tff.templates.AggregationProcess(initialize, next_fn)
