"""One process on several workers, here and elsewhere, against plain TFF.

    python examples/several_workers.py [ROUNDS]

The cohort is split over the workers, a few clients at a time; what they send is merged. Numbers equal
those of plain TFF to rounding, since sums are taken in another order.
"""

import contextlib
import os
import socket
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from tff_optim import ResidentProcess, build_keras_optimizer
from tff_optim.resident import worker_binary


def model_fn() -> tff.learning.models.VariableModel:
    """Linear regression on three numbers."""
    dense = tf.keras.layers.Dense(1, input_shape=(3,), kernel_initializer="zeros")
    return tff.learning.models.from_keras_model(
        tf.keras.Sequential([dense]),
        loss=tf.keras.losses.MeanSquaredError(),
        input_spec=(tf.TensorSpec([None, 3]), tf.TensorSpec([None, 1])),
    )


def make_clients(count: int = 8) -> list[tf.data.Dataset]:
    """Clients of one truth, the first of which has it upside down."""
    rng, clients = np.random.default_rng(0), []
    for k in range(count):
        x = np.float32(rng.normal(size=(32, 3)))
        y = x @ np.float32([[1], [-2], [0.5]]) * (-1 if k == 0 else 1)
        clients.append(tf.data.Dataset.from_tensor_slices((x, y)).batch(8))
    return clients


@contextlib.contextmanager
def worker_elsewhere():
    """Starts TFF's worker by hand, as on another host of a private network."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    worker = subprocess.Popen([worker_binary(), f"--port={port}"])
    try:
        yield f"localhost:{port}"
    finally:
        worker.kill()
        worker.wait()


def train(process, rounds: int) -> np.ndarray:
    """Trains and returns the weights of the model."""
    state, clients = process.initialize(), make_clients()
    for _ in range(rounds):
        state = process.next(state, clients).state
    weights = process.get_model_weights(state).trainable
    return np.concatenate([np.ravel(np.asarray(w)) for w in weights])


def main(rounds: str = "5"):
    """Trains in each place; returns the weights by place."""
    process = aggregators.build_fed_kl(
        model_fn,
        build_keras_optimizer(tf.keras.optimizers.SGD(0.05)),
        build_keras_optimizer(tf.keras.optimizers.Adam(0.1)),
    )
    weights = {"plain TFF": train(process, int(rounds))}
    with ResidentProcess(process, workers=2, clients_at_once=2) as resident:
        weights["two workers"] = train(resident, int(rounds))
    with worker_elsewhere() as address, ResidentProcess(process, workers=[address]) as resident:
        weights[f"the worker at {address}"] = train(resident, int(rounds))
    for place, values in weights.items():
        print(f"{place}: {values.round(4)}")
    return weights


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
