"""The rounds in fedjax: its `federated_averaging` with a haiku model, compiled as it does by default."""

import importlib.metadata

import fedjax
import haiku as hk
import jax
import numpy as np
from fedjax.algorithms import fed_avg
from tasks import CLIENT_RATE, SERVER_RATES, main


def network(name):
    layers = {
        "A": lambda: [hk.Linear(32), jax.nn.relu, hk.Linear(10)],
        "B": lambda: [
            hk.Conv2D(32, 3, padding="VALID"),
            jax.nn.relu,
            hk.Conv2D(64, 3, padding="VALID"),
            jax.nn.relu,
            hk.MaxPool(2, 2, padding="VALID"),
            hk.Flatten(),
            hk.Linear(128),
            jax.nn.relu,
            hk.Linear(62),
        ],
        "C": lambda: [hk.Linear(3000, with_bias=False)],
        "L": lambda: [hk.Linear(10)],
    }
    layers["K"] = layers["A"]
    return hk.transform(lambda batch: hk.Sequential(layers[name]())(batch["x"]))


def simulate(task, clients, start, server, rounds, round_done):
    data = [fedjax.ClientDataset({"x": x, "y": y}) for x, y in clients]
    model = fedjax.create_model_from_haiku(
        network(task.name),
        sample_batch=next(iter(data[0].batch(batch_size=task.rows))),
        train_loss=lambda batch, logits: fedjax.metrics.unreduced_cross_entropy_loss(
            batch["y"], logits
        ),
    )
    algorithm = fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(CLIENT_RATE),
        {"adam": fedjax.optimizers.adam, "sgd": fedjax.optimizers.sgd}[server](
            SERVER_RATES[server]
        ),
        fedjax.ShuffleRepeatBatchHParams(batch_size=task.rows, num_epochs=1, skip_shuffle=True),
    )
    # Haiku's modules are in the order in which they are called, with the kernel `w` before `b`.
    drawn = model.init(jax.random.PRNGKey(0))
    names = [(module, part) for module in drawn for part in ("w", "b") if part in drawn[module]]
    params = {module: {} for module, _ in names}
    for (module, part), weight in zip(names, start, strict=True):
        params[module][part] = weight
    state = algorithm.init(params)
    keys = jax.random.split(jax.random.PRNGKey(0), len(data))
    cohort = [(number, client, keys[number]) for number, client in enumerate(data)]
    for _ in range(rounds):
        state, _ = algorithm.apply(state, cohort)
        jax.block_until_ready(state.params)
        round_done()
    return [np.asarray(state.params[module][part]) for module, part in names]


if __name__ == "__main__":
    main("fedjax", importlib.metadata.version("fedjax"), simulate)
