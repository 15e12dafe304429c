"""Every aggregation rule of the package, with its twin: the table behind the suites of laws.

A rule joins the suites by a line in `CASES`. `test_rules.py` fails when a public factory or
weighting is in none.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import aggregation_twins as twins
import attrs
import numpy as np
import tensorflow_federated as tff

import aggregators
from aggregators import scores, weighting

SHAPES = [(2, 3), (3,), (4,)]
GROUPS = ((0, 1), (2,))
DELTA_TYPE = tff.to_type([(np.float32, shape) for shape in SHAPES])
WEIGHT_TYPE = tff.to_type(np.float32)


@attrs.frozen
class Case:
    """A factory, what it covers of the public names, and its NumPy twin.

    `twin(clients, weights, memory)` returns the mean; `memory` is a dictionary of its own that it
    may keep things in from round to round.
    """

    name: str
    covers: tuple[str, ...]
    factory: Callable[[], tff.aggregators.WeightedAggregationFactory]
    twin: Callable[[list[dict], list[float], dict], list[np.ndarray]]
    num_layers: int = 3
    scored: bool = True


def client(rng: np.random.Generator, num_layers: int) -> dict[str, Any]:
    """One client's training, made up."""
    return {
        "delta": [rng.normal(size=shape).astype(np.float32) for shape in SHAPES],
        "scores": (rng.gamma(2.0, 1e-4, size=num_layers)).astype(np.float32),
        "loss": np.float32(rng.uniform(0.3, 3.0)),
        "steps": int(rng.integers(1, 9)),
        "non_finite": False,
    }


def value(case: Case, clients: list[dict]) -> list[Any]:
    """The clients as the case's factory takes them."""
    if not case.scored:
        return [c["delta"] for c in clients]
    return [aggregators.ScoredUpdate(**c) for c in clients]


def value_type(case: Case) -> Any:
    if not case.scored:
        return DELTA_TYPE
    return tff.types.StructWithPythonType(
        [
            ("delta", DELTA_TYPE),
            ("scores", tff.to_type((np.float32, [case.num_layers]))),
            ("loss", tff.to_type(np.float32)),
            ("steps", tff.to_type(np.int32)),
            ("non_finite", tff.to_type(np.bool_)),
        ],
        aggregators.ScoredUpdate,
    )


def _adaptive(
    name: str,
    covers: str,
    chosen: weighting.Weighting,
    rule: Callable[[np.ndarray], np.ndarray],
    layers: Any = "tensor",
    score: Any = None,
) -> Case:
    groups = {"tensor": ((0,), (1,), (2,)), "model": ((0, 1, 2),)}.get(layers, layers)

    def scores_of(c: dict) -> np.ndarray:
        if score is None:
            return c["scores"]
        return np.array([score_twin([c["delta"][t] for t in group]) for group in groups])

    def score_twin(delta: list[np.ndarray]) -> float:
        return UPDATE_TWINS[score]([np.zeros_like(d) for d in delta], delta)

    def twin(clients: list[dict], weights: list[float], memory: dict) -> list[np.ndarray]:
        return adaptive_mean(chosen, rule, groups, clients, scores_of, weights, memory)

    return Case(
        name,
        ("AdaptiveMeanFactory", covers),
        lambda: aggregators.AdaptiveMeanFactory(chosen, layers=layers, score=score, sample_size=2),
        twin,
        num_layers=len(groups),
        scored=score is None,
    )


UPDATE_TWINS = {
    scores.l2_distance: twins.l2,
    scores.spectral_distance: twins.spectral,
}


def adaptive_mean(chosen, rule, groups, clients, scores_of, weights, memory):
    """The twin of `AdaptiveMeanFactory`, running scale included."""
    found = np.array([scores_of(c) for c in clients], np.float64)
    typical = memory.setdefault("typical", np.zeros(len(groups)))
    fixed = np.full(len(groups), 1.0 if chosen.scale is None else chosen.scale, object)
    scale = typical if chosen.scale == "running" else np.asarray(fixed, np.float64)
    raw = twins.raw_weights(
        found,
        weights,
        rule=rule,
        scale=scale,
        typical=typical,
        bound=chosen.bound,
        times_examples=chosen.times_examples,
    )
    mean = found[np.array(weights) > 0].mean(0)
    first = not np.all(typical > 0)
    memory["typical"] = mean if first else chosen.memory * typical + (1 - chosen.memory) * mean
    return twins.weighted_mean([c["delta"] for c in clients], raw, groups)


def _q_twin(q: float, learning_rate: float) -> Callable[..., list[np.ndarray]]:
    def twin(clients: list[dict], weights: list[float], memory: dict) -> list[np.ndarray]:
        del memory  # the rule keeps nothing
        kept = [c for c, w in zip(clients, weights, strict=True) if w > 0]
        return twins.q_fed_avg(
            [c["delta"] for c in kept],
            [float(c["loss"]) for c in kept],
            q=q,
            learning_rate=learning_rate,
        )

    return twin


