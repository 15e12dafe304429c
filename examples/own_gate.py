"""FedMed with a gate of yours: adaptive averaging as far as clients disagree.

    python examples/own_gate.py [ROUNDS]

A gate sees the round's number, loss, and scores, and says how much of the adaptive mean to take. This
one opens in steps from the second round on, and shuts where the loss has risen.
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


def gate(seen):
    """From 0, the plain mean, to 1, the adaptive mean: a quarter more each round, none if it rose."""
    if seen.loss > 1.1 * seen.previous_loss:  # Python's `if` becomes part of the graph
        share = tf.constant(0.0, tf.float64)
    else:
        share = tf.minimum(tf.cast(seen.round, tf.float64) / 4.0, 1.0)
    return share


def main(rounds: str = "8"):
    """Trains, prints how far the gate was open, and returns the history."""
    rule = rules.loss_gated(
        weighting.softmax(0.5), score=scores.js_divergence, layers="model", gate=gate
    )
    process = build_fed_avg(model_fn, tff.learning.optimizers.build_sgdm(0.05), rule=rule)
    history = simulation.run(process, make_clients(), rounds=int(rounds), clients_per_round=6)
    for record in history.rounds:
        print(
            f"round {record['round']}: loss {record['aggregator/loss']:.3f}, share of the adaptive "
            f"mean {record['aggregator/share']:.2f}"
        )
    return history


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
