"""What a state on each client costs.

A round of SCAFFOLD against one of FedAvg with the same loop, both in a `ResidentProcess` (the server's
state in the worker), states in memory; and how long the states of its clients take to be read and
written, alone.

    python examples/benchmarks/client_memory.py --width 256 --clients 10
"""

import argparse
import os
from collections import OrderedDict

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from timing import table, time_side_by_side

import tff_optim
from aggregators import ClientStates, build_fed_avg, build_scaffold
from aggregators.core import client_memory

layers = tf.keras.layers


def rounds(width: int, clients: int, batches: int, repeats: int) -> None:
    spec = (tf.TensorSpec([None, 64]), tf.TensorSpec([None], tf.int32))
    model = tff.learning.models.functional_model_from_keras(
        lambda: tf.keras.Sequential(
            [
                layers.Dense(width, "relu", input_shape=(64,)),
                layers.Dense(width, "relu"),
                layers.Dense(10),
            ]
        ),
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        spec,
    )
    sgd = tff.learning.optimizers.build_sgdm(0.01)
    uniform = tff.learning.ClientWeighting.UNIFORM
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(16 * batches, 64)))
    y = np.int32(rng.integers(0, 10, 16 * batches))
    data = [tf.data.Dataset.from_tensor_slices((x, y)).batch(16)] * clients
    ids = [str(k) for k in range(clients)]
    plain = tff_optim.ResidentProcess(build_fed_avg(model, sgd, client_weighting=uniform))
    scaffold = tff_optim.ResidentProcess(build_scaffold(model, sgd, num_clients=clients))
    size = sum(np.prod(w.shape) for w in model.initial_weights[0])
    with plain, scaffold, ClientStates(ids) as states:
        server = {"plain": plain.initialize(), "scaffold": scaffold.initialize()}

        def fed_avg() -> None:
            server["plain"] = plain.next(server["plain"], data).state

        def with_states() -> None:
            with states.cohort(ids, data) as cohort:
                server["scaffold"] = scaffold.next(server["scaffold"], cohort).state

        specs = [tf.zeros(w.shape) for w in model.initial_weights[0]]
        path = tf.constant(os.path.join("/dev/shm", f"state-{os.getpid()}"))

        @tf.function
        def move() -> tf.Tensor:
            state = OrderedDict(control=tuple(specs))
            with tf.control_dependencies([client_memory.save(path, state)]):
                back = client_memory.load(tf.identity(path), state)
            return tf.add_n([tf.reduce_sum(w) for w in back["control"]])

        def states_alone() -> None:
            for _ in range(clients):
                move()

        found = time_side_by_side(
            {"FedAvg": fed_avg, "SCAFFOLD": with_states, "its states alone": states_alone},
            rounds=repeats,
        )
        for name in os.listdir("/dev/shm"):
            if name.startswith(f"state-{os.getpid()}"):
                os.remove(os.path.join("/dev/shm", name))
    net = found["SCAFFOLD"] - found["its states alone"]
    rows = [[name, f"{1e3 * s:.1f}", f"{s / found['FedAvg']:.2f}"] for name, s in found.items()]
    rows.append(["SCAFFOLD less its states", f"{1e3 * net:.1f}", f"{net / found['FedAvg']:.2f}"])
    print(f"{clients} clients of {batches} batches, {size} parameters\n")
    print(table(["a round", "ms", "ratio"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    rounds(options.width, options.clients, options.batches, options.repeats)
    tff.test.set_no_default_context()  # ends the worker before the interpreter ends


if __name__ == "__main__":
    main()
