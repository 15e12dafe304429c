"""Five rules, some clients bad: python examples/compare_fairness.py [ROUNDS [SEEDS [DIRECTORY]]]."""

import sys
from collections import OrderedDict

import matplotlib.pyplot as plt
import numpy as np
import sklearn.datasets
import tensorflow as tf
import tensorflow_federated as tff

from aggregators import build_fed_avg, rules, scores, weighting
from tff_optim.simulation import PerClient, plots, run, splits

X, Y = sklearn.datasets.load_digits(return_X_y=True)
RULES = {
    "FedAvg": rules.plain_mean(),
    "KL, near": rules.adaptive_mean(scores.kl_divergence, weighting.softmax()),
    "loss, near": rules.adaptive_mean("loss", weighting.softmax()),
    "redescending": rules.redescending_mean(),
    "jury": rules.jury_mean(),
}


def clients(seed, held_out=False, bad=4):
    """20 clients of few digits each, the first ones with random labels; or what each holds out."""
    train, test = splits.dirichlet(Y, 20, 0.3, seed=seed, least=10).hold_out(0.2)
    labels, wrong = Y.copy(), np.concatenate(train.indices[:bad])
    labels[wrong] = np.random.default_rng(seed).integers(0, 10, len(wrong))
    return (test if held_out else train).datasets({"x": np.float32(X / 16), "y": labels}, 16)


def main(rounds="30", seeds="3", directory="output/fairness"):
    """Trains, prints two tables, draws a figure, and returns the history."""
    layer = {"units": 10, "activation": "softmax", "kernel_initializer": "zeros"}
    model = tff.learning.models.functional_model_from_keras(
        lambda: tf.keras.Sequential([tf.keras.layers.Dense(**layer, input_shape=(64,))]),
        tf.keras.losses.SparseCategoricalCrossentropy(),
        OrderedDict(x=tf.TensorSpec([None, 64]), y=tf.TensorSpec([None], tf.int64)),
        lambda: OrderedDict(accuracy=tf.keras.metrics.SparseCategoricalAccuracy()),
    )
    sgd = tff.learning.optimizers.build_sgdm(0.3)
    processes = {n: build_fed_avg(model, sgd, rule=rule) for n, rule in RULES.items()}
    options = {"seed": range(int(seeds)), "directory": directory}
    test = tff.learning.algorithms.build_fed_eval(model)
    options["per_client"] = PerClient(test, lambda seed: clients(seed, held_out=True))
    history = run(processes, clients, rounds=int(rounds), clients_per_round=8, **options)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, axes in zip(("mean", "lowest_decile"), panels):
        metric = f"evaluation/clients/accuracy/{number}"
        print(metric, history.summary(metric, target=0.5).to_markdown(), sep="\n")
        plots.learning_curves(history, metric, target=0.5, axes=axes)
    plots.panel_letters(panels, ["All clients", "The worst tenth of clients"])
    plots.save(figure, f"{directory}/fairness")
    return history


if __name__ == "__main__":
    main(*sys.argv[1:])