def _nova_twin(momentum: float) -> Callable[..., list[np.ndarray]]:
    def twin(clients: list[dict], weights: list[float], memory: dict) -> list[np.ndarray]:
        del memory  # the rule keeps nothing
        return twins.fed_nova(
            [c["delta"] for c in clients],
            [c["steps"] for c in clients],
            weights,
            momentum=momentum,
        )

    return twin


def _gated_twin(
    chosen: weighting.Weighting, rule: Callable, when_fallen: bool, min_decrease: float
) -> Callable[..., list[np.ndarray]]:
    def twin(clients: list[dict], weights: list[float], memory: dict) -> list[np.ndarray]:
        groups = ((0,), (1,), (2,))
        adaptive = adaptive_mean(
            chosen, rule, groups, clients, lambda c: c["scores"], weights, memory
        )
        share = np.float64(weights) / np.sum(weights)
        loss = np.sum(share * [float(c["loss"]) for c in clients])
        previous = memory.get("loss")
        memory["loss"] = loss
        fell = previous is not None and loss < (1 - min_decrease) * previous
        if previous is not None and fell == when_fallen:
            return adaptive
        plain = np.repeat(share[:, None], 3, 1)
        return twins.weighted_mean([c["delta"] for c in clients], plain, groups)

    return twin


def _power(exponent: float, floor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda r: np.maximum(r, floor) ** exponent


_NEAR = weighting.softmax(0.7, memory=0.25)

CASES = [
    _adaptive("softmax-near", "softmax", _NEAR, lambda r: np.exp(-r / 0.7)),
    _adaptive(
        "softmax-far-fixed",
        "softmax",
        weighting.softmax(2.0, prefer="far", scale=1e-4, times_examples=False),
        lambda r: np.exp(r / 2.0),
        layers="model",
    ),
    _adaptive(
        "softmax-bounded",
        "softmax",
        weighting.softmax(0.3, bound=4.0),
        lambda r: np.exp(-r / 0.3),
        layers=GROUPS,
    ),
    _adaptive("power", "power", weighting.power(-1.5, floor=0.4), _power(-1.5, 0.4)),
    _adaptive("uniform", "uniform", weighting.uniform(), np.ones_like),
    _adaptive(
        "update-l2",
        "softmax",
        weighting.softmax(prefer="far", scale=None, times_examples=False),
        np.exp,
        layers=GROUPS,
        score=scores.l2_distance,
    ),
    _adaptive(
        "update-spectral",
        "power",
        weighting.power(0.5, scale=None, bound=1.5),
        _power(0.5, 1e-3),
        score=scores.spectral_distance,
    ),
    Case(
        "q-fed-avg",
        ("QFedAvgFactory",),
        lambda: aggregators.QFedAvgFactory(1.5, 0.05),
        _q_twin(1.5, 0.05),
    ),
    Case("fed-nova", ("FedNovaFactory",), lambda: aggregators.FedNovaFactory(), _nova_twin(0.0)),
    Case(
        "fed-nova-momentum",
        ("FedNovaFactory",),
        lambda: aggregators.FedNovaFactory(0.9),
        _nova_twin(0.9),
    ),
    Case(
        "loss-gated",
        ("LossGatedMeanFactory",),
        lambda: aggregators.LossGatedMeanFactory(_NEAR, min_decrease=0.05),
        _gated_twin(_NEAR, lambda r: np.exp(-r / 0.7), False, 0.05),
    ),
    Case(
        "loss-gated-fallen",
        ("LossGatedMeanFactory",),
        lambda: aggregators.LossGatedMeanFactory(_NEAR, adaptive_when="fallen"),
        _gated_twin(_NEAR, lambda r: np.exp(-r / 0.7), True, 0.0),
    ),
]

_processes: dict[str, tff.templates.AggregationProcess] = {}


def process(case: Case) -> tff.templates.AggregationProcess:
    """The case's process, built once for all suites."""
    if case.name not in _processes:
        _processes[case.name] = case.factory().create(value_type(case), WEIGHT_TYPE)
    return _processes[case.name]


def rounds(case: Case, seed: int, sizes: tuple[int, ...] = (4, 3, 5)) -> list[tuple[list, list]]:
    """Cohorts of several rounds: `(clients, weights)` each."""
    rng = np.random.default_rng(seed)
    return [
        (
            [client(rng, case.num_layers) for _ in range(size)],
            [float(n) for n in rng.integers(1, 40, size)],
        )
        for size in sizes
    ]


def run(case: Case, cohorts: list[tuple[list, list]]) -> list[Any]:
    """The outputs of consecutive rounds, under whatever context is set."""
    state = process(case).initialize()
    outputs = []
    for clients, weights in cohorts:
        output = process(case).next(state, value(case, clients), weights)
        state = output.state
        outputs.append(output)
    return outputs


def typed(measurements: OrderedDict) -> dict[str, np.ndarray]:
    return {name: np.asarray(found) for name, found in measurements.items()}
