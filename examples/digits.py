"""What `train_digits.py` and `drifting_clients.py` share: options, digits dealt to clients, a model."""

import argparse
import collections
import pathlib

import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.simulation import plots

IMAGES, LABELS = sklearn.datasets.load_digits(return_X_y=True)
TRAIN_X, TEST_X, TRAIN_Y, TEST_Y = sklearn.model_selection.train_test_split(
    np.float32(IMAGES / 16), np.int32(LABELS), test_size=0.25, random_state=0, stratify=LABELS
)


def parse_arguments(description, options, output, arguments=None) -> argparse.Namespace:
    """Reads options (name, default, least, what it is); a bad value ends the program with a message."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    for name, default, _, text in options:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument("--output", type=pathlib.Path, default=output, help="the picture")
    parsed = parser.parse_args(arguments)
    limits = dict.fromkeys(["clients-per-round", "random-labels"], parsed.clients)
    for name, _, least, _ in options:
        found, most = getattr(parsed, name.replace("-", "_")), limits.get(name, 1000)
        if not least <= found <= most:
            parser.error(f"argument --{name}: must be from {least:g} to {most:g}; found {found}")
    return parsed


def split_by_dirichlet(clients: int, concentration: float, rng) -> list[list[int]]:
    """Deals each digit to clients in Dirichlet shares; each client has one example at least."""
    parts: list[list[int]] = [[] for _ in range(clients)]
    for digit in range(10):
        (examples,) = np.nonzero(digit == TRAIN_Y)
        ends = np.cumsum(rng.dirichlet(np.full(clients, concentration)))
        cuts = (ends[:-1] * len(examples)).astype(int)
        for part, chunk in zip(parts, np.split(rng.permutation(examples), cuts)):
            part.extend(chunk)
    for part in (part for part in parts if not part):
        part.append(max(parts, key=len).pop())
    return parts


def make_clients(options: argparse.Namespace, seed: int) -> dict[str, tf.data.Dataset]:
    """Data by client; the labels of some, called "random", say nothing."""
    rng = np.random.default_rng(seed)
    parts = split_by_dirichlet(options.clients, options.concentration, rng)
    confused = set(rng.choice(options.clients, options.random_labels, replace=False))
    as_they_are = tf.data.Options()  # looking for a faster form would take longer than they run
    as_they_are.autotune.enabled = False
    as_they_are.experimental_optimization.apply_default_optimizations = False
    data = {}
    for number, part in enumerate(parts):
        rows, name = rng.permutation(part), "random" if number in confused else "client"
        y = np.int32(rng.integers(0, 10, len(rows))) if name == "random" else TRAIN_Y[rows]
        columns = tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=TRAIN_X[rows], y=y))
        batches = columns.repeat(options.epochs).batch(16)
        data[f"{name} {number}"] = batches.with_options(as_they_are)
    return data


def build_keras_model() -> tf.keras.Model:
    """A small classifier that starts at the same weights every time."""
    first, last = (tf.keras.initializers.GlorotUniform(seed=seed) for seed in (1, 2))
    hidden = tf.keras.layers.Dense(32, "relu", input_shape=(64,), kernel_initializer=first)
    return tf.keras.Sequential([hidden, tf.keras.layers.Dense(10, kernel_initializer=last)])


def build_model() -> tff.learning.models.FunctionalModel:
    """The same for TFF."""
    spec = collections.OrderedDict(x=tf.TensorSpec([None, 64]), y=tf.TensorSpec([None], tf.int32))
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return tff.learning.models.functional_model_from_keras(build_keras_model, loss, spec)


def evaluate(weights) -> dict[str, float]:
    """Accuracy on the test set, in NumPy."""
    hidden, hidden_bias, last, last_bias = weights.trainable
    logits = np.maximum(TEST_X @ hidden + hidden_bias, 0) @ last + last_bias
    return {"accuracy": float(np.mean(logits.argmax(1) == TEST_Y))}


def save(axes, options: argparse.Namespace) -> None:
    """Writes the picture into its file, and a PDF beside it."""
    title = (
        f"{options.clients} clients, {options.random_labels} with random labels;\n"
        f"digits in Dirichlet shares of concentration {options.concentration:g}"
    )
    axes.set(ylim=(0, 1), ylabel="accuracy on 450 test images", title=title)
    plots.save(axes.figure, options.output)
    print(f"Curves: {options.output}")
