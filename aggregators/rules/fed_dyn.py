"""FedDyn: clients whose losses are regularized so that their optima agree."""

from collections import OrderedDict

import tensorflow as tf

from aggregators.core import checks
from aggregators.core.hyperparameters import Number, hparam
from aggregators.core.rule import Rule, named_rule
from aggregators.core.stateful_client import Context, Correction, StatefulClient, Trained
from aggregators.core.types import State, Tensors, Weights
from aggregators.rules.client_sum import add_sum, with_client, zeros


@named_rule
def fed_dyn(num_clients: int, alpha: Number = 0.01, *, rule: Rule | None = None) -> Rule:
    """Dynamic regularization around any rule.

    ```
    client k, each step   g <- g - g_k + alpha (w - w_server)
              then        g_k' = g_k + alpha (w_server - w_k)
    server                h' = h + alpha/N sum over this round's clients of (w_server - w_k)
                          w_server <- w_server - (rule(w_server - w_k) + h'/alpha)
    ```

    `g_k` belongs to client `k` and `h` to the server, both zero at first. `N` is the number of all
    clients. (The paper's `h` has the other sign.) If clients train to convergence, `g_k` becomes the
    gradient of client `k`'s loss, and the process settles at the optimum of the mean over clients.
    Clients should therefore train long. The paper averages them uniformly. A server optimizer other
    than SGD with rate 1 is another algorithm.

    A client without data, or whose update is not finite, does not count and keeps its `g_k`. It takes
    one pass over clients. Clients (`ClientStates`) and the server keep states as large as the trainable
    weights.

    Args:
      num_clients: `N`, at least 1.
      alpha: Above 0: a hyperparameter, or a schedule over rounds.
      rule: The rule that aggregates the deltas; `plain_mean()` if None.

    Returns:
      A `Rule` for `build_fed_avg`; use uniform client weighting for the paper's.

    Raises:
      TypeError: If `rule` is no rule.
      ValueError: If an argument is out of range, or `rule` has a stateful client of its own.

    Example:
      >>> list(fed_dyn(10, alpha=0.1).hparams)
      ['alpha']

    Source: Acar et al., Federated Learning Based on Dynamic Regularization, ICLR 2021, Algorithm 1.
    """
    num_clients = checks.whole("num_clients", num_clients, 1)
    number = hparam("alpha", alpha, 0.0, above=True)

    def correction(context: Context) -> Correction:
        def correct(gradients: Tensors, weights: Weights) -> Tensors:
            return [
                g - own + tf.cast(context.shared["alpha"], g.dtype) * (w - start)
                for g, own, w, start in zip(
                    gradients, context.state["gradient"], weights, context.weights, strict=True
                )
            ]

        return correct

    def finish(context: Context, done: Trained) -> tuple[State, Tensors]:
        new = tuple(
            own + tf.cast(context.shared["alpha"], own.dtype) * (start - w)
            for own, start, w in zip(
                context.state["gradient"], context.weights, done.weights, strict=True
            )
        )
        return OrderedDict(gradient=new), ()

    def end(state: State, total: Tensors, update: Tensors) -> tuple[State, Tensors]:
        def of(x: tf.Tensor) -> tf.Tensor:
            return tf.cast(state["alpha"], x.dtype)

        drift = tuple(
            h + of(x) * x / tf.cast(num_clients, x.dtype)
            for h, x in zip(state["drift"], total, strict=True)
        )
        moved = tuple(u + h / of(h) for u, h in zip(update, drift, strict=True))
        return OrderedDict(drift=drift), moved

    client = StatefulClient(zeros("gradient"), finish, correction, num_clients=num_clients)
    return add_sum(
        with_client(rule, client),
        of=lambda update: update.delta,
        start=lambda layers: OrderedDict(drift=layers.zeros()),
        end=end,
        hparams=OrderedDict(alpha=number),
    )
