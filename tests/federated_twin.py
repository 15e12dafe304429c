"""Federated training of one linear layer, whole, in NumPy: the truth for the learning processes."""

import collections
import functools

import aggregation_twins as twins
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from problems import INPUT_SPEC, make_keras_model

BATCH = 4
RATE = 0.2
TENSOR = ((0,), (1,))
MODEL = ((0, 1),)


@functools.cache
def functional_model():
    return tff.learning.models.functional_model_from_keras(
        make_keras_model,
        tf.keras.losses.MeanSquaredError(),
        INPUT_SPEC,
        metrics_constructor=lambda: collections.OrderedDict(
            mse=tf.keras.metrics.MeanSquaredError()
        ),
    )


def make_data(sizes=(12, 7, 5, 3), seed=0):
    """Clients of different sizes whose truths differ."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(3, 2))
    clients = []
    for size in sizes:
        x = rng.normal(size=(size, 3))
        y = x @ (truth + rng.normal(scale=0.5, size=(3, 2))) + rng.normal(size=2)
        clients.append((np.float32(x), np.float32(y)))
    return clients


def datasets(data):
    return [
        tf.data.Dataset.from_tensor_slices(collections.OrderedDict(x=x, y=y)).batch(BATCH)
        for x, y in data
    ]


def initial_weights():
    return [np.float64(w) for w in make_keras_model().get_weights()]


def train(weights, x, y, rate=RATE, momentum=0.0):
    """Returns a dictionary of delta, losses, steps and examples of one client's training."""
    kernel, bias = (np.array(w) for w in weights)
    speed = [np.zeros_like(kernel), np.zeros_like(bias)]
    x, y = np.float64(x), np.float64(y)

    def error(rows):
        return x[rows] @ kernel + bias - y[rows]

    initial_loss = np.mean(error(slice(None)) ** 2) if len(x) else 0.0
    losses, steps = 0.0, 0
    for start in range(0, len(x), BATCH):
        rows = slice(start, start + BATCH)
        off = error(rows)
        losses += np.mean(off**2) * len(off)
        gradients = 2 / off.size * x[rows].T @ off, 2 / off.size * off.sum(0)
        speed = [momentum * v + g for v, g in zip(speed, gradients, strict=True)]
        kernel, bias = kernel - rate * speed[0], bias - rate * speed[1]
        steps += 1
    return {
        "delta": [weights[0] - kernel, weights[1] - bias],
        "trained": [kernel, bias],
        "initial_loss": initial_loss,
        "loss": losses / max(len(x), 1),
        "steps": steps,
        "examples": len(x),
    }


def simulate(rounds, data, combine, momentum=0.0, server_rate=1.0):
    """Runs rounds; `combine(weights, clients, memory)` gives the update from what `train` returns."""
    weights, memory = initial_weights(), {}
    for _ in range(rounds):
        clients = [train(weights, x, y, momentum=momentum) for x, y in data]
        update = combine(weights, clients, memory)
        weights = [w - server_rate * u for w, u in zip(weights, update, strict=True)]
    return weights


def by_examples(weights, clients, memory):
    del weights, memory
    shares = np.array([[c["examples"]] for c in clients], np.float64)
    return twins.weighted_mean([c["delta"] for c in clients], shares, MODEL)


def adaptive(score, rule, *, groups=TENSOR, running=True, keep=0.5, **options):
    """The adaptive mean with scores of the models; `keep` is the memory of the running scale."""

    def combine(weights, clients, memory):
        scores = [
            [score([weights[t] for t in g], [c["trained"][t] for t in g]) for g in groups]
            for c in clients
        ]
        return twins.adaptive_mean(
            [c["delta"] for c in clients],
            scores,
            [c["examples"] for c in clients],
            memory,
            rule=rule,
            groups=groups,
            scale="running" if running else 1.0,
            keep=keep,
            **options,
        )

    return combine
