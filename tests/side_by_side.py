"""Several optimizers in one run: what takes TFF long to build, it builds once for all of them."""

import collections

import problems
import tensorflow as tf
import tensorflow_federated as tff


class SideBySide(tff.learning.optimizers.Optimizer):
    """Steps each optimizer on two weights of its own, with a state of its own."""

    def __init__(self, optimizers):
        self._optimizers = {str(i): optimizer for i, optimizer in enumerate(optimizers)}

    def _pairs(self, values):
        """Two of a list or tuple for each optimizer."""
        return {name: values[2 * int(name) : 2 * int(name) + 2] for name in self._optimizers}

    @tf.autograph.experimental.do_not_convert
    def initialize(self, specs):
        # TFF's client work asks for hparams by one scalar weight.
        one = isinstance(specs, tf.TensorSpec)
        of_each = dict.fromkeys(self._optimizers, specs) if one else self._pairs(specs)
        return collections.OrderedDict(
            (name, optimizer.initialize(of_each[name]))
            for name, optimizer in self._optimizers.items()
        )

    @tf.autograph.experimental.do_not_convert
    def next(self, state, weights, gradients):
        weights_of, gradients_of = self._pairs(weights), self._pairs(gradients)
        new_state, new_weights = collections.OrderedDict(), []
        for name, optimizer in self._optimizers.items():
            new_state[name], stepped = optimizer.next(
                state[name], weights_of[name], gradients_of[name]
            )
            new_weights += stepped
        return new_state, tf.nest.pack_sequence_as(weights, new_weights)

    def get_hparams(self, state):
        return collections.OrderedDict(
            (name, optimizer.get_hparams(state[name]))
            for name, optimizer in self._optimizers.items()
        )

    def set_hparams(self, state, hparams):
        return collections.OrderedDict(
            (name, optimizer.set_hparams(state[name], hparams[name]))
            for name, optimizer in self._optimizers.items()
        )


def make_keras_model(count):
    """Linear layers beside each other, each as in `problems`, with two outputs of its own."""
    x = tf.keras.Input((3,))
    outputs = [
        tf.keras.layers.Dense(2, kernel_initializer=tf.keras.initializers.GlorotUniform(seed=1))(x)
        for _ in range(count)
    ]
    return tf.keras.Model(x, tf.keras.layers.Concatenate()(outputs) if count > 1 else outputs)


class SumOfMeans(tf.keras.losses.Loss):
    """The sum over layers of their mean squared errors: the gradients of each are those of it alone."""

    def call(self, y_true, y_pred):
        each = tf.reshape(y_pred, (-1, y_pred.shape[-1] // 2, 2)) - y_true[:, None]
        return tf.reduce_sum(tf.reduce_mean(each**2, axis=2), axis=1)


def variable_model(count):
    """A function that makes a TFF `VariableModel`."""
    return lambda: tff.learning.models.from_keras_model(
        make_keras_model(count), loss=SumOfMeans(), input_spec=problems.INPUT_SPEC
    )


def functional_model(count):
    """A TFF `FunctionalModel`."""
    return tff.learning.models.functional_model_from_keras(
        make_keras_model(count), SumOfMeans(), problems.INPUT_SPEC
    )
