"""The rounds as a jax programmer writes them for small dense models: `vmap` over the clients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tasks import CLIENT_RATE, SERVER_RATES, main


def loss(weights, x, y):
    for kernel, bias in zip(weights[::2], weights[1::2]):
        x = jax.nn.relu(x) if kernel is not weights[0] else x
        x = x @ kernel + bias
    return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()


def trained(weights, batches):
    """How far one client goes, and on how many examples."""

    def step(local, batch):
        gradients = jax.grad(loss)(local, *batch)
        return [w - CLIENT_RATE * g for w, g in zip(local, gradients, strict=True)], None

    local, _ = jax.lax.scan(step, weights, batches)
    return [before - after for before, after in zip(weights, local, strict=True)]


def simulate(task, clients, start, server, rounds, round_done):
    # All clients have as many batches of as many examples.
    x, y = (
        jnp.stack([np.reshape(part, [task.batches, task.rows, *part.shape[1:]]) for part in parts])
        for parts in zip(*clients)
    )
    optimizer = {"adam": optax.adam, "sgd": optax.sgd}[server](SERVER_RATES[server])

    @jax.jit
    def one_round(weights, state):
        updates = jax.vmap(trained, in_axes=(None, 0))(weights, (x, y))
        step, state = optimizer.update([update.mean(0) for update in updates], state)
        return optax.apply_updates(weights, step), state

    weights = [jnp.asarray(weight) for weight in start]
    state = optimizer.init(weights)
    for _ in range(rounds):
        weights, state = jax.block_until_ready(one_round(weights, state))
        round_done()
    return [np.asarray(weight) for weight in weights]


if __name__ == "__main__":
    main("jax by hand", jax.__version__, simulate, tasks="ALK")
