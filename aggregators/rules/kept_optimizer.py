"""Clients whose optimizer goes on where it stopped in their last round."""

from collections import OrderedDict
from typing import Any

import attrs
import tensorflow as tf

from aggregators.core.client_memory import ClientMemory, Context, Trained
from aggregators.core.rule import Rule, named_rule
from aggregators.rules.client_sum import check_base
from aggregators.rules.plain_mean import plain_mean


@named_rule
def kept_optimizer(rule: Rule | None = None) -> Rule:
    """Any rule, with clients that keep their optimizer's state (momentum, moments, steps).

    TFF makes that state anew for every round. Hyperparameters among it are not kept: they stay those
    of the process. A client whose update or state is not finite, or that trained on nothing,
    keeps what it had.

    Args:
      rule: What is made of the deltas; `plain_mean()` if None.

    Returns:
      A `Rule` for `build_fed_avg`.

    Raises:
      TypeError: If `rule` is no rule.
      ValueError: If `rule` has clients keep something already.

    Example:
      >>> kept_optimizer().needs.memory is not None
      True
    """
    base = plain_mean() if rule is None else rule
    check_base(base)

    def initial_state(weights: Any, optimizer_state: Any) -> OrderedDict[str, Any]:
        del weights
        tensors = tuple(tf.convert_to_tensor(x) for x in tf.nest.flatten(optimizer_state))
        return OrderedDict(optimizer=tensors)

    def start(optimizer_state: Any, context: Context) -> Any:
        return tf.nest.pack_sequence_as(optimizer_state, list(context.state["optimizer"]))

    def finish(context: Context, done: Trained) -> Any:
        return initial_state(context.weights, done.optimizer_state), ()

    memory = ClientMemory(initial_state, finish, start=start)
    return attrs.evolve(base, needs=attrs.evolve(base.needs, memory=memory))
