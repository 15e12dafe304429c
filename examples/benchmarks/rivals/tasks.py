"""The tasks of `resident_places.py` in NumPy, and what every script here answers: times or a check.

A script hands `main` a function `simulate(task, clients, start, server, rounds, round_done)`. It
starts from the weights `start`, trains every client with SGD in each of `rounds` rounds, gives the
mean of the updates to the optimizer `server` ("adam" or "sgd"), calls `round_done` after each
round, and returns the last weights. Printed is one line of JSON for each task.
"""

import argparse
import collections
import json
import os
import resource
import statistics
import time

import numpy as np

Task = collections.namedtuple("Task", "name shapes inputs clients batches rows")
CNN = [(3, 3, 1, 32), (32,), (3, 3, 32, 64), (64,), (9216, 128), (128,), (128, 62), (62,)]
TASKS = {
    "A": Task("A", [(64, 32), (32,), (32, 10), (10,)], (64,), 100, 10, 20),
    "B": Task("B", CNN, (28, 28, 1), 10, 5, 20),
    "C": Task("C", [(2500, 3000)], (2500,), 4, 2, 4),
    "L": Task("L", [(64, 10), (10,)], (64,), 100, 10, 20),
    "K": Task("K", [(64, 32), (32,), (32, 10), (10,)], (64,), 1000, 10, 20),
}
CLIENT_RATE = 0.01  # SGD
SERVER_RATES = {"adam": 1e-3, "sgd": 1.0}  # sgd: the mean of the clients' weights, for the check


def cohort(task, layout="keras"):
    """Examples and labels of every client: the numbers of `resident_places.py`."""
    rng = np.random.default_rng(0)
    number = task.batches * task.rows
    inputs = task.inputs if layout == "keras" else task.inputs[::-1]  # one channel
    return [
        (
            rng.random((number, *task.inputs), np.float32).reshape(number, *inputs),
            rng.integers(0, 10, number),
        )
        for _ in range(task.clients)
    ]


def start_weights(task, layout="keras"):
    """Glorot's uniform kernels and zero biases, the same for all; torch has other axes."""
    rng = np.random.default_rng(1)
    weights = []
    for shape in task.shapes:
        bound = np.sqrt(6 / (np.prod(shape[:-2], dtype=int) * sum(shape[-2:])))
        weight = rng.uniform(-bound, bound, shape) if len(shape) > 1 else np.zeros(shape)
        if layout == "torch":
            if shape[0] == 9216:  # channels come first also where they are flattened
                weight = weight.reshape(12, 12, 64, -1).transpose(2, 0, 1, 3).reshape(shape)
            weight = weight.transpose(3, 2, 0, 1) if len(shape) == 4 else weight.T
        weights.append(np.ascontiguousarray(weight, np.float32))
    return weights


def moved(before, after):
    """How far each layer's weights went, which is the same number in every layout."""
    return [float(np.linalg.norm(np.asarray(b, float) - a)) for a, b in zip(before, after)]


def processor_seconds():
    """Of this program and of those that it has started and that have ended."""
    return sum(os.times()[:4])


def main(name, version, simulate, layout="keras", tasks="ABCLK"):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7, help="after the first")
    parser.add_argument("--check", action="store_true", help="how far two rounds go, not how long")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(tasks))
    arguments = parser.parse_args()
    for task in [TASKS[letter] for letter in arguments.tasks if letter in tasks]:
        given = task, cohort(task, layout), start_weights(task, layout)
        answer = {"name": name, "version": version, "task": task.name}
        if arguments.check:
            for server in SERVER_RATES:
                found = simulate(*given, server, 2, lambda: None)
                answer[server] = moved(given[-1], found)
        else:
            times = [(time.perf_counter(), processor_seconds())]
            simulate(
                *given,
                "adam",
                1 + arguments.rounds,
                lambda times=times: times.append((time.perf_counter(), processor_seconds())),
            )
            first, *later = np.diff([wall for wall, _ in times]).tolist()
            _, *processor = np.diff([spent for _, spent in times]).tolist()
            answer |= {
                "first": first,
                "later": statistics.median(later),
                "processor": statistics.mean(processor),
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            }
        print(json.dumps(answer), flush=True)
