"""optax' Lamb on the server, unmodified, with a rate that falls over rounds.

    python examples/lamb_on_server.py [ROUNDS]

Lamb scales the step of each layer by the layer's own norm: a layer of small weights takes small steps.
optax is in the locked set (extra `optax`).
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import optax
import sklearn.datasets
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import ResidentProcess, build_optax_optimizer, simulation


def build_keras_model() -> tf.keras.Model:
    """A small classifier of 8 by 8 pixels."""
    hidden = tf.keras.layers.Dense(32, "relu", input_shape=(64,))
    return tf.keras.Sequential([hidden, tf.keras.layers.Dense(10)])


def model_fn() -> tff.learning.models.VariableModel:
    """The same for TFF."""
    return tff.learning.models.from_keras_model(
        build_keras_model(),
        loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        input_spec=(tf.TensorSpec([None, 64]), tf.TensorSpec([None], tf.int32)),
    )


def main(rounds: str = "40"):
    """Trains on digits, prints the test accuracy, and returns the history."""
    digits = sklearn.datasets.load_digits()
    x, y = np.float32(digits.data / 16), np.int32(digits.target)
    clients = [
        tf.data.Dataset.from_tensor_slices((x[part], y[part])).batch(16)
        for part in np.array_split(np.arange(len(y) - 300), 20)
    ]
    # The factory and its arguments, not `optax.lamb(0.02)`: so that its numbers are hyperparameters.
    lamb = build_optax_optimizer(
        optax.lamb,
        learning_rate=optax.cosine_decay_schedule(
            0.05, decay_steps=int(rounds)
        ),  # steps are rounds
        weight_decay=0.01,
    )
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, tff.learning.optimizers.build_sgdm(0.1), lamb
    )
    print("hyperparameters:", dict(process.get_hparams(process.initialize())["finalizer"]))
    model = build_keras_model()

    def evaluate(weights):
        weights.assign_weights_to(model)
        return {"accuracy": np.mean(np.argmax(model(x[-300:]), axis=1) == y[-300:])}

    with ResidentProcess(process, device="CPU:0") as resident:
        history = simulation.run(
            resident, clients, rounds=int(rounds), clients_per_round=8, evaluate=evaluate
        )
    for record in history.rounds[:: max(int(rounds) // 8, 1)]:
        print(f"round {record['round']}: test accuracy {record['evaluation/accuracy']:.3f}")
    return history


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
