"""Compares rules over several seeds on clients that differ: curves, scores and weights in a picture.

    python examples/compare_rules.py [ROUNDS [SEEDS [DIRECTORY]]]

The directory keeps checkpoints, CSV files and curves for TensorBoard: call it again to go on.
"""

import collections
import sys

import matplotlib.pyplot as plt
import numpy as np
import sklearn.datasets
import tensorflow as tf
import tensorflow_federated as tff

from aggregators import build_fed_avg, rules, scores, weighting
from tff_optim import build_keras_optimizer, simulation

RULES = {
    "FedAvg": rules.plain_mean(),
    "KL, near": rules.adaptive_mean(scores.kl_divergence, weighting.softmax()),
    "jury": rules.jury_mean(),
}


def build_keras_model() -> tf.keras.Model:
    """A small classifier of 8 by 8 pixels."""
    hidden = tf.keras.layers.Dense(32, "relu", input_shape=(64,), name="hidden")
    return tf.keras.Sequential([hidden, tf.keras.layers.Dense(10, name="logits")])


def model_fn() -> tff.learning.models.VariableModel:
    """The same for TFF."""
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    spec = collections.OrderedDict(x=tf.TensorSpec([None, 64]), y=tf.TensorSpec([None], tf.int32))
    return tff.learning.models.from_keras_model(build_keras_model(), loss=loss, input_spec=spec)


def make_data(clients: int = 20, random_labels: int = 4):
    """Clients with few digits each, some with random labels, and the images and labels of a test."""
    rng, digits = np.random.default_rng(0), sklearn.datasets.load_digits()
    images, labels = np.float32(digits.data / 16), np.int32(digits.target)
    order = np.argsort(labels[:-300] + rng.normal(scale=2, size=len(labels) - 300))
    data = {}
    for number, part in enumerate(np.array_split(order, clients)):
        name, y = f"good {number:02d}", labels[part]
        if number < random_labels:
            name, y = f"random {number:02d}", np.int32(rng.integers(0, 10, len(part)))
        columns = collections.OrderedDict(x=images[part], y=y)
        data[name] = tf.data.Dataset.from_tensor_slices(columns).batch(16)
    return data, images[-300:], labels[-300:]


def main(rounds: str = "25", seeds: str = "3", directory: str = "output/compare"):
    """Trains, draws and returns the history."""
    plt.switch_backend("Agg")  # draws into a file, with or without a screen
    clients, images, labels = make_data()
    sgd = build_keras_optimizer(tf.keras.optimizers.SGD(0.1))
    adam = build_keras_optimizer(tf.keras.optimizers.Adam(0.01))
    processes = {
        name: build_fed_avg(model_fn, sgd, adam, rule=rule, sample_size=8)
        for name, rule in RULES.items()
    }
    tf.keras.utils.set_random_seed(0)
    model = build_keras_model()  # after the processes: TFF builds models in graphs

    def evaluate(weights):
        weights.assign_weights_to(model)
        return {"accuracy": float(np.mean(np.argmax(model(images), axis=1) == labels))}

    history = simulation.run(
        processes,
        clients,
        rounds=int(rounds),
        clients_per_round=8,
        seed=list(range(int(seeds))),
        evaluate=evaluate,
        initial_weights=lambda seed: build_keras_model(),  # of all processes
        directory=directory,
    )
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    simulation.plots.learning_curves(history, "evaluation/accuracy", axes=axes[0])
    simulation.plots.score_heatmap(history.only("KL, near", 0), axes=axes[1])
    simulation.plots.client_weights(history.only("jury", 0), axes=axes[2])
    titles = ("Accuracy on 300 test images", "KL, near (seed 0)", "Who counts: jury (seed 0)")
    simulation.plots.panel_letters(axes, titles)
    simulation.plots.save(figure, f"{directory}/compare")
    print(f"Drawn: {directory}/compare.png and .pdf. Curves: tensorboard --logdir {directory}")
    return history


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
