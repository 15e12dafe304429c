"""One Adam step: a Keras optimizer as a pure TFF optimizer against its rivals.

Prints the median milliseconds of one step, and in brackets the time of ours divided by the rival's:
below 1 we are faster. All contenders take turns in one process on the same numbers.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from timing import table, time_side_by_side

import tff_optim

RATE = 0.001


def make_tensors(parameters: int, count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=parameters // count).astype("float32") for _ in range(count)]


def tff_step(optimizer, weights, gradients, **options):
    """A contender that keeps its state and weights as tensors from step to step."""
    step = tf.function(optimizer.next, **options)
    kept = [
        tf.nest.map_structure(
            tf.constant,
            optimizer.initialize([tf.TensorSpec(w.shape, w.dtype) for w in weights]),
        ),
        [tf.constant(w) for w in weights],
    ]
    gradients = [tf.constant(g) for g in gradients]

    def run():
        kept[0], kept[1] = step(kept[0], kept[1], gradients)
        kept[1][-1].numpy()

    return run


def keras_step(optimizer, weights, gradients):
    variables = [tf.Variable(w) for w in weights]
    gradients = [tf.constant(g) for g in gradients]
    if hasattr(optimizer, "build"):
        optimizer.build(variables)

    @tf.function
    def step():
        optimizer.apply_gradients(zip(gradients, variables))

    def run():
        step()
        variables[-1].numpy()

    return run


def optax_step(weights, gradients):
    import jax
    import optax

    optimizer = optax.adam(RATE, eps=1e-7)

    def step(state, weights, gradients):
        updates, state = optimizer.update(gradients, state, weights)
        return state, optax.apply_updates(weights, updates)

    step = jax.jit(step, donate_argnums=(0, 1))
    weights = [jax.numpy.asarray(w) for w in weights]
    kept = [optimizer.init(weights), weights]
    gradients = [jax.numpy.asarray(g) for g in gradients]

    def run():
        kept[0], kept[1] = step(kept[0], kept[1], gradients)
        jax.block_until_ready(kept[1])

    return run


def declearn_step(weights, gradients):
    import declearn.model.tensorflow
    from declearn.optimizer.modules import AdamModule

    vector = declearn.model.tensorflow.TensorflowVector
    module = AdamModule(beta_1=0.9, beta_2=0.999, eps=1e-7)
    kept = [vector({str(i): tf.constant(w) for i, w in enumerate(weights)})]
    gradients = vector({str(i): tf.constant(g) for i, g in enumerate(gradients)})
    last = str(len(weights) - 1)

    def run():
        kept[0] = kept[0] - module.run(gradients) * RATE
        kept[0].coefs[last].numpy()

    return run


def contenders(parameters: int, count: int):
    weights, gradients = make_tensors(parameters, count, 0), make_tensors(parameters, count, 1)
    ours = tff_optim.build_keras_optimizer(lambda: tf.keras.optimizers.Adam(RATE))
    theirs = tff.learning.optimizers.build_adam(RATE)
    runs = {
        "ours": tff_step(ours, weights, gradients),
        "ours, XLA": tff_step(ours, weights, gradients, jit_compile=True),
        "Keras": keras_step(tf.keras.optimizers.Adam(RATE), weights, gradients),
        "Keras legacy, fused": keras_step(
            tf.keras.optimizers.legacy.Adam(RATE), weights, gradients
        ),
        "TFF build_adam": tff_step(theirs, weights, gradients),
    }
    for name, make in [("optax, donated", optax_step), ("declearn", declearn_step)]:
        try:
            runs[name] = make(weights, gradients)
        except ImportError as error:
            print(f"{name} is left out: {error}. `make bench` installs it.")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--tensors", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    rows = []
    for parameters in arguments.parameters:
        for count in arguments.tensors:
            seconds = time_side_by_side(contenders(parameters, count), rounds=arguments.rounds)
            ours = seconds["ours"]
            cells = [f"{value * 1e3:.2f} ({ours / value:.2f})" for value in seconds.values()]
            rows.append([f"{parameters:.0e}", str(count), *cells])
    print(table(["parameters", "tensors", *seconds], rows))
    tff.test.set_no_default_context()


if __name__ == "__main__":
    main()
