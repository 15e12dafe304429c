"""Clients whose optimizer goes on where it stopped in their last round."""

from collections import OrderedDict

import attrs
import tensorflow as tf

from aggregators.core.rule import Rule, named_rule
from aggregators.core.stateful_client import Context, StatefulClient, Trained
from aggregators.core.types import OptimizerState, State, Structure, Tensors, Weights
from aggregators.rules.client_sum import check_base
from aggregators.rules.plain_mean import plain_mean


@named_rule
def kept_optimizer(rule: Rule | None = None) -> Rule:
    """Any rule, with clients that keep their optimizer's state (momentum, moments, steps).

    In TFF a client's optimizer starts afresh in every round. Hyperparameters in the state are not kept:
    they stay those of the process. A client whose update or state is not finite, or that trained on
    nothing, keeps what it had.

    Args:
      rule: The rule that aggregates the deltas; `plain_mean()` if None.

    Returns:
      A `Rule` for `build_fed_avg`.

    Raises:
      TypeError: If `rule` is no rule.
      ValueError: If `rule` has clients keep something already.

    Example:
      >>> kept_optimizer().needs.stateful_client is not None
      True
    """
    base = plain_mean() if rule is None else rule
    check_base(base)

    def initial_state(
        weights: Weights, optimizer_state: OptimizerState
    ) -> OrderedDict[str, Structure]:
        del weights
        tensors = tuple(tf.convert_to_tensor(x) for x in tf.nest.flatten(optimizer_state))
        return OrderedDict(optimizer=tensors)

    def start(optimizer_state: OptimizerState, context: Context) -> OptimizerState:
        return tf.nest.pack_sequence_as(optimizer_state, list(context.state["optimizer"]))

    def finish(context: Context, done: Trained) -> tuple[State, Tensors]:
        return initial_state(context.weights, done.optimizer_state), ()

    client = StatefulClient(initial_state, finish, start=start)
    return attrs.evolve(base, needs=attrs.evolve(base.needs, stateful_client=client))
