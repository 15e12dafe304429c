"""One round in every place: plain TFF, the Python process, a worker, and TensorFlow by hand.

    python examples/benchmarks/resident_places.py [--tasks A B C] [--rounds 9] [--memory]

prints one table: median seconds of a round, and in brackets those of building and the first round in
a program that has run a round before. `--memory` adds one of the largest memory in use, in GB, of a
program of one contender with its workers. Other simulators need environments of their own: `rivals`
runs the same tasks in them, each in a fresh program.
"""

import argparse
import collections
import os
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import psutil
import tensorflow as tf
import tensorflow_federated as tff
from timing import table, time_side_by_side

from tff_optim import ResidentProcess, simulation

keras = tf.keras
Task = collections.namedtuple("Task", "what layers inputs clients batches rows")


def mlp():
    return [keras.layers.Dense(32, "relu"), keras.layers.Dense(10)]


def cnn():
    return [
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.Conv2D(64, 3, activation="relu"),
        keras.layers.MaxPool2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(128, "relu"),
        keras.layers.Dense(62),
    ]


def logistic():
    return [keras.layers.Dense(10)]


def wide():
    return [keras.layers.Dense(3000, use_bias=False)]


TASKS = {
    "A": Task("MLP 64-32-10, 100 clients of 10 batches of 20", mlp, (64,), 100, 10, 20),
    "B": Task("EMNIST CNN, 10 clients of 5 batches of 20", cnn, (28, 28, 1), 10, 5, 20),
    "C": Task("7.5e6 parameters, 4 clients of 2 batches of 4", wide, (2500,), 4, 2, 4),
    "L": Task("logistic regression 64-10, 100 clients of 10 batches", logistic, (64,), 100, 10, 20),
    "K": Task("MLP 64-32-10, 1,000 clients of 10 batches of 20", mlp, (64,), 1000, 10, 20),
}
SGD = tff.learning.optimizers.build_sgdm(0.01)
ADAM = tff.learning.optimizers.build_adam(1e-3)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def keras_model(task):
    return keras.Sequential([keras.layers.InputLayer(input_shape=task.inputs), *task.layers()])


def arrays(task):
    rng = np.random.default_rng(0)
    number = task.batches * task.rows
    return [
        (rng.random((number, *task.inputs), np.float32), rng.integers(0, 10, (number, 1)))
        for _ in range(task.clients)
    ]


def cohort(task):
    return [tf.data.Dataset.from_tensor_slices(one).batch(task.rows) for one in arrays(task)]


def in_arrays(task):
    clients = simulation.ClientArrays(arrays(task), batch_size=task.rows)
    return clients.cohort(clients.ids, 1)


def as_they_are():
    """Options of a data set that TensorFlow does not look for a faster form of."""
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return options


def fed_avg(task, loop=None, server=ADAM):
    spec = (
        tf.TensorSpec([None, *task.inputs], tf.float32),
        tf.TensorSpec([None, 1], tf.int64),
    )
    options = {} if loop is None else {"loop_implementation": loop}
    return tff.learning.algorithms.build_weighted_fed_avg(
        lambda: tff.learning.models.from_keras_model(keras_model(task), LOSS, spec),
        SGD,
        server,
        **options,
    )


def by_hand(task):
    """The same round as a TensorFlow programmer writes it: variables, one function for a client."""
    model = keras_model(task)
    weights = model.trainable_variables
    start = [tf.Variable(w) for w in weights]
    total = [tf.Variable(tf.zeros_like(w)) for w in weights]
    adam = keras.optimizers.legacy.Adam(1e-3)

    @tf.function
    def train(data):
        for s, w in zip(start, weights, strict=True):
            w.assign(s)
        number = tf.constant(0.0)
        # Over the data set itself TensorFlow would prepare each client's loop anew.
        for x, y in iter(data):
            with tf.GradientTape() as tape:
                loss = LOSS(y, model(x, training=True))
            for w, g in zip(weights, tape.gradient(loss, weights), strict=True):
                w.assign_sub(0.01 * g)
            number += tf.cast(tf.shape(x)[0], tf.float32)
        for t, s, w in zip(total, start, weights, strict=True):
            t.assign_add(number * (s - w))
        return number

    def run(clients):
        for t in total:
            t.assign(tf.zeros_like(t))
        number = tf.add_n([train(client) for client in clients])
        adam.apply_gradients([(t / number, s) for t, s in zip(total, start, strict=True)])
        return start[0].numpy().flat[0]

    return run


