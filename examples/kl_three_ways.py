"""KL weighting by three ways that agree: weights on the clients, in the stream, a whole process.

python examples/kl_three_ways.py [ROUNDS]
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from aggregators import federated_rule, rules, scores, weighting

KL, SOFTMAX = scores.kl_divergence, weighting.softmax(temperature=0.5)
RULE = rules.adaptive_mean(KL, SOFTMAX, layers="model")  # one weight per client
MODEL = tff.learning.models.functional_model_from_keras(
    tf.keras.Sequential([tf.keras.layers.Dense(1, kernel_initializer="zeros", input_shape=(3,))]),
    tf.keras.losses.MeanSquaredError(),
    (tf.TensorSpec([None, 3]), tf.TensorSpec([None, 1])),
)
SGD = tff.learning.optimizers.build_sgdm(0.05)


def on_the_clients() -> tff.learning.templates.LearningProcess:
    """Each client sends one number: any weighted aggregator of TFF goes on, a secure sum too."""
    work = tff.learning.templates.build_functional_model_delta_client_work(
        model=MODEL, optimizer=SGD, client_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES
    )
    work = aggregators.build_self_weighting_client_work(work, KL, SOFTMAX)
    return aggregators.compose_fed_avg(MODEL, work, tff.aggregators.MeanFactory())


def in_the_stream() -> tff.templates.IterativeProcess:
    """A round of your own: `federated_rule` stands where `tff.federated_mean` would stand."""
    weights_type = tff.to_type(((np.float32, [3, 1]), (np.float32, [1])))
    data_type = tff.types.SequenceType(tff.types.tensorflow_to_type(MODEL.input_spec))
    rule_state = aggregators.rule_state(RULE, weights_type)
    state_type = tff.to_type((weights_type, rule_state.type_signature.result))

    @tff.tensorflow.computation(weights_type, data_type)
    def train(weights, data):
        def step(seen, batch):
            (kernel, bias), examples = seen
            x, y = batch
            slope = 2 * (x @ kernel + bias - y) / tf.cast(tf.size(y), tf.float32)
            new = kernel - 0.05 * tf.transpose(x) @ slope, bias - 0.05 * tf.reduce_sum(slope, 0)
            return new, examples + tf.cast(tf.size(y), tf.float32)

        return data.reduce((tuple(weights), 0.0), step)

    @tff.federated_computation
    def initialize():
        start = tff.tensorflow.computation(lambda: (tuple(MODEL.initial_weights[0]), rule_state()))
        return tff.federated_eval(start, tff.SERVER)

    @tff.federated_computation(
        tff.FederatedType(state_type, tff.SERVER), tff.FederatedType(data_type, tff.CLIENTS)
    )
    def next_round(state, data):
        model, rule = state[0], state[1]
        trained, n = tff.federated_map(train, (tff.federated_broadcast(model), data))
        ended = federated_rule(RULE, trained, rule, server_model=model, weight=n, sample_size=6)
        return tff.federated_zip((ended.result, ended.state)), ended.measurements

    return tff.templates.IterativeProcess(initialize, next_round)


def main(rounds: str = "5"):
    """Trains by all three; returns the weights of each, and the clients' weights of each round."""
    rng, clients = np.random.default_rng(0), []
    for k in range(6):  # one truth, which the last client has upside down
        x = np.float32(rng.normal(size=(rng.integers(8, 40), 3)))
        y = x @ np.float32([[1], [-2], [0.5]]) * (-1 if k == 5 else 1)
        clients.append(tf.data.Dataset.from_tensor_slices((x, y)).batch(8))
    whole = aggregators.build_fed_avg(MODEL, SGD, rule=RULE)
    processes = [on_the_clients(), in_the_stream(), whole]
    states, shares = [process.initialize() for process in processes], []
    for number in range(int(rounds)):
        outputs = [process.next(state, clients) for process, state in zip(processes, states)]
        states = [outputs[0].state, outputs[1][0], outputs[2].state]
        shares.append(outputs[1][1]["sample_weights"].round(3))
        print(f"round {number + 1}: weights of the clients {shares[-1]}")
    by_way = [states[0].global_model_weights, states[1][0], states[2].global_model_weights]
    by_way = [np.concatenate([np.ravel(w) for w in tf.nest.flatten(ws)]) for ws in by_way]
    print("weights on the clients, in the stream, whole process:", *by_way, sep="\n")
    return by_way, shares


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
