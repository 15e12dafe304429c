"""SCAFFOLD, FedDyn, FedProx and FedAvg on digits whose clients differ much, over several seeds.

Each client has few digits (Dirichlet 0.1), trains for long, and seldom takes part: what drags plain
averaging away from the optimum. Draws the test accuracy of each, the mean over seeds with the
range that they span, and prints the accuracy late in training.

    python examples/drifting_clients.py --rounds 60 --output output/drifting_clients.png
"""

import argparse
import collections
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow as tf
import tensorflow_federated as tff
from train_digits import split_by_dirichlet

import tff_optim
from aggregators import ClientStates, build_fed_avg, build_scaffold, rules

UNIFORM = tff.learning.ClientWeighting.UNIFORM
SPEC = collections.OrderedDict(
    x=tf.TensorSpec((None, 64), tf.float32), y=tf.TensorSpec((None,), tf.int32)
)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each algorithm")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of training")
    parser.add_argument("--clients", type=int, default=20, help="clients that share the data")
    parser.add_argument("--clients-per-round", type=int, default=5, help="clients in each round")
    parser.add_argument("--epochs", type=int, default=5, help="passes over a client's data a round")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of clients")
    parser.add_argument("--output", type=pathlib.Path, default="output/drifting_clients.png")
    return parser.parse_args()


def model() -> tff.learning.models.FunctionalModel:
    """A small classifier that starts at the same weights every time."""
    return tff.learning.models.functional_model_from_keras(
        lambda: tf.keras.Sequential(
            [
                tf.keras.layers.Dense(
                    32,
                    activation="relu",
                    input_shape=(64,),
                    kernel_initializer=tf.keras.initializers.GlorotUniform(1),
                ),
                tf.keras.layers.Dense(
                    10, kernel_initializer=tf.keras.initializers.GlorotUniform(2)
                ),
            ]
        ),
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        SPEC,
    )


def processes(options: argparse.Namespace) -> dict[str, tff.learning.templates.LearningProcess]:
    """The four algorithms, each built once for all seeds."""
    sgd = tff.learning.optimizers.build_sgdm(options.rate)
    prox = tff_optim.build_optimizer(
        options.rate, regularizers=[tff_optim.regularizers.FedProx(0.1)]
    )
    dyn = rules.fed_dyn(options.clients, 0.1)
    return {
        "FedAvg": build_fed_avg(model(), sgd, client_weighting=UNIFORM),
        "FedProx": build_fed_avg(model(), prox, client_weighting=UNIFORM),
        "SCAFFOLD": build_scaffold(model(), sgd, num_clients=options.clients),
        "FedDyn": build_fed_avg(model(), sgd, rule=dyn, client_weighting=UNIFORM),
    }


def make_data(options: argparse.Namespace, seed: int):
    """One seed's clients, cohorts, and test set."""
    digits = sklearn.datasets.load_digits()
    train_x, test_x, train_y, test_y = sklearn.model_selection.train_test_split(
        np.float32(digits.data / 16), np.int32(digits.target), test_size=0.25, random_state=seed
    )
    rng = np.random.default_rng(seed)
    clients = []
    for part in split_by_dirichlet(train_y, options.clients, 0.1, rng):
        rows = rng.permutation(part)
        data = collections.OrderedDict(x=train_x[rows], y=train_y[rows])
        clients.append(tf.data.Dataset.from_tensor_slices(data).repeat(options.epochs).batch(16))
    chosen = [
        rng.choice(options.clients, options.clients_per_round, replace=False)
        for _ in range(options.rounds)
    ]
    return clients, chosen, test_x, test_y


def accuracy(weights, x, y) -> float:
    """Accuracy of a model, in NumPy."""
    hidden, hidden_bias, last, last_bias = weights.trainable
    outputs = np.maximum(x @ hidden + hidden_bias, 0) @ last + last_bias
    return float(np.mean(outputs.argmax(1) == y))


def train(process, options: argparse.Namespace, seed: int, keeps: bool) -> list[float]:
    """Trains once; returns the test accuracy after each round."""
    clients, cohorts, test_x, test_y = make_data(options, seed)
    state, curve = process.initialize(), []
    with ClientStates([str(k) for k in range(options.clients)]) as states:
        for chosen in cohorts:
            data = [clients[k] for k in chosen]
            if keeps:
                with states.cohort([str(k) for k in chosen], data) as cohort:
                    state = process.next(state, cohort).state
            else:
                state = process.next(state, data).state
            curve.append(accuracy(process.get_model_weights(state), test_x, test_y))
    return curve


def main() -> None:
    """Trains all, prints a line for each, and draws the picture."""
    options = parse_arguments()
    late = max(options.rounds // 4, 1)
    print(f"Test accuracy over the last {late} rounds, over seeds:")
    print(f"{'algorithm':10} {'mean':>6} {'least':>6} {'most':>6}")
    for name, process in processes(options).items():
        keeps = name in ("SCAFFOLD", "FedDyn")
        with tff_optim.ResidentProcess(process, device="CPU:0") as resident:
            curves = np.array(
                [train(resident, options, seed, keeps) for seed in range(options.seeds)]
            )
        ends = curves[:, -late:].mean(1)
        print(f"{name:10} {ends.mean():6.3f} {ends.min():6.3f} {ends.max():6.3f}", flush=True)
        rounds = np.arange(1, options.rounds + 1)
        (line,) = plt.plot(rounds, curves.mean(0), label=name)
        plt.fill_between(
            rounds, curves.min(0), curves.max(0), alpha=0.15, color=line.get_color(), linewidth=0
        )
    plt.xlabel("round")
    plt.ylabel("test accuracy")
    plt.title(f"Digits, Dirichlet 0.1, mean and range of {options.seeds} seeds")
    plt.legend()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(options.output, dpi=120)
    tff.test.set_no_default_context()


if __name__ == "__main__":
    main()
