"""Clients whose optimizer resumes where it stopped in their last round."""

from collections import OrderedDict

import tensorflow as tf

from aggregators.core.rule import Rule, named_rule
from aggregators.core.stateful_client import Context, StatefulClient, Trained
from aggregators.core.types import OptimizerState, State, Structure, Tensors, Weights
from aggregators.rules.client_sum import with_client


@named_rule
def kept_optimizer(rule: Rule | None = None) -> Rule:
    """Any rule, with clients that keep their optimizer's state (momentum, moments, steps).

    In TFF a client's optimizer starts afresh in every round. Hyperparameters in the state are not kept,
    but stay those of the process. A client without data, or whose update or state is not finite, keeps
    its old state.

    Args:
      rule: The rule that aggregates the deltas; `plain_mean()` if None.

    Returns:
      A `Rule` for `build_fed_avg`.

    Raises:
      TypeError: If `rule` is no rule.
      ValueError: If `rule` has a stateful client of its own.

    Example:
      >>> kept_optimizer().needs.stateful_client is not None
      True
    """

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

    return with_client(rule, StatefulClient(initial_state, finish, start=start))
