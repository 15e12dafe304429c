"""A round written by hand for TFF 0.40, below what it was; `porting.py` has what builders do.

python examples/porting_round.py [ROUNDS]
"""

import sys

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from porting import make_clients, model_fn

from tff_optim import build_keras_optimizer

# 0.40: tff.SequenceType(model_fn().input_spec)
DATA = tff.SequenceType(tff.types.tensorflow_to_type(model_fn().input_spec))
# 0.40: tff.learning.framework.weights_type_from_model(model_fn)
WEIGHTS = tff.learning.models.weights_type_from_model(model_fn)
# 0.40: tf.keras.optimizers.SGD(0.05), made inside of the computation
CLIENT = build_keras_optimizer(tf.keras.optimizers.SGD(0.05))
SERVER = build_keras_optimizer(tf.keras.optimizers.Adam(0.1))
SPECS = [tf.TensorSpec(v.shape, v.dtype) for v in model_fn().trainable_variables]


# 0.40: @tff.tf_computation
@tff.tensorflow.computation
def start():
    """The server's weights, and its optimizer's state: `tf.Variable`s of an optimizer in 0.40."""
    return tff.learning.models.ModelWeights.from_model(model_fn()), SERVER.initialize(SPECS)


STATE = start.type_signature.result


@tf.function
def loop(model, data, before):
    """One client: how its weights have changed, and how many examples it has."""
    variables = list(model.trainable_variables)
    tf.nest.map_structure(lambda v, w: v.assign(w), variables, before)
    state, examples = CLIENT.initialize(SPECS), 0.0
    for batch in data:
        with tf.GradientTape() as tape:
            output = model.forward_pass(batch)
        gradients = tape.gradient(output.loss, variables)
        # 0.40: optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        state, new = CLIENT.next(state, variables, gradients)
        tf.nest.map_structure(lambda v, w: v.assign(w), variables, new)
        examples += tf.cast(output.num_examples, tf.float32)
    return [w - v for w, v in zip(before, variables)], examples


# 0.40: @tff.tf_computation(DATA, WEIGHTS)
@tff.tensorflow.computation(DATA, WEIGHTS)
def train(data, weights):
    """The same, with a model of its own."""
    return loop(model_fn(), data, list(weights.trainable))


# 0.40: @tff.tf_computation(STATE, train.type_signature.result[0])
@tff.tensorflow.computation(STATE, train.type_signature.result[0])
def update(state, gradients):
    """The server's step."""
    weights, optimizer = state
    optimizer, trainable = SERVER.next(optimizer, list(weights.trainable), list(gradients))
    return tff.learning.models.ModelWeights(trainable, weights.non_trainable), optimizer


@tff.federated_computation
def initialize():
    """The state at the server. In 0.40 `tff.federated_value(start(), tff.SERVER)` was as good."""
    return tff.federated_eval(start, tff.SERVER)


# 0.40: @tff.federated_computation(tff.type_at_server(STATE), tff.type_at_clients(DATA))
@tff.federated_computation(
    tff.FederatedType(STATE, tff.SERVER), tff.FederatedType(DATA, tff.CLIENTS)
)
def step(state, data):
    """A round, as it was: broadcast, train, mean, update."""
    sent = tff.federated_broadcast(state[0])
    changes, examples = tff.federated_map(train, (data, sent))
    # 0.40: tff.federated_apply(update, (state, mean))
    mean = tff.federated_mean(changes, examples)
    return tff.federated_map(update, (state, mean)), tff.federated_sum(examples)


def main(rounds: str = "3"):
    """Trains and returns the weights of the model."""
    process = tff.templates.IterativeProcess(initialize, step)
    state, clients = process.initialize(), make_clients()
    for _ in range(int(rounds)):
        state, examples = process.next(state, clients)
    print(f"{examples:.0f} examples a round; {np.ravel(state[0].trainable[0]).round(3)}")
    return state[0].trainable


if __name__ == "__main__":
    main(*sys.argv[1:])
