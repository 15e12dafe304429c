"""Code written for TFF 0.4x and 0.86, line by line as it is written now.

    python examples/porting.py [ROUNDS]

Above each block stands what it was before, in comments; README.md has the whole table.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from aggregators import federated_reduce
from tff_optim import build_keras_optimizer

SPEC = (tf.TensorSpec([None, 3]), tf.TensorSpec([None, 1]))


# 0.4x: return tff.learning.from_keras_model(...)
def model_fn() -> tff.learning.models.VariableModel:
    """Builds the Keras model inside: a model made outside belongs to another graph."""
    keras_model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(3,))])
    loss = tf.keras.losses.MeanSquaredError()
    return tff.learning.models.from_keras_model(keras_model, loss=loss, input_spec=SPEC)


# 0.4x, 0.86: @tff.tf_computation(tf.float32, tf.float32)
@tff.tensorflow.computation(np.float32, np.float32)
def add(a, b):
    """Adds two numbers in TFF's worker."""
    return a + b


# 0.4x: @tff.federated_computation(tff.type_at_clients(tf.float32))
@tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
def largest_sum(values):
    """The sum over clients and the largest value, by reductions of one's own."""
    # 0.4x: tff.federated_reduce(values, zero, add)
    total = federated_reduce(values, np.float32(0), add)
    most = federated_reduce(values, np.float32(-np.inf), lambda a, b: tf.maximum(a, b))
    return total, most


def make_clients(count: int = 4) -> list[tf.data.Dataset]:
    """Clients of one truth."""
    rng, clients = np.random.default_rng(0), []
    for _ in range(count):
        x = rng.normal(size=(32, 3)).astype(np.float32)  # not float64, and batched
        y = x @ np.float32([[1], [-2], [0.5]])
        clients.append(tf.data.Dataset.from_tensor_slices((x, y)).batch(8))
    return clients


def main(rounds: str = "10"):
    """Trains, evaluates, and returns the losses of the rounds and of the evaluation."""
    clients = make_clients()
    # 0.4x: process = tff.learning.build_federated_averaging_process(
    # 0.86: process = tff.learning.algorithms.build_weighted_fed_avg(
    #           model_fn,
    #           client_optimizer_fn=lambda: tf.keras.optimizers.SGD(0.05),
    #           server_optimizer_fn=lambda: tf.keras.optimizers.Adam(0.1))
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn,
        client_optimizer_fn=build_keras_optimizer(tf.keras.optimizers.SGD(0.05)),
        server_optimizer_fn=build_keras_optimizer(tf.keras.optimizers.Adam(0.1)),
    )
    state, losses = process.initialize(), []
    for _ in range(int(rounds)):
        # 0.4x: state, metrics = process.next(state, clients); metrics["train"]["loss"]
        state, metrics = process.next(state, clients)
        losses.append(float(metrics["client_work"]["train"]["loss"]))
    # 0.4x: evaluation = tff.learning.build_federated_evaluation(model_fn)
    #       metrics = evaluation(state.model, clients); metrics["loss"]
    evaluation = tff.learning.algorithms.build_fed_eval(model_fn)
    # 0.4x: state.model; 0.86 as now:
    weights = process.get_model_weights(state)
    start = evaluation.set_model_weights(evaluation.initialize(), weights)
    output = evaluation.next(start, clients)
    loss = float(output.metrics["client_work"]["eval"]["current_round_metrics"]["loss"])
    print(f"loss {losses[0]:.4f} to {losses[-1]:.4f}; of the last model {loss:.4f}")
    print("sum and maximum over clients:", largest_sum([np.float32(x) for x in (1, 5, 2)]))
    return losses, loss


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
