"""One Adam step: Keras', optax' and torch's as pure TFF optimizers, and their rivals.

Prints the median milliseconds of one step, and in brackets that time divided by what TFF's own
`build_adam` takes: below 1 is faster. All contenders take turns in one process on the same numbers. A
call takes several steps in one graph, as TFF does on a client; with --steps-per-call 1 the price of
handing hundreds of tensors from Python to TensorFlow, which Keras' variables do not pay, is in it too.
torch takes part if TORCH_PYTHON is the Python of an environment with torch (`make test-torch` makes
one), in a process of its own, as always.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import optax
import tensorflow as tf
import tensorflow_federated as tff
from timing import table, time_side_by_side

import tff_optim

RATE = 0.001
YARDSTICK = "TFF, build_adam"


def make_tensors(parameters: int, count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=parameters // count).astype("float32") for _ in range(count)]


def tff_steps(optimizer, weights, gradients, steps, **options):
    """A contender that keeps its state and weights as tensors from call to call."""
    gradients = [tf.constant(g) for g in gradients]

    @tf.function(**options)
    def call(state, weights):
        for _ in tf.range(steps):
            state, weights = optimizer.next(state, weights, gradients)
        return state, weights

    state = optimizer.initialize([tf.TensorSpec(w.shape, w.dtype) for w in weights])
    kept = [tf.nest.map_structure(tf.constant, state), [tf.constant(w) for w in weights]]
    call = call.get_concrete_function(*kept)  # traced here, not in the first call

    def run():
        kept[:] = call(*kept)
        kept[1][-1].numpy()

    return run


def keras_steps(optimizer, weights, gradients, steps):
    variables = [tf.Variable(w) for w in weights]
    gradients = [tf.constant(g) for g in gradients]
    if hasattr(optimizer, "build"):
        optimizer.build(variables)

    @tf.function
    def call():
        for _ in tf.range(steps):
            optimizer.apply_gradients(zip(gradients, variables))

    def run():
        call()
        variables[-1].numpy()

    return run


def optax_steps(weights, gradients, steps):
    optimizer = optax.adam(RATE, eps=1e-7)

    def step(_, kept):
        state, weights = kept
        updates, state = optimizer.update(gradients, state, weights)
        return state, optax.apply_updates(weights, updates)

    call = jax.jit(lambda kept: jax.lax.fori_loop(0, steps, step, kept), donate_argnums=0)
    weights = [jax.numpy.asarray(w) for w in weights]
    gradients = [jax.numpy.asarray(g) for g in gradients]
    kept = [(optimizer.init(weights), weights)]

    def run():
        kept[0] = call(kept[0])
        jax.block_until_ready(kept[0])

    return run


def declearn_steps(weights, gradients, steps):
    import declearn.model.tensorflow
    from declearn.optimizer.modules import AdamModule

    vector = declearn.model.tensorflow.TensorflowVector
    module = AdamModule(beta_1=0.9, beta_2=0.999, eps=1e-7)
    kept = [vector({str(i): tf.constant(w) for i, w in enumerate(weights)})]
    gradients = vector({str(i): tf.constant(g) for i, g in enumerate(gradients)})

    def run():
        for _ in range(steps):
            kept[0] = kept[0] - module.run(gradients) * RATE
        kept[0].coefs[str(len(weights) - 1)].numpy()

    return run


def contenders(parameters: int, count: int, steps: int):
    problem = make_tensors(parameters, count, 0), make_tensors(parameters, count, 1), steps
    keras = tff_optim.build_keras_optimizer(lambda: tf.keras.optimizers.Adam(RATE))
    from_optax = tff_optim.build_optax_optimizer(optax.adam, learning_rate=RATE, eps=1e-7)
    runs = {
        YARDSTICK: tff_steps(tff.learning.optimizers.build_adam(RATE), *problem),
        "ours, Keras": tff_steps(keras, *problem),
        "ours, Keras, XLA": tff_steps(keras, *problem, jit_compile=True),
        "ours, optax": tff_steps(from_optax, *problem),
    }
    if python := os.environ.get("TORCH_PYTHON"):
        torch = tff_optim.build_torch_optimizer("Adam", lr=RATE, eps=1e-7, python=python)
        runs["ours, torch"] = tff_steps(torch, *problem)
    runs |= {
        "Keras": keras_steps(tf.keras.optimizers.Adam(RATE), *problem),
        "Keras legacy, fused": keras_steps(tf.keras.optimizers.legacy.Adam(RATE), *problem),
        "optax, XLA, donated": optax_steps(*problem),
    }
    try:
        runs["declearn"] = declearn_steps(*problem)
    except ImportError as error:
        print(f"declearn is left out: {error}. `make bench` installs it.")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--tensors", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--steps-per-call", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    steps = arguments.steps_per_call
    headers, rows = ["Adam of"], {}
    for parameters in arguments.parameters:
        for count in arguments.tensors:
            runs = contenders(parameters, count, steps)
            seconds = time_side_by_side(runs, rounds=arguments.rounds, warm_up=2)
            headers.append(f"{parameters:.0e} in {count}")
            for name, value in seconds.items():
                ratio = value / seconds[YARDSTICK]
                rows.setdefault(name, [name]).append(f"{value * 1e3 / steps:.2f} ({ratio:.2f})")
    print(table(headers, list(rows.values())))
    tff.test.set_no_default_context()


if __name__ == "__main__":
    main()
