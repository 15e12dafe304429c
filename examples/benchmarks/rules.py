"""What a round costs by each rule, against the plain mean with the same training.

Ten clients with ten batches of 32 train a network of 397,510 numbers, in TensorFlow of the Python
process. Figures are processor seconds of all threads, medians over rounds in which all rules take
turns, so that other work on the machine matters little.

    python examples/benchmarks/rules.py [--rounds 9] [--clients 10]
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from timing import table, time_side_by_side

import aggregators
from aggregators import rules, scores, weighting
from tff_optim import ResidentProcess

BATCHES, ROWS = 10, 32
CANDIDATES = [
    ("loss", weighting.softmax()),
    (scores.kl_divergence, weighting.softmax()),
    ("loss", weighting.uniform(times_examples=False)),
]


def contenders(clients: int) -> dict[str, aggregators.Rule]:
    """Every rule, at its defaults where it has any."""
    return {
        "plain_mean": rules.plain_mean(),
        "adaptive_mean, KL": rules.adaptive_mean(scores.kl_divergence, weighting.softmax()),
        "adaptive_mean, loss": rules.adaptive_mean("loss", weighting.softmax()),
        "fed_att": rules.fed_att(),
        "loss_gated": rules.loss_gated(),
        "q_fed_avg": rules.q_fed_avg(1.0, 0.05),
        "fed_nova": rules.fed_nova(),
        "redescending_mean": rules.redescending_mean(),
        "jury_mean": rules.jury_mean(),
        "jury_mean, direction": rules.jury_mean(votes="direction"),
        "jury_mean, three candidates": rules.jury_mean(CANDIDATES),
        "coordinate_median": rules.coordinate_median(),
        "trimmed_mean": rules.trimmed_mean(),
        "multi_krum": rules.multi_krum(2, 5),
        "geometric_median": rules.geometric_median(),
        "centered_clipping": rules.centered_clipping(1.0),
        "scaffold": rules.scaffold(clients),
        "fed_dyn": rules.fed_dyn(clients),
        "kept_optimizer": rules.kept_optimizer(),
    }


def model() -> tff.learning.models.FunctionalModel:
    layers = tf.keras.layers
    return tff.learning.models.functional_model_from_keras(
        lambda: tf.keras.Sequential(
            [layers.Dense(500, "relu", input_shape=(784,)), layers.Dense(10)]
        ),
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        (tf.TensorSpec([None, 784]), tf.TensorSpec([None], tf.int32)),
    )


def data(clients: int) -> list[tf.data.Dataset]:
    rng = np.random.default_rng(0)
    number = BATCHES * ROWS
    return [
        tf.data.Dataset.from_tensor_slices(
            (np.float32(rng.normal(size=(number, 784))), np.int32(rng.integers(0, 10, number)))
        ).batch(ROWS)
        for _ in range(clients)
    ]


def rounds_of(
    process: ResidentProcess,
    states: aggregators.ClientStates | None,
    clients: list[tf.data.Dataset],
) -> Callable[[], None]:
    """A function that runs the next round."""
    server = [process.initialize()]

    def plain() -> None:
        server[0] = process.next(server[0], clients).state

    def with_states() -> None:
        with states.cohort(ids, clients) as cohort:
            server[0] = process.next(server[0], cohort).state

    ids = [str(k) for k in range(len(clients))]
    return plain if states is None else with_states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clients", type=int, default=10)
    options = parser.parse_args()
    clients = data(options.clients)
    opened, runs = [], {}
    sgd = tff.learning.optimizers.build_sgdm(0.05)
    for name, rule in contenders(options.clients).items():
        built = aggregators.build_fed_avg(model(), sgd, rule=rule)
        process = ResidentProcess(built, device="CPU:0")
        opened.append(process)
        states = None
        if rule.needs.stateful_client is not None:
            states = aggregators.ClientStates([str(k) for k in range(options.clients)])
            opened.append(states)
        runs[name] = rounds_of(process, states, clients)
    found = time_side_by_side(runs, rounds=options.rounds, warm_up=2, clock=time.process_time)
    for one in opened:
        one.close()
    tff.test.set_no_default_context()  # ends the worker, if there is one
    rows = [[n, f"{s:.2f}", f"{s / found['plain_mean']:.2f}"] for n, s in found.items()]
    print(table(["rule", "processor seconds of a round", "times the plain mean"], rows))


if __name__ == "__main__":
    main()
