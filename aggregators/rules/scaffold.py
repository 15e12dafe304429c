"""SCAFFOLD: clients whose gradients are corrected by control variates."""

from collections import OrderedDict
from typing import Literal

import attrs
import tensorflow as tf

from aggregators.core import checks
from aggregators.core.rule import Rule, named_rule
from aggregators.core.stateful_client import Context, Correction, StatefulClient, Trained
from aggregators.core.types import OptimizerState, State, Structure, Tensors, Weights
from aggregators.rules.client_sum import add_sum, check_base
from aggregators.rules.plain_mean import plain_mean

Option = Literal["I", "II"]


@named_rule
def scaffold(num_clients: int, *, option: Option = "II", rule: Rule | None = None) -> Rule:
    """Control variates around any rule: `g - c_k + c` in every step of a client.

    ```
    client k, each step   g <- g - c_k + c
    option II             c_k' = mean over its steps of g, before the correction
    option I              c_k' = gradient of its mean loss at the server's model
    server                c' = c + 1/N sum over this round's clients of (c_k' - c_k)
    ```

    `c_k` belongs to client `k` and `c` to the server, both in the shapes of the trainable weights and
    zero at first. `N` is the number of all clients there are. With SGD, option II is the paper's
    `c_k - c + (w - w_k)/(steps * rate)`, number for number. As a mean of gradients it also holds for
    other client optimizers (momentum, Adam, schedules), which are given the corrected gradient. Option I
    costs one more pass over the client's data.

    The update is what `rule` makes of the clients' deltas. The process settles where `c`, the plain mean
    over all clients' gradients, is zero: at the optimum of the mean over clients, not over examples,
    whatever the weights of the rule.

    A client whose update or variate is not finite, or that trained on nothing, counts for nothing and
    keeps its variate. One pass over clients. Server: one more tensor per weight, sent with the model;
    clients: one more tensor per weight kept (`ClientStates`), and one sent.

    Args:
      num_clients: `N`, at least 1: as many as `ClientStates` is for, else clients refuse to train.
      option: `"I"` or `"II"`.
      rule: The rule that aggregates the deltas; `plain_mean()` if None.

    Returns:
      A `Rule` for `build_fed_avg`; see `build_scaffold`.

    Raises:
      TypeError: If `rule` is no rule.
      ValueError: If an argument is out of its range, or `rule` has clients keep something already.

    Example:
      >>> scaffold(10).needs.names
      ('sent',)

    Source: Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML
    2020, Algorithm 1.
    """
    num_clients = checks.whole("num_clients", num_clients, 1)
    checks.word("option", option, "I", "II")
    base = plain_mean() if rule is None else rule
    check_base(base)

    def initial_state(
        weights: Weights, optimizer_state: OptimizerState
    ) -> OrderedDict[str, Structure]:
        del optimizer_state  # the variate has the shapes of the weights
        return OrderedDict(control=tuple(tf.zeros(w.shape, w.dtype) for w in weights))

    def correction(context: Context) -> Correction:
        both = zip(context.shared["control"], context.state["control"], strict=True)
        added = [c - own for c, own in both]
        return lambda gradients, weights: [g + x for g, x in zip(gradients, added, strict=True)]

    def finish(context: Context, done: Trained) -> tuple[State, Tensors]:
        new = tuple(done.mean_gradient if option == "II" else done.initial_gradient)
        sent = tuple(a - b for a, b in zip(new, context.state["control"], strict=True))
        return OrderedDict(control=new), sent

    def end(state: State, total: Tensors, update: Tensors) -> tuple[State, Tensors]:
        control = tuple(
            c + x / tf.cast(num_clients, x.dtype)
            for c, x in zip(state["control"], total, strict=True)
        )
        return OrderedDict(control=control), update

    client = StatefulClient(
        initial_state,
        finish,
        correction,
        mean_gradient=option == "II",
        initial_gradient=option == "I",
        num_clients=num_clients,
    )
    return add_sum(
        attrs.evolve(base, needs=attrs.evolve(base.needs, stateful_client=client)),
        of=lambda update: update.sent,
        start=lambda layers: OrderedDict(control=layers.zeros()),
        end=end,
    )
