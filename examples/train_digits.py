"""Trains a classifier of handwritten digits on clients that differ, some of them with random labels.

Plain federated averaging weighs clients by their number of examples. KL weighting trusts clients
whose layers moved little. The redescending mean shrinks updates that are much too long. The jury mean
goes from there towards the mean of clients with a low training loss, as far as clients' votes on it
say. Which one helps depends on the data: try --concentration and --random-labels.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import matplotlib

matplotlib.use("Agg")  # draws into a file, with or without a screen

import matplotlib.pyplot as plt
import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow as tf
import tensorflow_federated as tff
import tqdm

import aggregators
import tff_optim
from aggregators import rules
from tff_optim.interrupts import let_workers_end

CLASSES = 10
PIXELS = 64


def at_least(least: float, kind: type):
    """An argument type: a whole number of at least `least`, or another number above it."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not np.isfinite(value) or value < least or (kind is float and value == least):
            bound = "above" if kind is float else "at least"
            raise argparse.ArgumentTypeError(f"must be {bound} {least:g}; found {text}")
        return value

    return parse


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line; a bad value ends the program with a message and exit code 2."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--clients", type=at_least(20, int), default=20, help="clients that share the data")
    add("--clients-per-round", type=at_least(1, int), default=10, help="clients in each round")
    add("--random-labels", type=at_least(0, int), default=8, help="clients with random labels")
    add(
        "--concentration",
        type=at_least(0, float),
        default=1.0,
        help="of the Dirichlet split: the smaller, the fewer digits a client has",
    )
    add("--rounds", type=at_least(1, int), default=40, help="rounds of training")
    add("--epochs", type=at_least(1, int), default=2, help="passes over a client's data in a round")
    add("--client-rate", type=at_least(0, float), default=0.1, help="learning rate of SGD")
    add("--server-rate", type=at_least(0, float), default=0.01, help="learning rate of Adam")
    add(
        "--temperature",
        type=at_least(0, float),
        default=1.0,
        help="of KL weighting: the smaller, the more weights differ",
    )
    add("--target", type=at_least(0, float), default=0.85, help="test accuracy to reach")
    add("--seed", type=at_least(0, int), default=0, help="of the split, the labels and the cohorts")
    add(
        "--resident",
        action="store_true",
        help="leave the server's state in the worker: the same numbers, faster for large models",
    )
    add(
        "--output", type=pathlib.Path, default=pathlib.Path("output/digits.png"), help="the picture"
    )
    parsed = parser.parse_args(arguments)
    for name in ("clients_per_round", "random_labels"):
        found = getattr(parsed, name)
        if found > parsed.clients:
            option = "--" + name.replace("_", "-")
            parser.error(
                f"argument {option}: must be at most --clients, {parsed.clients}; found {found}"
            )
    if parsed.target >= 1:
        parser.error(f"argument --target: must be below 1; found {parsed.target:g}")
    return parsed


def split_by_dirichlet(labels: np.ndarray, clients: int, concentration: float, rng) -> list:
    """Deals each digit's examples to clients in shares drawn from a Dirichlet distribution.

    Every client gets at least one example.
    """
    parts: list[list[int]] = [[] for _ in range(clients)]
    for digit in range(CLASSES):
        examples = rng.permutation(np.flatnonzero(labels == digit))
        shares = rng.dirichlet(np.full(clients, concentration))
        cuts = (np.cumsum(shares)[:-1] * len(examples)).astype(int)
        for part, chunk in zip(parts, np.split(examples, cuts)):
            part.extend(chunk)
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return parts


def make_data(options: argparse.Namespace):
    """The clients' data sets, and the images and labels of the test set."""
    rng = np.random.default_rng(options.seed)
    digits = sklearn.datasets.load_digits()
    images = (digits.data / 16.0).astype("float32")
    labels = digits.target.astype("int32")
    train_x, test_x, train_y, test_y = sklearn.model_selection.train_test_split(
        images, labels, test_size=0.25, random_state=options.seed, stratify=labels
    )
    parts = split_by_dirichlet(train_y, options.clients, options.concentration, rng)
    confused = set(rng.choice(options.clients, options.random_labels, replace=False))
    # TensorFlow would look for a faster form of every client's pipeline in every round, which
    # takes longer than these short ones run.
    as_they_are = tf.data.Options()
    as_they_are.autotune.enabled = False
    as_they_are.experimental_optimization.apply_default_optimizations = False
    clients = []
    for client, part in enumerate(parts):
        x, y = train_x[part], train_y[part]
        if client in confused:
            y = rng.integers(0, CLASSES, len(y)).astype("int32")
        data = tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=x, y=y))
        clients.append(data.repeat(options.epochs).batch(16).with_options(as_they_are))
    return clients, test_x, test_y


