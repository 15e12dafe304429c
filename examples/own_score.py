"""A score of yours: how far the direction of a layer is from the server's, as a sign test.

python examples/own_score.py [ROUNDS]
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from aggregators import build_fed_avg, rules, scores, weighting
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


@scores.score(needs="model")
def turned(server, client):
    """The share of a layer's numbers that have another sign than at the server."""
    signs = [tf.cast(tf.sign(s) * tf.sign(c) < 0, tf.float32) for s, c in zip(server, client)]
    return tf.reduce_mean(tf.concat([tf.reshape(sign, [-1]) for sign in signs], 0))


def main(rounds: str = "10"):
    """Trains, prints what a round showed of its clients, and returns the history."""
    rule = rules.adaptive_mean(turned, weighting.softmax(0.2, scale=1.0))
    sgd = tff.learning.optimizers.build_sgdm(0.05)
    process = build_fed_avg(model_fn, sgd, rule=rule, sample_size=8)
    history = simulation.run(process, make_clients(), rounds=int(rounds), clients_per_round=8)
    last = history.clients.where(round=int(rounds))
    for name in [column for column in last.columns if "/weights" in column]:
        print(name, dict(zip(last["client"].tolist(), last[name].round(3).tolist())))
    return history


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
