"""What clipping per example costs in TFF's worker: time, and memory, by four ways to take a gradient.

One client trains a convolutional network on batches in one `tff.tensorflow.computation`; per batch

* `not clipped`: the gradient of the batch;
* `ExampleClipping`: this package's loop;
* `loop by hand`: `for i in tf.range(batch)` with `tf.clip_by_global_norm`;
* `tf.vectorized_map`: all examples at once.

Times are taken in turns in one worker; each one's memory is the largest that a fresh worker has held,
after it has trained in that way alone. It is checked before that all clip alike. Last, how long
each takes to build a client and train it on its first batch, for models of three kinds.

    python examples/benchmarks/example_clipping.py --batch 32
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from timing import table, time_side_by_side

from aggregators import ExampleClipping
from aggregators.client.example_clipping import clip_examples

layers = tf.keras.layers
NORM = 1.0
RATE = 0.01
WAYS = ("not clipped", "ExampleClipping", "loop by hand", "tf.vectorized_map")


def convolutional() -> tf.keras.Model:
    return tf.keras.Sequential(
        [
            layers.Conv2D(16, 3, activation="relu", input_shape=(28, 28, 1)),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def recurrent() -> tf.keras.Model:
    return tf.keras.Sequential([layers.LSTM(8, input_shape=(28, 28)), layers.Dense(10)])


def dropout() -> tf.keras.Model:
    return tf.keras.Sequential(
        [layers.Flatten(input_shape=(28, 28, 1)), layers.Dropout(0.5), layers.Dense(10)]
    )


def gradient_of(way: str, model: tf.keras.Model) -> Callable[[Any, Any], list[tf.Tensor]]:
    """The gradient of a batch at the model's variables, taken in this way."""
    loss_fn = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    weights = model.trainable_variables

    def plain(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        return tape.gradient(loss, weights)

    def clipped(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        return tf.clip_by_global_norm(plain(x[tf.newaxis], y[tf.newaxis]), NORM)[0]

    @tf.function
    def by_hand(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        total = [tf.zeros(w.shape) for w in weights]
        for i in tf.range(tf.shape(x)[0]):
            total = [a + b for a, b in zip(total, clipped(x[i], y[i]))]
        return [a / tf.cast(tf.shape(x)[0], tf.float32) for a in total]

    def vectorized(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        each = tf.vectorized_map(
            lambda pair: plain(pair[0][tf.newaxis], pair[1][tf.newaxis]),
            (x, y),
        )
        squares = [tf.reduce_sum(tf.reshape(g, [tf.shape(x)[0], -1]) ** 2, 1) for g in each]
        factors = tf.minimum(NORM / tf.sqrt(tf.add_n(squares)), 1.0)
        size = tf.cast(tf.shape(x)[0], tf.float32)
        return [tf.tensordot(factors, g, 1) / size for g in each]

    def ours(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        def one(pair: Any) -> tuple:
            return plain(*pair), tf.constant(0.0)

        return clip_examples(ExampleClipping(NORM), (x, y), weights, one).gradients

    return {
        "not clipped": plain,
        "ExampleClipping": ours,
        "loop by hand": by_hand,
        "tf.vectorized_map": vectorized,
    }[way]


def client(way: str, make: Callable[[], tf.keras.Model] = convolutional) -> Any:
    """A computation: one client's steps of SGD in this way, from the same weights each time."""
    with tf.Graph().as_default():
        shape = make().input_shape[1:]
    batch_type = tff.types.tensorflow_to_type(
        (tf.TensorSpec([None, *shape]), tf.TensorSpec([None], tf.int32))
    )

    @tff.tensorflow.computation(tff.types.SequenceType(batch_type))
    def train(dataset: tf.data.Dataset) -> Any:
        tf.keras.utils.set_random_seed(1)
        model = make()
        gradient = gradient_of(way, model)

        @tf.function
        def steps() -> Any:
            for x, y in dataset:
                for weight, g in zip(model.trainable_variables, gradient(x, y)):
                    weight.assign_sub(RATE * g)
            return tuple(weight.read_value() for weight in model.trainable_variables)

        return steps()

    return train


def data(batch: int, batches: int, shape: tuple[int, ...] = (28, 28, 1)) -> tf.data.Dataset:
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(batch * batches, *shape)))
    y = np.int32(rng.integers(0, 10, batch * batches))
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)


def megabytes_of_worker() -> float:
    """The most memory that this process's worker has held."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/status") as file:
                status = dict(line.split(":", 1) for line in file)
            with open(f"/proc/{entry}/cmdline") as file:
                is_worker = "worker_binary" in file.read()
        except OSError:
            continue
        if is_worker and int(status["PPid"]) == os.getpid():
            return int(status["VmHWM"].split()[0]) / 1e3
    raise RuntimeError("No worker runs below this process.")


def memory_in_a_fresh_worker(way: str, options: argparse.Namespace) -> float:
    arguments = ["--memory-of", way, "--batch", options.batch, "--batches", options.batches]
    found = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return float(found.stdout.split()[-1])


def seconds_to_first_result(
    way: str, make: Callable[[], tf.keras.Model], shape: tuple[int, ...]
) -> float:
    """How long it takes to build a client and to train it for the first time, on a single batch."""
    batches = data(4, 1, shape)
    start = time.perf_counter()
    client(way, make)(batches)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="examples in a batch")
    parser.add_argument("--batches", type=int, default=10, help="batches of the client")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each way")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    batches = data(options.batch, options.batches)
    if options.memory_of:
        train = client(options.memory_of)
        for _ in range(3):
            train(batches)
        print(megabytes_of_worker())
        tff.test.set_no_default_context()
        return
    ways = {way: client(way) for way in WAYS}
    truth = ways["loop by hand"](batches)
    for way in WAYS[1:]:
        for a, b in zip(ways[way](batches), truth, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    contenders = {way: (lambda train=train: train(batches)) for way, train in ways.items()}
    seconds = time_side_by_side(contenders, rounds=options.repeats, warm_up=1)
    memory = {way: memory_in_a_fresh_worker(way, options) for way in WAYS}
    size = sum(int(np.prod(w.shape)) for w in truth)
    print(f"{options.batches} batches of {options.batch}, convolutional, {size} parameters\n")
    rows = [
        [
            way,
            f"{1e3 * s / options.batches:.1f}",
            f"{s / seconds['ExampleClipping']:.2f}",
            f"{memory[way]:.0f}",
        ]
        for way, s in seconds.items()
    ]
    headers = ["gradient", "ms a batch", "divided by ExampleClipping", "MB of the worker"]
    print(table(headers, rows))
    rows = []
    for name, make, shape in (
        ("convolutional", convolutional, (28, 28, 1)),
        ("dropout", dropout, (28, 28, 1)),
        ("recurrent", recurrent, (28, 28)),
    ):
        taken = [seconds_to_first_result(way, make, shape) for way in WAYS]
        rows.append([name, *(f"{s:.1f}" for s in taken)])
    print("\nseconds until the first batch is done, building included\n")
    print(table(["model", *WAYS], rows))
    tff.test.set_no_default_context()  # ends the worker before the interpreter ends


if __name__ == "__main__":
    main()
