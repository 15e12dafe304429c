"""What state on clients and clipping per example cost.

* a round of SCAFFOLD against one of FedAvg with the same loop, both in a `ResidentProcess` (the server's
  state in the worker), states in memory; and how long a client's state takes to be read and
  written, alone;
* the gradient of a batch clipped per example, by the loop of `ExampleClipping`, by a loop in Python over
  TensorFlow functions, and by `tf.vectorized_map`.

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
from aggregators import ClientStates, ExampleClipping, build_fed_avg, build_scaffold, client_memory
from aggregators.example_clipping import clip_examples

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


def clipping(batch: int, repeats: int) -> None:
    model = tf.keras.Sequential(
        [
            layers.Conv2D(16, 3, activation="relu", input_shape=(28, 28, 1)),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    loss_fn = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    weights = model.trainable_variables
    rng = np.random.default_rng(0)
    data = {
        "x": tf.constant(rng.normal(size=(batch, 28, 28, 1)), tf.float32),
        "y": tf.constant(rng.integers(0, 10, (batch, 1)), tf.int32),
    }

    def gradient(x: tf.Tensor, y: tf.Tensor) -> tuple:
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        return tape.gradient(loss, weights), loss

    def one(carried: tuple, example: dict) -> tuple:
        return carried, *gradient(example["x"], example["y"])

    scheme = ExampleClipping(1.0)
    ours = tf.function(lambda: clip_examples(scheme, data, weights, one).gradients)

    @tf.function
    def clipped(x: tf.Tensor, y: tf.Tensor) -> list:
        return tf.clip_by_global_norm(gradient(x, y)[0], 1.0)[0]

    def by_hand() -> list:
        total = [tf.zeros_like(w) for w in weights]
        for i in range(batch):
            new = clipped(data["x"][i : i + 1], data["y"][i : i + 1])
            total = [a + b for a, b in zip(total, new, strict=True)]
        return [x / batch for x in total]

    @tf.function
    def vectorized() -> list:
        each = tf.vectorized_map(lambda z: clipped(z[0][None], z[1][None]), (data["x"], data["y"]))
        return [tf.reduce_mean(x, 0) for x in each]

    plain = tf.function(lambda: gradient(data["x"], data["y"])[0])
    for a, b, c in zip(ours(), by_hand(), vectorized(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-5)
    contenders = {
        "ExampleClipping": ours,
        "loop by hand": by_hand,
        "tf.vectorized_map": vectorized,
        "not clipped": plain,
    }
    found = time_side_by_side(contenders, rounds=repeats)
    size = 4 * sum(int(np.prod(w.shape)) for w in weights)
    gradients = {"tf.vectorized_map": batch * size, "not clipped": size}
    rows = [
        [
            name,
            f"{1e3 * s:.1f}",
            f"{s / found['ExampleClipping']:.2f}",
            f"{gradients.get(name, 2 * size) / 1e6:.1f}",
        ]
        for name, s in found.items()
    ]
    print(f"\na batch of {batch}, convolutional, {size // 4} parameters\n")
    print(table(["gradient", "ms", "ratio", "MB of gradients at once"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    rounds(options.width, options.clients, options.batches, options.repeats)
    clipping(options.batch, options.repeats)
    tff.test.set_no_default_context()  # ends the worker before the interpreter ends


if __name__ == "__main__":
    main()