def make_keras_model() -> tf.keras.Model:
    """A small classifier that starts at the same weights every time."""
    return tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer((PIXELS,)),
            tf.keras.layers.Dense(
                32, "relu", kernel_initializer=tf.keras.initializers.GlorotUniform(seed=1)
            ),
            tf.keras.layers.Dense(
                CLASSES, kernel_initializer=tf.keras.initializers.GlorotUniform(seed=2)
            ),
        ]
    )


def build_processes(
    options: argparse.Namespace,
) -> dict[str, tff.learning.templates.LearningProcess]:
    """Federated averaging by four rules, with Keras optimizers on both sides."""

    def model_fn():
        return tff.learning.models.from_keras_model(
            make_keras_model(),
            loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            input_spec=collections.OrderedDict(
                x=tf.TensorSpec((None, PIXELS), tf.float32), y=tf.TensorSpec((None,), tf.int32)
            ),
        )

    client = tff_optim.build_keras_optimizer(tf.keras.optimizers.SGD(options.client_rate))
    server = tff_optim.build_keras_optimizer(tf.keras.optimizers.Adam(options.server_rate))
    return {
        # TFF's default, a reduction of the dataset, takes twice as long for a model as small as this.
        "FedAvg": tff.learning.algorithms.build_weighted_fed_avg(
            model_fn,
            client,
            server,
            loop_implementation=tff.learning.LoopImplementation.DATASET_ITERATOR,
        ),
        "KL, near": aggregators.build_fed_kl(
            model_fn, client, server, temperature=options.temperature
        ),
        "redescending": aggregators.build_fed_avg(
            model_fn, client, server, rule=rules.redescending_mean()
        ),
        "jury": aggregators.build_fed_avg(model_fn, client, server, rule=rules.jury_mean()),
    }


def train(name, process, options, clients, test_x, test_y):
    """Returns the test accuracy after every round, and the seconds of every round but the first."""
    rng = np.random.default_rng(options.seed)  # every rule sees the same cohorts
    model = make_keras_model()
    state = process.initialize()
    accuracies, seconds = [], []
    bar = tqdm.tqdm(range(options.rounds), desc=f"{name:12}", unit="round")
    for _ in bar:
        cohort = rng.choice(options.clients, options.clients_per_round, replace=False)
        start = time.perf_counter()
        state = process.next(state, [clients[i] for i in cohort]).state
        seconds.append(time.perf_counter() - start)
        process.get_model_weights(state).assign_weights_to(model)
        accuracies.append(float(np.mean(np.argmax(model(test_x), axis=1) == test_y)))
        bar.set_postfix(accuracy=f"{accuracies[-1]:.3f}")
    return accuracies, seconds[1:] or seconds


def rounds_to(accuracies: list[float], target: float) -> str:
    """The first round with this test accuracy, in words for the table."""
    reached = [i for i, accuracy in enumerate(accuracies, 1) if accuracy >= target]
    return str(reached[0]) if reached else "never"


def draw(curves: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Draws the test accuracy of every rule over the rounds into a file."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, accuracies in curves.items():
        axes.plot(range(1, len(accuracies) + 1), accuracies, marker=".", label=name)
    axes.axhline(options.target, color="gray", linestyle=":", label=f"target {options.target:g}")
    axes.set(
        xlabel="round",
        ylabel="test accuracy",
        ylim=(0, 1),
        title=(
            f"{options.clients} clients, {options.random_labels} of them with random labels, "
            f"Dirichlet({options.concentration:g})"
        ),
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Trains with every rule, prints the table and draws the curves."""
    options = parse_arguments(arguments)
    let_workers_end()  # also in the background of a script
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        clients, test_x, test_y = make_data(options)
        curves, lines = {}, []
        for name, process in build_processes(options).items():
            with contextlib.ExitStack() as stack:
                if options.resident:
                    process = stack.enter_context(tff_optim.ResidentProcess(process))
                accuracies, seconds = train(name, process, options, clients, test_x, test_y)
            curves[name] = accuracies
            last = np.mean(accuracies[-5:])
            reached = rounds_to(accuracies, options.target)
            lines.append(f"{name:12}  {last:13.3f}  {reached:>13}  {np.median(seconds):17.2f}")
        print(f"\n{'rule':12}  test accuracy  rounds to {options.target:.0%}  seconds per round")
        print("\n".join(lines))
        print("Test accuracy is the mean of the last five rounds.")
        draw(curves, options)
        print(f"Curves: {options.output}")
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker process
    return 0


if __name__ == "__main__":
    sys.exit(main())
