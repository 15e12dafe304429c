"""How far one client among twenty can move each rule's mean, by the kind of its lie.

Twenty clients with updates of about unit length, half of which they share; the last one lies. Two
honest rounds come first, so that running scales are known. Each cell is

    |update with the liar - update of the nineteen honest| / |update of the nineteen honest|

for one round, the median over ten draws. Plain averaging of twenty honest clients has about 0.1.

    python examples/benchmarks/influence.py
"""

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow_federated as tff

import aggregators
from aggregators import rules, scores, weighting

SHAPES = [(20, 5), (5,)]
MODEL = tff.to_type([(np.float32, shape) for shape in SHAPES])
NUMBER = tff.FederatedType(np.float32, tff.CLIENTS)
CLIENTS = 20

RULES = {
    "plain_mean": rules.plain_mean(),
    "adaptive_mean, KL near": rules.adaptive_mean(scores.kl_divergence, weighting.softmax()),
    "adaptive_mean, KL near, bound 4": rules.adaptive_mean(
        scores.kl_divergence, weighting.softmax(bound=4.0)
    ),
    "adaptive_mean, KL far": rules.adaptive_mean(
        scores.kl_divergence, weighting.softmax(prefer="far")
    ),
    "adaptive_mean, low loss": rules.adaptive_mean("loss", weighting.softmax()),
    "fed_att": rules.fed_att(),
    "loss_gated": rules.loss_gated(),
    "q_fed_avg, q 1": rules.q_fed_avg(1.0, 0.1),
    "fed_nova": rules.fed_nova(),
    "fed_nova, max_steps 20": rules.fed_nova(max_steps=20),
    "redescending_mean": rules.redescending_mean(),
    "jury_mean, votes by direction": rules.jury_mean(votes="direction"),
}

# What the liar changes: a factor of its update, and what it claims.
LIES: dict[str, dict[str, float]] = {
    "honest": {},
    "update x 10": {"update": 10.0},
    "update x -10": {"update": -10.0},
    "update x 1e6": {"update": 1e6},
    "update x 1e-3": {"update": 1e-3},
    "100 x examples": {"weight": 3000.0},
    "loss 0": {"loss": 0.0},
    "loss 1e6": {"loss": 1e6},
    "1e6 steps": {"steps": 1e6},
}


def one_round(rule: aggregators.Rule) -> Any:
    """A computation of one round of a rule: `(state, model, deltas, loss, steps, weight)`."""
    state = aggregators.rule_state(rule, MODEL).type_signature.result

    @tff.federated_computation(
        tff.FederatedType(state, tff.SERVER),
        tff.FederatedType(MODEL, tff.SERVER),
        tff.FederatedType(MODEL, tff.CLIENTS),
        NUMBER,
        NUMBER,
        NUMBER,
    )
    def run(state: Any, model: Any, deltas: Any, loss: Any, steps: Any, weight: Any) -> Any:
        return aggregators.federated_rule(
            rule,
            deltas,
            state,
            server_model=model,
            weight=weight,
            loss=loss if rule.needs.loss else None,
            steps=steps if rule.needs.steps else None,
            value_is="delta",
        )

    return run


def cohort(rng: np.random.Generator) -> dict[str, list[Any]]:
    """Honest clients."""
    size = sum(np.prod(shape) for shape in SHAPES)
    shared = [rng.normal(size=shape) / np.sqrt(2 * size) for shape in SHAPES]
    return {
        "deltas": [
            [np.float32(s + rng.normal(size=s.shape) / np.sqrt(2 * size)) for s in shared]
            for _ in range(CLIENTS)
        ],
        "loss": list(rng.uniform(0.5, 1.5, CLIENTS).astype(np.float32)),
        "steps": list(rng.integers(5, 11, CLIENTS).astype(np.float32)),
        "weight": list(rng.integers(20, 41, CLIENTS).astype(np.float32)),
    }


def lie(clients: dict[str, list[Any]], lies: dict[str, float]) -> dict[str, list[Any]]:
    """The same clients, the last of which lies."""
    told = {name: list(column) for name, column in clients.items()}
    told["deltas"][-1] = [np.float32(lies.get("update", 1.0)) * d for d in told["deltas"][-1]]
    for name in ("loss", "steps", "weight"):
        told[name][-1] = np.float32(lies.get(name, told[name][-1]))
    return told


def flat(update: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(tensor) for tensor in update]).astype(np.float64)


def influence(rule: aggregators.Rule, draws: int) -> dict[str, float]:
    run = one_round(rule)
    found: dict[str, list[float]] = {name: [] for name in LIES}
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        model = [np.float32(rng.normal(size=shape)) for shape in SHAPES]
        state = aggregators.rule_state(rule, MODEL)()
        for _ in range(2):
            state = run(state, model, *cohort(rng).values()).state
        clients = cohort(rng)
        honest = {name: column[:-1] for name, column in clients.items()}
        without = flat(run(state, model, *honest.values()).result)
        for name, lies in LIES.items():
            moved = flat(run(state, model, *lie(clients, lies).values()).result) - without
            found[name].append(np.linalg.norm(moved) / np.linalg.norm(without))
    return {name: float(np.median(values)) for name, values in found.items()}


def main() -> None:
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        print("| rule | " + " | ".join(LIES) + " |")
        print("|---" * (len(LIES) + 1) + "|")
        for name, rule in RULES.items():
            cells = influence(rule, draws=10).values()
            print(f"| {name} | " + " | ".join(f"{cell:.2g}" for cell in cells) + " |", flush=True)
    finally:
        tff.test.set_no_default_context()  # ends the worker


if __name__ == "__main__":
    main()
