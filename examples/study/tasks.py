"""The two tasks of the study: data split over clients, some of them bad, and a model that carries them.

A bad client is a matter of its data alone, so one process, built once, serves every setting. Labels
are changed in the data. What happens to an update is told by three more columns of the inputs, which
the model hands to the client's optimizer as the gradient of three weights that stay 0.
"""

import functools
import re
from collections import Counter, OrderedDict
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow as tf
import tensorflow_federated as tff

CLIENTS = 20
BATCH = 16
BAD_SHARE = {
    "random labels": 0.4,
    "flipped labels": 0.2,
    "times -1": 0.2,
    "times -10": 0.2,
    "gaussian": 0.2,
}
CORRUPTIONS = ("none", *BAD_SHARE)
FACTORS = {"times -1": -1.0, "times -10": -10.0}
GAUSSIAN_DEVIATION = 0.1
FLAGS = 3  # the factor of the update, whether a batch is the last, and the seed of the noise


class Task(NamedTuple):
    """Examples of a classification, and the layers of the model for it."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    widths: tuple[int, ...]


@functools.cache
def load(name: str) -> Task:
    """`digits`: 8 x 8 images, a network of 32 hidden units. `topics`: words of Python's manual."""
    x, y = _digits() if name == "digits" else _topics()
    parts = sklearn.model_selection.train_test_split(
        x, y, test_size=0.25, random_state=0, stratify=y
    )
    train_x, test_x, train_y, test_y = parts
    widths = (x.shape[1], 32, 10) if name == "digits" else (x.shape[1], 10)
    return Task(train_x, train_y, test_x, test_y, widths)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    digits = sklearn.datasets.load_digits()
    return np.float32(digits.data / 16.0), np.int32(digits.target)


