"""Rules around another rule: with a stateful client, and with a sum over clients."""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import attrs
import tensorflow as tf

from aggregators.core import checks
from aggregators.core.hyperparameters import Hparam
from aggregators.core.layers import ModelLayers
from aggregators.core.reduction import Reduction, zip_reductions
from aggregators.core.rule import Rule, RuleResult, check_rule
from aggregators.core.stateful_client import StatefulClient
from aggregators.core.types import OptimizerState, Reduced, State, Structure, Tensors, Weights
from aggregators.core.update import ClientUpdate
from aggregators.rules.plain_mean import plain_mean


def with_client(rule: Rule | None, client: StatefulClient) -> Rule:
    """A rule, `plain_mean()` if None, whose clients keep a state; it must not have one already."""
    base = plain_mean() if rule is None else rule
    check_rule(base)
    if base.needs.stateful_client is not None:
        raise ValueError(
            "`rule` must not have a stateful client of its own; found "
            f"{base.needs.stateful_client!r}. Clients can keep one state."
        )
    return attrs.evolve(base, needs=attrs.evolve(base.needs, stateful_client=client))


def zeros(name: str) -> Callable[[Weights, OptimizerState], State]:
    """A client's initial state: zeros in the shapes of the weights, under this name."""

    def initial_state(weights: Weights, optimizer_state: OptimizerState) -> State:
        del optimizer_state  # the state has the shapes of the weights
        return OrderedDict({name: tuple(tf.zeros(w.shape, w.dtype) for w in weights)})

    return initial_state


def add_sum(
    rule: Rule,
    *,
    of: Callable[[ClientUpdate], Tensors],
    start: Callable[[ModelLayers], State],
    end: Callable[[State, Tensors, Tensors], tuple[State, Tensors]],
    hparams: Mapping[str, Hparam] | None = None,
) -> Rule:
    """Adds a sum over clients to a rule, and a state that the sum changes.

    Args:
      rule: The rule that aggregates the clients' deltas.
      of: The summand of a client that counts: flat tensors in the shapes of the weights.
      start: `layers -> OrderedDict`: the server's initial state besides the rule's own.
      end: `(state, sum, update) -> (that part of the state, update)`, the update flat.
      hparams: Hyperparameters besides the rule's.

    Returns:
      A `Rule`.
    """
    all_hparams = checks.joined("rule", rule.hparams, hparams or {})

    def initial_state(layers: ModelLayers) -> OrderedDict[str, Structure]:
        return checks.joined("rule", rule.initial_state(layers), start(layers))

    def client(update: ClientUpdate, state: State) -> OrderedDict[str, Structure]:
        counts = update.weight > 0
        summed = tuple(tf.where(counts, x, tf.zeros_like(x)) for x in of(update))
        return OrderedDict(rule=rule.client(update, state), sum=summed)

    def reduction(layers: ModelLayers) -> Reduction:
        total = Reduction(
            layers.zeros,
            lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
        )
        return zip_reductions(rule=rule.reduction(layers), sum=total)

    def server(state: State, reduced: Reduced) -> RuleResult:
        result = rule.server(state, reduced["rule"])
        more, update = end(state, reduced["sum"], result.update)
        return result._replace(state=OrderedDict(**result.state, **more), update=update)

    return attrs.evolve(
        rule,
        client=client,
        reduction=reduction,
        server=server,
        initial_state=initial_state,
        hparams=all_hparams,
    )
