"""A federated round written by hand, with adaptive aggregation inside it.

Nothing from `tff.learning` here: a whole `tff.templates.IterativeProcess` with its own
`run_one_round`, for a linear model in a few lines of TensorFlow. The clients' models are averaged
with weights that fall with their KL divergence from the server's model, in two ways that agree:

* on the clients: each client turns its divergence into a number, and `tff.federated_mean` does the
  rest, as it would under a secure sum;
* in the stream: `aggregators.federated_adaptive_mean` stands where `tff.federated_mean` stood, and
  could weigh layer by layer. Its measurements come for free.

    python examples/custom_round.py
"""

import collections
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from aggregators import scores, weighting

BATCH = collections.OrderedDict(x=tf.TensorSpec([None, 3]), y=tf.TensorSpec([None, 1]))
MODEL_TYPE = tff.to_type(
    collections.OrderedDict(kernel=(np.float32, [3, 1]), bias=(np.float32, [1]))
)
DATA_TYPE = tff.types.SequenceType(tff.types.tensorflow_to_type(BATCH))

TEMPERATURE = 0.03  # about half of what clients diverge by in the first round


@tff.tensorflow.computation
def initial_model() -> Any:
    """A model of zeros."""
    return collections.OrderedDict(kernel=tf.zeros([3, 1]), bias=tf.zeros([1]))


@tff.tensorflow.computation(MODEL_TYPE, DATA_TYPE)
def train_locally(model: Any, data: Any) -> Any:
    """One epoch of SGD: returns the trained model and the number of examples."""

    def step(state: Any, batch: Any) -> Any:
        model, examples = state
        with tf.GradientTape() as tape:
            tape.watch(model)
            error = batch["x"] @ model["kernel"] + model["bias"] - batch["y"]
            loss = tf.reduce_mean(error**2)
        gradients = tape.gradient(loss, model)
        model = tf.nest.map_structure(lambda w, g: w - 0.05 * g, model, gradients)
        return model, examples + tf.cast(tf.shape(batch["x"])[0], tf.float32)

    return data.reduce((model, tf.constant(0.0)), step)


@tff.tensorflow.computation(MODEL_TYPE, MODEL_TYPE, np.float32)
def kl_weight(trained: Any, server_model: Any, examples: Any) -> Any:
    """A client's weight: examples * exp(-KL / temperature), the model taken as one layer."""
    divergence = scores.kl_divergence(tf.nest.flatten(server_model), tf.nest.flatten(trained))
    return examples * tf.exp(-divergence / TEMPERATURE)


def build_process(weigh_on_clients: bool) -> tff.templates.IterativeProcess:
    """Builds the process: state is the server's model."""

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_eval(initial_model, tff.SERVER)

    @tff.federated_computation(
        tff.FederatedType(MODEL_TYPE, tff.SERVER), tff.FederatedType(DATA_TYPE, tff.CLIENTS)
    )
    def run_one_round(server_model: Any, data: Any) -> Any:
        at_clients = tff.federated_broadcast(server_model)
        trained, examples = tff.federated_map(train_locally, (at_clients, data))
        if weigh_on_clients:
            weight = tff.federated_map(kl_weight, (trained, at_clients, examples))
            mean = tff.federated_mean(trained, weight)
            return mean, collections.OrderedDict(weight=tff.federated_sum(weight))
        return aggregators.federated_adaptive_mean(
            trained,
            server_model,
            score=scores.kl_divergence,
            weighting=weighting.softmax(TEMPERATURE, scale=None),
            weight=examples,
            layers="model",
        )

    return tff.templates.IterativeProcess(initialize, run_one_round)


def make_clients(count: int = 6, seed: int = 0) -> list[tf.data.Dataset]:
    """Clients of one linear truth, the last of which has it upside down."""
    rng = np.random.default_rng(seed)
    truth = np.array([[1.0], [-2.0], [0.5]])
    clients = []
    for k in range(count):
        x = rng.normal(size=(int(rng.integers(8, 40)), 3))
        y = x @ (truth if k < count - 1 else -truth) + 0.3
        columns = collections.OrderedDict(x=np.float32(x), y=np.float32(y))
        clients.append(tf.data.Dataset.from_tensor_slices(columns).batch(8))
    return clients


def main() -> None:
    """Trains both ways side by side and compares them."""
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        clients = make_clients()
        on_clients, in_stream = build_process(True), build_process(False)
        one, other = on_clients.initialize(), in_stream.initialize()
        print("round  mean KL   effective clients  largest difference between the two ways")
        for number in range(1, 6):
            one, _ = on_clients.next(one, clients)
            other, measured = in_stream.next(other, clients)
            difference = max(float(np.abs(one[name] - other[name]).max()) for name in one)
            print(
                f"{number:5d}  {measured['score_mean'][0]:.2e}  "
                f"{measured['effective_clients'][0]:17.2f}  {difference:.1e}"
            )
            if difference > 1e-4:
                raise SystemExit("The two ways of weighting disagree.")
        print(
            "kernel:", np.round(np.ravel(other["kernel"]), 2), "bias:", np.round(other["bias"], 2)
        )
    finally:
        tff.test.set_no_default_context()  # ends the worker


if __name__ == "__main__":
    main()