def rounds_of(process, clients):
    """A function that runs the next round."""
    state = [process.initialize()]

    def run():
        state[0] = process.next(state[0], clients).state

    return run


def contenders(task, opened):
    """What builds each contender and returns a function that runs a round of it."""
    clients = cohort(task)
    tuned = [client.with_options(as_they_are()) for client in clients]
    iterator = tff.learning.LoopImplementation.DATASET_ITERATOR

    def resident(data, loop=None, **place):
        process = ResidentProcess(fed_avg(task, loop), device="CPU:0", **place)
        opened.append(process)
        return rounds_of(process, data)

    def loop():
        run = by_hand(task)
        return lambda: run(tuned)

    side_by_side = {"side by side": lambda: resident(in_arrays(task), vectorize=True)}
    if task.layers is cnn:  # which TensorFlow cannot vectorise
        side_by_side = {}

    return {
        "plain TFF": lambda: rounds_of(fed_avg(task), clients),
        "plain TFF, tuned": lambda: rounds_of(fed_avg(task, iterator), tuned),
        "the Python process": lambda: resident(clients),
        "`ClientArrays`": lambda: resident(in_arrays(task)),
        **side_by_side,
        "`workers=1`": lambda: resident(tuned, iterator, workers=1),
        "TensorFlow by hand": loop,
    }


def measure(task, rounds):
    opened, run, first = [], {}, {}
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        for name, builder in contenders(task, opened).items():
            begin = time.perf_counter()
            run[name] = builder()
            run[name]()
            first[name] = time.perf_counter() - begin
        seconds = time_side_by_side(run, rounds=rounds, warm_up=1)
    finally:
        for process in opened:
            process.close()
        tff.test.set_no_default_context()
    return {name: f"{seconds[name]:.3g} ({first[name]:.2g})" for name in run}


def peak(task, name, rounds=5):
    """Prints the largest memory in use of this program and its workers, in GB."""
    opened = []
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        run = contenders(task, opened)[name]()
        for _ in range(rounds):
            run()
        tree = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
        print(sum(map(peak_gigabytes, tree)))
    finally:
        for process in opened:
            process.close()
        tff.test.set_no_default_context()


def peak_gigabytes(pid):
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1e6


def peak_of(task, name):
    """Asks a program of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--tasks", task, "--peak-of", name],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return f"{float(done.stdout.split()[-1]):.2f}"


def warm_up():
    """Runs a round, so that the first contender does not pay for what all of them use."""
    tff.backends.native.set_sync_local_cpp_execution_context()
    rounds_of(fed_avg(TASKS["A"]), cohort(TASKS["A"])[:1])()
    tff.test.set_no_default_context()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=["A", "B", "C"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak-of", metavar="CONTENDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        peak(TASKS[arguments.tasks[0]], arguments.peak_of)
        return
    warm_up()
    results = {TASKS[name].what: measure(TASKS[name], arguments.rounds) for name in arguments.tasks}
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    rows = [[what, *(found.get(name, "-") for name in names)] for what, found in results.items()]
    print(table(["task", *names], rows))
    if arguments.memory:
        rows = [
            [what, *(peak_of(t, name) if name in results[what] else "-" for name in names)]
            for t, what in ((t, TASKS[t].what) for t in arguments.tasks)
        ]
        print("\n" + table(["peak memory, GB", *names], rows))


if __name__ == "__main__":
    main()