def _topics(number: int = 10, words: int = 300, window: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Windows of 20 words of the ten longest topics, as counts of the 300 most frequent words."""
    texts = {name: re.findall(r"[a-z]+", text.lower()) for name, text in topics.items()}
    longest = sorted(texts, key=lambda name: (-len(texts[name]), name))[:number]
    frequent = Counter(word for name in longest for word in texts[name]).most_common(words)
    place = {word: column for column, (word, _) in enumerate(frequent)}
    rows, labels = [], []
    for label, name in enumerate(longest):
        for start in range(0, len(texts[name]) - window + 1, window):
            row = np.zeros(words, np.float32)
            for word in texts[name][start : start + window]:
                if word in place:
                    row[place[word]] += 1.0
            rows.append(row)
            labels.append(label)
    return np.array(rows), np.int32(labels)


def split_by_dirichlet(labels: np.ndarray, concentration: float, rng: Any) -> list[np.ndarray]:
    """Deals each class in shares drawn from a Dirichlet distribution; nobody gets nothing."""
    parts: list[list[int]] = [[] for _ in range(CLIENTS)]
    for label in np.unique(labels):
        examples = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(CLIENTS, concentration)))[:-1] * len(examples)
        for part, chunk in zip(parts, np.split(examples, cuts.astype(int)), strict=True):
            part.extend(chunk)
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [rng.permutation(part) for part in parts]


def make_clients(task: Task, concentration: float, corruption: str, seed: int) -> list[Any]:
    """The clients' data sets. Who holds what is the same for every corruption of a seed."""
    rng = np.random.default_rng(seed)
    parts = split_by_dirichlet(task.train_y, concentration, rng)
    order = rng.permutation(CLIENTS)
    bad = set(order[: round(BAD_SHARE.get(corruption, 0.0) * CLIENTS)])
    as_they_are = tf.data.Options()  # TensorFlow would optimize every pipeline anew in every round
    as_they_are.autotune.enabled = False
    as_they_are.experimental_optimization.apply_default_optimizations = False
    clients = []
    for client, part in enumerate(parts):
        x, y = task.train_x[part], task.train_y[part]
        flags = np.zeros((len(part), FLAGS), np.float32)
        flags[:, 0] = 1.0
        flags[(len(part) - 1) // BATCH * BATCH :, 1] = 1.0
        drawn = rng.integers(0, 10, len(y)).astype(np.int32)
        if client in bad:
            if corruption == "random labels":
                y = drawn
            elif corruption == "flipped labels":
                y = 9 - y
            elif corruption == "gaussian":
                flags[:, 2] = 1.0 + client + CLIENTS * (seed % 1000)
            else:
                flags[:, 0] = FACTORS[corruption]
        data = OrderedDict(x=np.concatenate([x, flags], 1), y=np.int32(y))
        clients.append(
            tf.data.Dataset.from_tensor_slices(data).batch(BATCH).with_options(as_they_are)
        )
    return clients


def initial_weights(task: Task, seed: int) -> list[np.ndarray]:
    """Kernels and biases drawn for this seed, and the three weights that stay 0."""
    rng, weights = np.random.default_rng(1_000_000 + seed), []
    for inputs, outputs in zip(task.widths, task.widths[1:]):
        limit = np.sqrt(6.0 / (inputs + outputs))
        weights.append(rng.uniform(-limit, limit, (inputs, outputs)).astype(np.float32))
        weights.append(np.zeros(outputs, np.float32))
    return [*weights, np.zeros(FLAGS, np.float32)]


def make_model(task: Task) -> tff.learning.models.FunctionalModel:
    """A network of dense layers whose last weights have the flags of a batch for their gradient."""

    @tf.custom_gradient
    def with_flags(outputs: tf.Tensor, weights: tf.Tensor, flags: tf.Tensor) -> Any:
        del weights  # they are 0, and change nothing

        def gradient(upstream: tf.Tensor) -> Any:
            return upstream, tf.reduce_mean(flags, 0), None

        return tf.identity(outputs), gradient

    @tf.function
    def predict(weights: Any, x: tf.Tensor, training: bool) -> tf.Tensor:
        del training  # no layer behaves otherwise then
        *dense, zeros = weights[0]
        inputs, flags = tf.split(x, [task.widths[0], FLAGS], 1)
        for number in range(0, len(dense), 2):
            inputs = inputs @ dense[number] + dense[number + 1]
            if number + 2 < len(dense):
                inputs = tf.nn.relu(inputs)
        return with_flags(inputs, zeros, flags)

    @tf.function
    def loss(output: tf.Tensor, label: tf.Tensor, sample_weight: Any = None) -> tf.Tensor:
        del sample_weight  # all examples count alike
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(label, output))

    spec = OrderedDict(
        x=tf.TensorSpec((None, task.widths[0] + FLAGS), tf.float32),
        y=tf.TensorSpec((None,), tf.int32),
    )
    return tff.learning.models.FunctionalModel(
        initial_weights=(tuple(initial_weights(task, 0)), ()),
        predict_on_batch_fn=predict,
        loss_fn=loss,
        input_spec=spec,
    )


class FlaggedSGD(tff.learning.optimizers.Optimizer):
    """SGD that, after a client's last batch, makes of the update what the flags say."""

    def __init__(self, learning_rate: float) -> None:
        """Keeps the learning rate."""
        self._rate = learning_rate

    def initialize(self, specs: Any) -> Any:
        """The learning rate, the number of steps done, and where a client started."""
        start = tf.nest.map_structure(lambda s: tf.zeros(s.shape, s.dtype), specs)
        return OrderedDict(learning_rate=self._rate, step=0, start=start)

    def get_hparams(self, state: Any) -> Any:
        """The learning rate."""
        return OrderedDict(learning_rate=state["learning_rate"])

    def set_hparams(self, state: Any, hparams: Any) -> Any:
        """The state with this learning rate."""
        return OrderedDict(state, **hparams)

    def next(self, state: Any, weights: Any, gradients: Any) -> Any:
        """One step; the last gradient holds the flags."""
        is_first = tf.equal(state["step"], 0)
        start = tf.cond(is_first, lambda: tuple(weights), lambda: tuple(state["start"]))
        factor, is_last, seed = tf.unstack(gradients[-1])
        new = [w - state["learning_rate"] * g for w, g in zip(weights[:-1], gradients[:-1])]

        def corrupt() -> list[tf.Tensor]:
            return [s + factor * (w - s) for s, w in zip(start[:-1], new, strict=True)]

        def noise() -> list[tf.Tensor]:
            return [
                s
                + GAUSSIAN_DEVIATION
                * tf.random.stateless_normal(s.shape, [tf.cast(seed, tf.int32), n])
                for n, s in enumerate(start[:-1])
            ]

        changed = tf.cond(
            (is_last > 0.0) & ((seed > 0.0) | (factor != 1.0)),
            lambda: tf.cond(seed > 0.0, noise, corrupt),
            lambda: [tf.identity(w) for w in new],
        )
        following = OrderedDict(
            learning_rate=state["learning_rate"], step=state["step"] + 1, start=start
        )
        return following, (*changed, tf.identity(weights[-1]))


def accuracy(task: Task, weights: Any) -> float:
    """The share of the test set that a model of these weights gets right; 0 if it is not finite."""
    *dense, _ = [np.asarray(w, np.float64) for w in weights]
    x = np.float64(task.test_x)
    for number in range(0, len(dense), 2):
        x = x @ dense[number] + dense[number + 1]
        if number + 2 < len(dense):
            x = np.maximum(x, 0.0)
    return float(np.mean(np.argmax(x, 1) == task.test_y)) if np.isfinite(x).all() else 0.0
