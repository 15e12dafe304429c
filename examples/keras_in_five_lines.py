"""Any Keras optimizer on clients and server, whose rate changes between rounds.

python examples/keras_in_five_lines.py [ROUNDS]
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import build_keras_optimizer


def model_fn() -> tff.learning.models.VariableModel:
    """Linear regression on three numbers."""
    return tff.learning.models.from_keras_model(
        tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(3,))]),
        loss=tf.keras.losses.MeanSquaredError(),
        input_spec=(tf.TensorSpec([None, 3]), tf.TensorSpec([None, 1])),
    )


def make_clients(count: int = 8) -> dict[str, tf.data.Dataset]:
    """Clients of one truth, the first of which has it upside down."""
    rng, clients = np.random.default_rng(0), {}
    for k in range(count):
        x = np.float32(rng.normal(size=(32, 3)))
        y = x @ np.float32([[1], [-2], [0.5]]) * (-1 if k == 0 else 1)
        clients[f"client {k}"] = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    return clients


def main(rounds: str = "10"):
    """Trains, halves the server's rate half way, and returns the losses."""
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn,
        client_optimizer_fn=build_keras_optimizer(tf.keras.optimizers.SGD(0.05, momentum=0.9)),
        server_optimizer_fn=build_keras_optimizer(tf.keras.optimizers.AdamW(0.2)),
    )
    state, clients, losses = process.initialize(), list(make_clients().values()), []
    for number in range(int(rounds)):
        if number == int(rounds) // 2:
            hparams = process.get_hparams(state)
            rate = hparams["finalizer"]["learning_rate"]
            hparams["finalizer"]["learning_rate"] = np.float32(rate * 0.5)  # TFF takes no float64
            state = process.set_hparams(state, hparams)
        state, metrics = process.next(state, clients)
        losses.append(float(metrics["client_work"]["train"]["loss"]))
        print(f"round {number + 1}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
