"""Writes tests/declearn_vectors.json: steps that declearn's own `Optimizer` takes.

Needs declearn and NumPy only, in an environment of its own:

    python -m venv .venv-declearn && .venv-declearn/bin/pip install declearn==2.9.1
    .venv-declearn/bin/python examples/benchmarks/declearn_vectors.py

Each entry is a configuration as `Optimizer.get_config` writes it, and the weights after each step.
"""

import json
import pathlib
from typing import Any

import numpy as np
from declearn.model.sklearn import NumpyVector
from declearn.optimizer import (
    Optimizer,
    list_optim_modules,
    list_optim_regularizers,
    list_rate_schedulers,
)

STEPS = 7
TARGET = pathlib.Path(__file__).parents[2] / "tests" / "declearn_vectors.json"
RATES = {
    "exponential-decay": {"base": 0.2, "rate": 0.75},
    "piecewise-decay": {"base": 0.2, "rate": 0.5, "step_size": 2},
    "inverse-scaling": {"base": 0.2, "rate": 0.6},
    "linear-decay": {"base": 0.2, "rate": 0.25},
    "polynomial-decay": {"base": 0.2, "power": 2, "limit": 5},
    "cosine-annealing": {"base": 0.05, "max_lr": 0.3, "duration": 4},
    "cosine-annealing-warm-restarts": {"base": 0.05, "max_lr": 0.3, "period": 3, "t_mult": 0.5},
    "cyclic-triangular": {"base": 0.05, "max_lr": 0.3, "stepsize": 2, "decay": True},
    "cyclic-exp-range": {"base": 0.05, "max_lr": 0.3, "stepsize": 2, "decay": 0.75},
    "warmup": {"base": ("exponential-decay", {"base": 0.2, "rate": 0.5}), "warmup": 3},
}
MODULES: dict[str, dict[str, Any]] = {
    "momentum": {"beta": 0.5, "nesterov": True},
    "ewma": {"beta": 0.75},
    "yogi-momentum": {"beta": 0.75},
    "adagrad": {"eps": 0.125},
    "rmsprop": {"beta": 0.75, "eps": 0.125},
    "adam": {"beta_1": 0.75, "beta_2": 0.875, "amsgrad": True, "eps": 0.125},
    "yogi": {"beta_1": 0.75, "beta_2": 0.875, "amsgrad": True, "eps": 0.125},
    "l2-clipping": {"max_norm": 1.5},
    "l2-global-clipping": {"max_norm": 1.5},
}


class Model:
    """The two methods of a model that an optimizer calls."""

    def __init__(self, weights: list[np.ndarray]):
        self.weights = vector(weights)

    def get_weights(self, trainable: bool) -> NumpyVector:
        """The weights."""
        del trainable  # All of them are.
        return self.weights

    def apply_updates(self, updates: NumpyVector) -> None:
        """Adds to the weights."""
        self.weights = self.weights + updates


def vector(arrays: list[np.ndarray]) -> NumpyVector:
    return NumpyVector({str(i): array for i, array in enumerate(arrays)})


def optimizers() -> dict[str, Optimizer]:
    """One for each module, regularizer and scheduler, off its defaults and at them, and all at once."""
    found = {"plain": Optimizer(lrate=0.1, w_decay=0.05)}
    for name, arguments in MODULES.items():
        found[name] = Optimizer(lrate=0.1, modules=[(name, arguments)])
        found[f"{name}, default"] = Optimizer(lrate=0.1, modules=[name])
    for name in list_optim_regularizers():
        found[name] = Optimizer(lrate=0.1, regularizers=[(name, {"alpha": 0.75})])
        found[f"{name}, default"] = Optimizer(lrate=0.1, regularizers=[name])
    for name, arguments in RATES.items():
        found[name] = Optimizer(lrate=(name, arguments))
        found[f"{name}, decay"] = Optimizer(lrate=0.1, w_decay=(name, arguments))
    found["warmup of a number"] = Optimizer(lrate=("warmup", {"base": 0.2, "warmup": 3}))
    found["everything"] = Optimizer(
        lrate=("cosine-annealing", RATES["cosine-annealing"]),
        w_decay=("warmup", {"base": 0.01, "warmup": 2}),
        regularizers=["fedprox", ("lasso", {"alpha": 0.1}), "ridge"],
        modules=["l2-global-clipping", "adam", ("momentum", {"beta": 0.25})],
    )
    return found


def main() -> None:
    """Runs all of them on the same weights and gradients."""
    rng = np.random.default_rng(3)
    shapes = [(2, 3), (4,)]
    weights = [rng.normal(size=shape).round(3) for shape in shapes]
    gradients = [[rng.normal(size=shape).round(3) for shape in shapes] for _ in range(STEPS)]
    runs = {}
    for name, optimizer in optimizers().items():
        config = optimizer.get_config()
        model = Model(weights)
        optimizer.start_round()
        path = []
        for row in gradients:
            optimizer.apply_gradients(model, vector(row))
            path.append([w.round(12).tolist() for w in model.weights.coefs.values()])
        runs[name] = {"config": config, "weights": path}
    written = {
        "made by": "examples/benchmarks/declearn_vectors.py",
        "names": {
            "modules": sorted(list_optim_modules()),
            "regularizers": sorted(list_optim_regularizers()),
            "schedulers": sorted(list_rate_schedulers()),
        },
        "weights": [w.tolist() for w in weights],
        "gradients": [[g.tolist() for g in row] for row in gradients],
        "runs": runs,
    }
    TARGET.write_text(json.dumps(written, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
