"""The tasks of the study: data, models, and how data are split over clients.

A bad client is a matter of its data alone, so one process, built once, serves every setting. Labels
are changed in the data. What else a client does is told by five more columns of the inputs, which the
model hands to the client's optimizer as the gradient of five weights that stay 0; see `bad_clients`.
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

BATCH = 16
# factor of the update, whether a batch is the last, row of the payload, whether it lies, whether it
# is to be as long as the rule allows
FLAGS = 5
ROWS = 24  # of payloads: at most so many clients of a federation send something of their own
HELD_OUT = 1000  # added to the label of an example that is not trained on
NAMES = ("digits", "topics", "made", "cnn")


class Task(NamedTuple):
    """Examples of a classification, and the layers of the model for it."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    shapes: tuple[tuple[int, int], ...]
    has_convolution: bool

    @property
    def classes(self) -> int:
        """How many there are."""
        return self.shapes[-1][1]

    @property
    def size(self) -> int:
        """How many numbers the model has."""
        return sum(inputs * outputs + outputs for inputs, outputs in self.shapes)


@functools.cache
def load(name: str) -> Task:
    """A task by its name.

    `digits`: 8 x 8 images, a network of 32 hidden units. `topics`: words of Python's manual, softmax
    regression. `made`: scikit-learn's `make_classification`, 8 classes of 30 features, 32 hidden
    units. `cnn`: digits again, 8 filters of 3 x 3, means of 2 x 2 and a dense layer.
    """
    x, y = {"topics": _topics, "made": _made}.get(name, _digits)()
    parts = sklearn.model_selection.train_test_split(
        x, y, test_size=0.25, random_state=0, stratify=y
    )
    train_x, test_x, train_y, test_y = parts
    classes = int(y.max()) + 1
    shapes: tuple[tuple[int, int], ...] = ((x.shape[1], 32), (32, classes))
    if name == "topics":
        shapes = ((x.shape[1], classes),)
    elif name == "cnn":
        shapes = ((9, 8), (72, classes))
    return Task(train_x, train_y, test_x, test_y, shapes, name == "cnn")


def _digits() -> tuple[np.ndarray, np.ndarray]:
    digits = sklearn.datasets.load_digits()
    return np.float32(digits.data / 16.0), np.int32(digits.target)


def _made() -> tuple[np.ndarray, np.ndarray]:
    x, y = sklearn.datasets.make_classification(
        2000, 30, n_informative=12, n_redundant=6, n_classes=8, class_sep=1.5, random_state=0
    )
    return np.float32(x / x.std(0)), np.int32(y)


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


def split_by_dirichlet(
    labels: np.ndarray, clients: int, concentration: float, rng: Any
) -> list[np.ndarray]:
    """Deals each class in shares drawn from a Dirichlet distribution; nobody gets nothing."""
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        examples = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(clients, concentration)))[:-1] * len(examples)
        for part, chunk in zip(parts, np.split(examples, cuts.astype(int)), strict=True):
            part.extend(chunk)
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [rng.permutation(part) for part in parts]


def initial_weights(task: Task, seed: int, unit: float = 1.0) -> list[np.ndarray]:
    """Kernels and biases drawn for this seed, in this unit, and the five weights that stay 0."""
    rng, weights = np.random.default_rng(1_000_000 + seed), []
    for inputs, outputs in task.shapes:
        limit = np.sqrt(6.0 / (inputs + outputs)) / unit
        weights.append(rng.uniform(-limit, limit, (inputs, outputs)).astype(np.float32))
        weights.append(np.zeros(outputs, np.float32))
    return [*weights, np.zeros(FLAGS, np.float32)]


def _patches() -> np.ndarray:
    """Which pixels of an 8 x 8 image the 36 windows of 3 x 3 hold."""
    corners = [8 * row + column for row in range(6) for column in range(6)]
    window = [8 * row + column for row in range(3) for column in range(3)]
    return np.add.outer(corners, window)


