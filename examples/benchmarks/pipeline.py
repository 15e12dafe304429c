"""One step of the optimizer pipeline against declearn's `Optimizer` and optax's chain.

FedProx, global clipping, Adam, momentum, decoupled weight decay: the same step in all of them, on
weights split into ten tensors. Prints the median time of a step and the ratios within this run, and
checks first that all of them take the same step.

    .venv-bench/bin/python examples/benchmarks/pipeline.py
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

tff.test.set_no_default_context()  # nothing here is federated

import tff_optim
from tff_optim import regularizers, transforms

LEARNING_RATE, ALPHA, MAX_NORM, DECAY = 0.01, 0.1, 1.0, 1e-4
TENSORS = 10
Step = Callable[[], object]


def make_values(parameters: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    size = parameters // TENSORS
    weights, gradients = (
        [rng.normal(size=size).astype(np.float32) for _ in range(TENSORS)] for _ in range(2)
    )
    return weights, gradients


def pipeline_step(weights: list, gradients: list, jit_compile: bool) -> Step:
    optimizer = tff_optim.build_optimizer(
        LEARNING_RATE,
        regularizers=[regularizers.FedProx(ALPHA)],
        transforms=[
            transforms.ClipByGlobalNorm(MAX_NORM),
            transforms.Adam(),
            transforms.Momentum(),
        ],
        weight_decay=DECAY,
        jit_compile=jit_compile,
    )
    next_fn = tf.function(optimizer.next)
    gradients = [tf.constant(g) for g in gradients]
    specs = [tf.TensorSpec(g.shape, g.dtype) for g in gradients]
    current = {
        "state": tf.nest.map_structure(tf.convert_to_tensor, optimizer.initialize(specs)),
        "weights": [tf.constant(w) for w in weights],
    }

    def step() -> list:
        current["state"], current["weights"] = next_fn(
            current["state"], current["weights"], gradients
        )
        return [w.numpy() for w in current["weights"][:1]]

    return step


def declearn_step(weights: list, gradients: list) -> Step:
    from declearn.model.tensorflow import TensorflowVector
    from declearn.optimizer import Optimizer

    optimizer = Optimizer(
        lrate=LEARNING_RATE,
        w_decay=DECAY,
        regularizers=[("fedprox", {"alpha": ALPHA})],
        modules=[("l2-global-clipping", {"max_norm": MAX_NORM}), "adam", "momentum"],
    )

    def vector(values: list) -> TensorflowVector:
        return TensorflowVector({str(i): tf.constant(v) for i, v in enumerate(values)})

    class Model:
        """The two methods that the optimizer calls, without a network around them."""

        def __init__(self) -> None:
            self.weights = vector(weights)

        def get_weights(self, trainable: bool) -> TensorflowVector:
            del trainable  # All of them are.
            return self.weights

        def apply_updates(self, updates: TensorflowVector) -> None:
            self.weights = self.weights + updates

    model, gradient = Model(), vector(gradients)
    optimizer.start_round()

    def step() -> list:
        optimizer.apply_gradients(model, gradient)
        return [model.weights.coefs["0"].numpy()]

    return step


def optax_step(weights: list, gradients: list) -> Step:
    import jax
    import optax

    chain = optax.chain(
        optax.clip_by_global_norm(MAX_NORM),
        optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-7),
        optax.trace(decay=0.9),
        optax.scale(-LEARNING_RATE),
        optax.add_decayed_weights(-DECAY),  # after the rate: decoupled from it
    )

    def update(state: object, weights: list, reference: list, gradients: list) -> tuple:
        gradients = [
            g + ALPHA * (w - r) for g, w, r in zip(gradients, weights, reference, strict=True)
        ]
        updates, state = chain.update(gradients, state, weights)
        return state, optax.apply_updates(weights, updates)

    compiled = jax.jit(update, donate_argnums=(0, 1))
    arrays = [jax.numpy.asarray(w) for w in weights]
    reference = [jax.numpy.array(w, copy=True) for w in weights]
    gradients = [jax.numpy.asarray(g) for g in gradients]
    current = {"state": chain.init(arrays), "weights": arrays}

    def step() -> list:
        current["state"], current["weights"] = compiled(
            current["state"], current["weights"], reference, gradients
        )
        jax.block_until_ready(current["weights"])
        return [np.asarray(current["weights"][0])]

    return step


CONTENDERS: dict[str, Callable[[list, list], Step]] = {
    "pipeline": lambda w, g: pipeline_step(w, g, jit_compile=False),
    "pipeline, jit_compile": lambda w, g: pipeline_step(w, g, jit_compile=True),
    "declearn": declearn_step,
    "optax": optax_step,
}


def check_agreement(contenders: dict) -> None:
    """Three steps of each from the same start: a rival that does less work is no rival."""
    weights, gradients = make_values(1000)
    ends = {}
    for name, make in contenders.items():
        step = make(weights, gradients)
        for _ in range(3):
            (ends[name],) = step()
    for name, end in ends.items():
        np.testing.assert_allclose(end, ends["pipeline"], rtol=2e-4, atol=2e-5, err_msg=name)


def time_interleaved(steps: dict[str, Step], seconds: float) -> dict[str, float]:
    """Median seconds per step; the contenders take turns, so that a noisy machine hits all."""
    for step in steps.values():
        step(), step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e5, 1e6, 1e7])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each size")
    arguments = parser.parse_args()

    contenders = dict(CONTENDERS)
    for rival in ("declearn", "optax"):
        try:
            __import__(rival)
        except ImportError as error:
            print(f"{rival} is not there and is left out ({error}); `make bench` installs it.")
            del contenders[rival]
    check_agreement(contenders)
    print("| parameters | " + " | ".join(f"{n}, ms" for n in contenders), end="")
    rivals = [name for name in contenders if not name.startswith("pipeline")]
    print("".join(f" | {rival} / jit_compile" for rival in rivals) + " |")
    print("|" + "---|" * (1 + len(contenders) + len(rivals)))
    for parameters in map(int, arguments.parameters):
        values = make_values(parameters)
        steps = {name: make(*values) for name, make in contenders.items()}
        times = time_interleaved(steps, arguments.seconds)
        ours = times["pipeline, jit_compile"]
        cells = [f"{parameters:.0e}"]
        cells += [f"{1e3 * times[name]:.2f}" for name in contenders]
        cells += [f"{times[rival] / ours:.1f}" for rival in rivals]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
