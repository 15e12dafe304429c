"""Pipelines as in declearn: FedProx, clipping, momentum on clients; Adam, constraints on the server.

    python examples/fed_prox_pipeline.py [ROUNDS]

The pull of FedProx is a hyperparameter: it grows in the middle of the run. The pipelines are written as
JSON and read back.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import tff_optim
from tff_optim import projections, regularizers, transforms


def model_fn() -> tff.learning.models.VariableModel:
    """Linear regression on three numbers."""
    return tff.learning.models.from_keras_model(
        tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(3,))]),
        loss=tf.keras.losses.MeanSquaredError(),
        input_spec=(tf.TensorSpec([None, 3]), tf.TensorSpec([None, 1])),
    )


def make_clients(count: int = 8) -> list[tf.data.Dataset]:
    """Clients that differ: each has a truth of its own around 1, -2, 0.5."""
    rng, clients = np.random.default_rng(0), []
    for _ in range(count):
        x = np.float32(rng.normal(size=(32, 3)))
        y = x @ np.float32(np.array([[1], [-2], [0.5]]) + rng.normal(size=(3, 1)))
        clients.append(tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat(5))
    return clients


def pipelines():
    """The clients' and the server's."""
    on_clients = tff_optim.build_optimizer(
        learning_rate=0.05,
        regularizers=[regularizers.FedProx(alpha=0.1), tf.keras.regularizers.L2(1e-3)],
        transforms=[transforms.ClipByGlobalNorm(max_norm=5.0), transforms.Momentum(beta=0.5)],
    )
    on_server = tff_optim.build_optimizer(
        learning_rate=0.2,
        transforms=[transforms.Adam()],
        weight_decay=1e-3,
        projection=[
            # Of the kernel: no number below -1. Of all: none beyond 3.
            projections.Projection(
                lambda kernel: tf.maximum(kernel, -1.0),
                where=lambda path, spec: spec.shape.rank == 2,
            ),
            projections.Box(-3.0, 3.0),
        ],
    )
    return on_clients, on_server


def main(rounds: str = "20"):
    """Trains; returns how far clients moved in each round, and the final weights."""
    on_clients, on_server = pipelines()
    assert tff_optim.from_config(tff_optim.get_config(on_clients)) == on_clients
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn,
        client_optimizer_fn=on_clients,
        server_optimizer_fn=on_server,
        model_aggregator=tff.learning.add_debug_measurements(tff.aggregators.MeanFactory()),
    )
    state, clients, moved = process.initialize(), make_clients(), []
    for number in range(int(rounds)):
        if number == int(rounds) // 2:
            hparams = process.get_hparams(state)
            hparams["client_work"]["FedProx.alpha"] = np.float32(5.0)
            state = process.set_hparams(state, hparams)
        state, metrics = process.next(state, clients)
        moved.append(float(metrics["aggregator"]["average_client_norm"]))
        loss = metrics["client_work"]["train"]["loss"]
        print(f"round {number + 1}: loss {loss:.4f}, clients moved by {moved[-1]:.3f} on average")
    kernel, bias = process.get_model_weights(state).trainable
    print("kernel:", kernel.ravel().round(2), "bias:", bias.round(2))
    return moved, (kernel, bias)


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
