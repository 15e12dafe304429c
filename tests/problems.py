"""Tiny learning problems for tests that need a whole TFF process."""

import collections

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

INPUT_SPEC = collections.OrderedDict(
    x=tf.TensorSpec((None, 3), tf.float32), y=tf.TensorSpec((None, 2), tf.float32)
)


def make_keras_model() -> tf.keras.Model:
    """One linear layer, with weights that are not zero."""
    return tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer((3,)),
            tf.keras.layers.Dense(
                2, kernel_initializer=tf.keras.initializers.GlorotUniform(seed=1), name="dense"
            ),
        ]
    )


def model_fn() -> tff.learning.models.VariableModel:
    return tff.learning.models.from_keras_model(
        make_keras_model(), loss=tf.keras.losses.MeanSquaredError(), input_spec=INPUT_SPEC
    )


def reconstruction_model_fn() -> tff.learning.models.ReconstructionModel:
    """Two linear layers, of which the second belongs to the client."""
    model = tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer((3,)),
            tf.keras.layers.Dense(2, kernel_initializer="ones", name="shared"),
            tf.keras.layers.Dense(2, kernel_initializer="ones", name="own"),
        ]
    )
    return tff.learning.models.ReconstructionModel.from_keras_model_and_layers(
        keras_model=model,
        global_layers=model.layers[:1],
        local_layers=model.layers[1:],
        input_spec=INPUT_SPEC,
    )


def make_clients(count: int = 3, batches: int = 3, seed: int = 0) -> list[tf.data.Dataset]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(3, 2))
    clients = []
    for _ in range(count):
        x = rng.normal(size=(4 * batches, 3))
        y = x @ truth + rng.normal(scale=0.1, size=(4 * batches, 2))
        data = collections.OrderedDict(x=x.astype("float32"), y=y.astype("float32"))
        clients.append(tf.data.Dataset.from_tensor_slices(data).batch(4))
    return clients


def train_in_keras(client_fn, server_fn, rounds: int, clients: list[tf.data.Dataset]) -> list:
    """Weighted federated averaging written with eager Keras: the truth for TFF's processes."""
    server = make_keras_model()
    server_optimizer = server_fn()
    for _ in range(rounds):
        initial = [v.numpy() for v in server.trainable_variables]
        total, delta = 0.0, [np.zeros_like(w) for w in initial]
        for data in clients:
            model, optimizer = make_keras_model(), client_fn()
            model.set_weights(server.get_weights())
            for batch in data:
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((model(batch["x"]) - batch["y"]) ** 2)
                gradients = tape.gradient(loss, model.trainable_variables)
                optimizer.apply_gradients(zip(gradients, model.trainable_variables))
            count = sum(len(batch["x"]) for batch in data)
            total += count
            trained = model.trainable_variables
            delta = [d + count * (w - v.numpy()) for d, w, v in zip(delta, initial, trained)]
        server_optimizer.apply_gradients(
            zip([tf.constant(d / total, tf.float32) for d in delta], server.trainable_variables)
        )
    return [v.numpy() for v in server.trainable_variables]