def logits(task: Task, weights: Any, x: Any, np_or_tf: Any) -> Any:
    """What a model of these kernels and biases says, by NumPy or by TensorFlow.

    The convolution is a product of windows of the image with the filters: the same numbers, and
    clients can be trained side by side.
    """
    is_tf = np_or_tf is tf
    relu = tf.nn.relu if is_tf else lambda z: np.maximum(z, 0.0)
    layers = list(zip(weights[0::2], weights[1::2], strict=True))
    if task.has_convolution:
        (kernel, bias), *layers = layers
        windows = tf.gather(x, _patches(), axis=1) if is_tf else x[:, _patches()]
        cells = relu(np_or_tf.reshape(windows, [-1, 9]) @ kernel + bias)
        cells = np_or_tf.reshape(cells, [-1, 3, 2, 3, 2, 8])
        mean = tf.reduce_mean if is_tf else np.mean
        x = np_or_tf.reshape(mean(cells, (2, 4)), [-1, 72])
    for number, (kernel, bias) in enumerate(layers):
        x = x @ kernel + bias
        if number + 1 < len(layers):
            x = relu(x)
    return x


def make_model(task: Task) -> tff.learning.models.FunctionalModel:
    """A network whose last weights have the flags of a batch for their gradient.

    Its weights that are not trained are the payloads, which attackers send for an update, and the
    unit of the others: the network multiplies them by it.
    """

    @tf.custom_gradient
    def with_flags(outputs: tf.Tensor, weights: tf.Tensor, flags: tf.Tensor) -> Any:
        del weights  # they are 0, and change nothing

        def gradient(upstream: tf.Tensor) -> Any:
            return upstream, flags, None

        return tf.identity(outputs), gradient

    @tf.custom_gradient
    def sent(weight: tf.Tensor, payload: tf.Tensor, is_sent: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> Any:
            return tf.where(is_sent, payload, upstream), None, None

        return tf.identity(weight), gradient

    @tf.function
    def predict(weights: Any, x: tf.Tensor, training: bool) -> tf.Tensor:
        del training  # no layer behaves otherwise then
        (*trained, zeros), (payloads, unit) = weights
        inputs, flags = tf.split(x, [-1, FLAGS], 1)
        flags = tf.reduce_mean(flags, 0)
        _, is_last, row, _, _ = tf.unstack(flags)
        is_sent = (is_last > 0.0) & (row > 0.0)
        payload = tf.gather(payloads, tf.maximum(tf.cast(row, tf.int32) - 1, 0))
        sizes = [int(np.prod(weight.shape)) for weight in trained]
        pieces = tf.split(payload, sizes)
        used = [
            unit * sent(weight, tf.reshape(piece, weight.shape), is_sent)
            for weight, piece in zip(trained, pieces, strict=True)
        ]
        return with_flags(logits(task, used, inputs, tf), zeros, flags)

    @tf.function
    def loss(output: tf.Tensor, label: tf.Tensor, sample_weight: Any = None) -> tf.Tensor:
        del sample_weight  # all examples that are trained on count alike
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(label % HELD_OUT, output)
        trained = tf.cast(label < HELD_OUT, losses.dtype)
        return tf.reduce_sum(trained * losses) / tf.maximum(tf.reduce_sum(trained), 1.0)

    spec = OrderedDict(
        x=tf.TensorSpec((None, task.train_x.shape[1] + FLAGS), tf.float32),
        y=tf.TensorSpec((None,), tf.int32),
    )
    untrained = (np.zeros([ROWS, task.size], np.float32), np.float32(1.0))
    return tff.learning.models.FunctionalModel(
        initial_weights=(tuple(initial_weights(task, 0)), untrained),
        predict_on_batch_fn=predict,
        loss_fn=loss,
        input_spec=spec,
    )


def accuracy(task: Task, weights: Any, unit: float = 1.0) -> float:
    """The share of the test set that a model of these weights gets right; 0 if it is not finite."""
    *trained, _ = [unit * np.asarray(w, np.float64) for w in weights]
    found = logits(task, trained, np.float64(task.test_x), np)
    return float(np.mean(np.argmax(found, 1) == task.test_y)) if np.isfinite(found).all() else 0.0
