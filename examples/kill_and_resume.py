"""A run that is killed goes on, from its last checkpoint: kill it, and call it again.

python examples/kill_and_resume.py [ROUNDS [DIRECTORY]]
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import tff_optim
from tff_optim import simulation


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


def main(rounds: str = "100", directory: str = "output/resumed"):
    """Trains up to a number of rounds, from where the last call came to; returns the history."""
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn,
        tff_optim.build_keras_optimizer(tf.keras.optimizers.SGD(0.05)),
        tff_optim.build_keras_optimizer(tf.keras.optimizers.Adam(0.05)),
    )
    with tff_optim.ResidentProcess(process) as resident:
        history = simulation.run(
            resident,
            make_clients(),
            rounds=int(rounds),
            clients_per_round=4,
            directory=directory,
            rounds_per_checkpoint=1,  # cheap: variables become a file
            stop=simulation.no_better("client_work/train/loss", rounds=20),
        )
        print(history.ended, history.rounds[-3:], sep="\n")
        weights = resident.get_model_weights(history.state)
    return history, weights


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
