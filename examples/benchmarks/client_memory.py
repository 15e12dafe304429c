"""What a state on each client costs.

A round of SCAFFOLD against one of FedAvg with the same loop, both in a `ResidentProcess`, states in
memory; and how long the states of its clients take to be read and written, alone. All of them are
divided by the round of FedAvg, in processor time.

    python examples/benchmarks/client_memory.py
"""

import argparse
import os
import time
from collections import OrderedDict

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from timing import table, time_side_by_side

import tff_optim
from aggregators import ClientStates, build_fed_avg, build_scaffold
from aggregators.client import state_io

layers = tf.keras.layers
SETTING = "width of the two hidden layers, clients, batches of a client"


def rounds(width: int, clients: int, batches: int, repeats: int) -> list[str]:
    """A row of the table."""
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
            with tf.control_dependencies([state_io.save(path, state)]):
                back = state_io.load(tf.identity(path), state)
            return tf.add_n([tf.reduce_sum(w) for w in back["control"]])

        def states_alone() -> None:
            for _ in range(clients):
                move()

        found = time_side_by_side(
            {"FedAvg": fed_avg, "SCAFFOLD": with_states, "its states alone": states_alone},
            rounds=repeats,
            clock=time.process_time,
        )
        for name in os.listdir("/dev/shm"):
            if name.startswith(f"state-{os.getpid()}"):
                os.remove(os.path.join("/dev/shm", name))
    found["less its states"] = found["SCAFFOLD"] - found["its states alone"]
    ratios = [f"{s / found['FedAvg']:.2f}" for name, s in found.items() if name != "FedAvg"]
    return [f"{size:,}", f"{clients}", f"{batches}", f"{1e3 * found['FedAvg']:.0f}", *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--settings", nargs="+", default=["256,5,10", "512,10,20", "512,10,60"], help=SETTING
    )
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    settings = [map(int, setting.split(",")) for setting in options.settings]
    rows = [rounds(*setting, options.repeats) for setting in settings]
    headers = ["parameters", "clients", "batches of 16", "FedAvg, ms"]
    print(table([*headers, "SCAFFOLD", "its states alone", "SCAFFOLD less its states"], rows))
    tff.test.set_no_default_context()  # ends the worker before the interpreter ends


if __name__ == "__main__":
    main()
