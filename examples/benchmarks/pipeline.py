"""The optimizer pipeline against declearn's `Optimizer` and optax's chain.

FedProx, global clipping, Adam, momentum, decoupled weight decay: the same steps in all of them, on
weights split into ten tensors. The pipeline and optax run ten steps in one graph, as in a client's
training loop; declearn has no graph and is called step by step. The pipeline runs plainly, with
its step compiled by XLA, and with the caller's whole loop compiled, as optax's is. Prints the median
time of a step and ratios within this run, to the best of the pipeline's columns, after a check that
all of them take the same steps.

    .venv-bench/bin/python examples/benchmarks/pipeline.py
"""

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from timing import table, time_side_by_side

import tff_optim
from tff_optim import regularizers, transforms

LEARNING_RATE, ALPHA, MAX_NORM, DECAY = 0.01, 0.1, 1.0, 1e-4
TENSORS, STEPS = 10, 10
Run = Callable[[], np.ndarray]  # takes STEPS steps, gives the first tensor of weights


def make_values(parameters: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    size = parameters // TENSORS
    weights, gradients = (
        [rng.normal(size=size).astype(np.float32) for _ in range(TENSORS)] for _ in range(2)
    )
    return weights, gradients


def run_pipeline(
    weights: list,
    gradients: list,
    jit_compile: bool = False,
    jit_loop: bool = False,
    in_graph: bool = True,
) -> Run:
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
    steps_per_call = STEPS if in_graph else 1

    @tf.function(jit_compile=jit_loop or None)
    def next_fn(state: dict, weights: tuple, gradients: tuple) -> tuple:
        for _ in tf.range(steps_per_call):
            state, weights = optimizer.next(state, weights, gradients)
        return state, weights

    gradients = tuple(tf.constant(g) for g in gradients)
    specs = tuple(tf.TensorSpec(g.shape, g.dtype) for g in gradients)
    current = {
        "state": tf.nest.map_structure(tf.convert_to_tensor, optimizer.initialize(specs)),
        "weights": tuple(tf.constant(w) for w in weights),
    }

    def run() -> np.ndarray:
        for _ in range(STEPS // steps_per_call):
            current["state"], current["weights"] = next_fn(
                current["state"], current["weights"], gradients
            )
        return current["weights"][0].numpy()

    return run


def run_declearn(weights: list, gradients: list) -> Run:
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

    def run() -> np.ndarray:
        for _ in range(STEPS):
            optimizer.apply_gradients(model, gradient)
        return model.weights.coefs["0"].numpy()

    return run


def run_optax(weights: list, gradients: list) -> Run:
    import jax
    import optax

    chain = optax.chain(
        optax.clip_by_global_norm(MAX_NORM),
        optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-7),
        optax.trace(decay=0.9),
        optax.scale(-LEARNING_RATE),
        optax.add_decayed_weights(-DECAY),  # after the rate: decoupled from it
    )

    def update(carried: tuple, reference: list, gradients: list) -> tuple:
        state, weights = carried
        pulled = [
            g + ALPHA * (w - r) for g, w, r in zip(gradients, weights, reference, strict=True)
        ]
        updates, state = chain.update(pulled, state, weights)
        return state, optax.apply_updates(weights, updates)

    def loop(carried: tuple, reference: list, gradients: list) -> tuple:
        return jax.lax.fori_loop(0, STEPS, lambda _, c: update(c, reference, gradients), carried)

    compiled = jax.jit(loop, donate_argnums=0)
    reference = [jax.numpy.array(w, copy=True) for w in weights]
    gradients = [jax.numpy.asarray(g) for g in gradients]
    arrays = [jax.numpy.array(w, copy=True) for w in weights]
    current = {"carried": (chain.init(arrays), arrays)}

    def run() -> np.ndarray:
        current["carried"] = compiled(current["carried"], reference, gradients)
        jax.block_until_ready(current["carried"])
        return np.asarray(current["carried"][1][0])

    return run


CONTENDERS: dict[str, Callable[[list, list], Run]] = {
    "pipeline": run_pipeline,
    "step compiled": lambda w, g: run_pipeline(w, g, jit_compile=True),
    "loop compiled": lambda w, g: run_pipeline(w, g, jit_loop=True),
    "step compiled, called from Python": lambda w, g: run_pipeline(w, g, True, in_graph=False),
    "declearn": run_declearn,
    "optax": run_optax,
}
OURS = ("pipeline", "step compiled", "loop compiled")


def check_agreement(contenders: dict) -> None:
    """Steps of each from the same start: a rival that does less work is no rival."""
    weights, gradients = make_values(1000)
    ends = {name: make(weights, gradients)() for name, make in contenders.items()}
    for name, end in ends.items():
        assert np.abs(end - weights[0]).max() > 1e-3
        np.testing.assert_allclose(end, ends["pipeline"], rtol=1e-3, atol=1e-4, err_msg=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e5, 1e6, 1e7])
    arguments = parser.parse_args()
    tff.test.set_no_default_context()  # nothing here is federated

    contenders = dict(CONTENDERS)
    for rival in ("declearn", "optax"):
        try:
            __import__(rival)
        except ImportError as error:
            print(f"{rival} is not there and is left out ({error}); `make bench` installs it.")
            del contenders[rival]
    check_agreement(contenders)
    rivals = [name for name in contenders if name in ("declearn", "optax")]
    headers = [
        "parameters",
        *(f"{n}, ms" for n in contenders),
        *(f"{r} / best of ours" for r in rivals),
    ]
    rows = []
    for parameters in map(int, arguments.parameters):
        values = make_values(parameters)
        runs = {name: make(*values) for name, make in contenders.items()}
        rounds = max(4, min(20, int(2e7) // parameters))
        times = time_side_by_side(runs, rounds=rounds, warm_up=1)
        rows.append([f"{parameters:.0e}", *(f"{1e3 * times[n] / STEPS:.2f}" for n in contenders)])
        best = min(times[name] for name in OURS)
        rows[-1] += [f"{times[rival] / best:.1f}" for rival in rivals]
    print(table(headers, rows))


if __name__ == "__main__":
    main()
