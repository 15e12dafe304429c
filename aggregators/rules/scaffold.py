"""SCAFFOLD: clients whose gradients are corrected by control variates."""

from collections import OrderedDict
from typing import Literal

import tensorflow as tf

from aggregators.core import checks
from aggregators.core.rule import Rule, named_rule
from aggregators.core.stateful_client import Context, Correction, StatefulClient, Trained
from aggregators.core.types import State, Tensors
from aggregators.rules.client_sum import add_sum, with_client, zeros

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
    zero at first. `N` is the number of all clients. With SGD, option II is the paper's
    `c_k - c + (w - w_k)/(steps * rate)`, number for number. As a mean of gradients it also holds for
    other client optimizers (momentum, Adam, schedules), which get the corrected gradient. Option I
    costs one more pass over the client's data.

    `rule` aggregates the clients' deltas. The process settles where `c`, the plain mean over all
    clients' gradients, is zero: at the optimum of the mean over clients, not over examples, whatever
    the weights of the rule.

    A client without data, or whose update or variate is not finite, does not count and keeps its
    variate. It takes one pass over clients. The server has one more tensor per weight, sent with the
    model. Clients keep one more tensor per weight (`ClientStates`), and send one.

    Args:
      num_clients: `N`, at least 1. Clients of a `ClientStates` with another number refuse to train.
      option: `"I"` or `"II"`.
      rule: The rule that aggregates the deltas; `plain_mean()` if None.

    Returns:
      A `Rule` for `build_fed_avg`; see `build_scaffold`.

    Raises:
      TypeError: If `rule` is no rule.
      ValueError: If an argument is out of range, or `rule` has a stateful client of its own.

    Example:
      >>> scaffold(10).needs.names
      ('sent',)

    Source: Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML
    2020, Algorithm 1.
    """
    num_clients = checks.whole("num_clients", num_clients, 1)
    checks.word("option", option, "I", "II")

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
        zeros("control"),
        finish,
        correction,
        mean_gradient=option == "II",
        initial_gradient=option == "I",
        num_clients=num_clients,
    )
    return add_sum(
        with_client(rule, client),
        of=lambda update: update.sent,
        start=lambda layers: OrderedDict(control=layers.zeros()),
        end=end,
    )
