"""Every aggregation rule of the package, with its twin: the table behind the suites of laws.

A rule joins the suites by a line in `CASES`. `test_rules.py` fails when a public rule or weighting
is in none.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import aggregation_twins as twins
import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from aggregators import rules, scores, weighting
from aggregators.core.update import client_update

SHAPES = [(2, 3), (3,), (4,)]
GROUPS = ((0, 1), (2,))
DELTA_TYPE = tff.to_type([(np.float32, shape) for shape in SHAPES])
WEIGHT_TYPE = tff.to_type(np.float32)
LAYERS = {"tensor": ((0,), (1,), (2,)), "model": ((0, 1, 2),)}


@attrs.frozen
class Case:
    """A rule, what it covers of the public names, and its NumPy twin.

    `twin(clients, weights, memory)` returns the mean; `memory` is a dictionary of its own that it
    may keep things in from round to round.
    """

    name: str
    covers: tuple[str, ...]
    rule: aggregators.Rule
    twin: Callable[[list[dict], list[float], dict], list[np.ndarray]]
    sample_size: int = 2
    fewest: int = attrs.field(default=1, kw_only=True)  # clients that a cohort must have

    @property
    def num_layers(self) -> int:
        layers = self.rule.needs.layers
        return len(LAYERS[layers] if isinstance(layers, str) else layers)

    @property
    def plain(self) -> bool:
        """Whether the rule gets along with the update alone."""
        score = self.rule.needs.score
        needed = () if score is None or score.needs == "model" else (score.name,)
        return self.rule.needs.names == needed


def client(rng: np.random.Generator, num_layers: int) -> dict[str, Any]:
    """One client's training, made up."""
    return {
        "delta": [rng.normal(size=shape).astype(np.float32) for shape in SHAPES],
        "scores": (rng.gamma(2.0, 1e-4, size=num_layers)).astype(np.float32),
        "loss": np.float32(rng.uniform(0.3, 3.0)),
        "steps": int(rng.integers(1, 9)),
        "errors": rng.uniform(0.2, 0.8, size=5).astype(np.float32),
    }


def values(case: Case, clients: list[dict], weights: list[float]) -> tuple[list[Any], list[float]]:
    """The clients' updates and weights as the case's factory takes them."""
    if case.plain:
        return [c["delta"] for c in clients], weights
    needs, sent = case.rule.needs, []
    for c, weight in zip(clients, weights, strict=True):
        found = {
            "scores": tf.constant(c["scores"]),
            "loss": tf.constant(c["loss"]),
            "steps": tf.constant(c["steps"]),
            "errors_are_losses": tf.constant(bool(c["steps"] % 2)),
        }
        if needs.candidates is not None:
            found["candidate_errors"] = tf.constant(c["errors"][: needs.candidates.number])
        asked = {field: found[field] for field in needs.fields}
        update = client_update(c["delta"], tf.constant(weight), **asked)
        measured = OrderedDict((name, getattr(update, f)) for f, name in needs.fields.items())
        value = aggregators.MeasuredUpdate(list(update.delta), measured, update.non_finite)
        sent.append((value, np.float32(update.weight)))
    return [update for update, _ in sent], [weight for _, weight in sent]


def value_type(case: Case, delta_type: Any = DELTA_TYPE) -> Any:
    if case.plain:
        return delta_type
    kinds: dict[str, Any] = {
        "steps": np.int32,
        "training_loss": np.float32,
        "initial_loss": np.float32,
        "errors_are_losses": np.bool_,
    }
    if case.rule.needs.candidates is not None:
        kinds["candidate_errors"] = (np.float32, [case.rule.needs.candidates.number])
    measured = [
        (name, tff.to_type(kinds.get(name, (np.float32, [case.num_layers]))))
        for name in case.rule.needs.names
    ]
    return tff.types.StructWithPythonType(
        [
            ("delta", delta_type),
            ("measured", tff.types.StructWithPythonType(measured, OrderedDict)),
            ("non_finite", tff.to_type(np.bool_)),
        ],
        aggregators.MeasuredUpdate,
    )


def _adaptive(
    name: str,
    covers: str,
    chosen: weighting.Weighting,
    rule: Callable[[np.ndarray], np.ndarray],
    layers: Any = "tensor",
    score: Any = scores.kl_divergence,
) -> Case:
    groups = LAYERS[layers] if isinstance(layers, str) else layers

    def scores_of(c: dict) -> np.ndarray:
        if score == "loss":
            return np.full(len(groups), c["loss"])
        if score.needs == "model":
            return c["scores"]
        return np.array([score_twin([c["delta"][t] for t in group]) for group in groups])

    def score_twin(delta: list[np.ndarray]) -> float:
        return UPDATE_TWINS[score]([np.zeros_like(d) for d in delta], delta)

    def twin(clients: list[dict], weights: list[float], memory: dict) -> list[np.ndarray]:
        return adaptive_mean(chosen, rule, groups, clients, scores_of, weights, memory)

    made = rules.adaptive_mean(score, chosen, layers=layers)
    return Case(name, ("adaptive_mean", covers), made, twin)


UPDATE_TWINS = {
    scores.l2_distance: twins.l2,
    scores.spectral_distance: twins.spectral,
}


def adaptive_mean(chosen, rule, groups, clients, scores_of, weights, memory):
    """The twin of `rules.adaptive_mean`, running scale included."""
    return twins.adaptive_mean(
        [c["delta"] for c in clients],
        [scores_of(c) for c in clients],
        weights,
        memory,
        rule=rule,
        groups=groups,
        scale=getattr(chosen.scale, "value", chosen.scale) or 1.0,
        keep=chosen.decay.value,
        bound=chosen.bound and chosen.bound.value,
        times_examples=chosen.times_examples,
    )


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


def _plain_twin(clients: list[dict], weights: list[float], memory: dict) -> list[np.ndarray]:
    del memory  # the rule keeps nothing
    raw = np.float64(weights)[:, None]
    return twins.weighted_mean([c["delta"] for c in clients], raw, LAYERS["model"])


def _att_mean(clients: list[dict], weights: list[float], memory: dict) -> list[np.ndarray]:
    del memory  # the rule keeps nothing
    kept = [c["delta"] for c, n in zip(clients, weights, strict=True) if n > 0]
    norms = np.array([[np.linalg.norm(np.float64(t)) for t in delta] for delta in kept])
    return twins.weighted_mean(kept, np.exp((norms - norms.max(0)) / 2.0), LAYERS["tensor"])


def _not_fallen(min_decrease: float) -> Callable[[float, float | None], float]:
    def share(loss: float, previous: float | None) -> float:
        return float(previous is not None and not loss < (1 - min_decrease) * previous)

    return share


def _gated_twin(
    chosen: weighting.Weighting,
    rule: Callable,
    gate: Callable[[float, float | None], float],
) -> Callable[..., list[np.ndarray]]:
    def twin(clients: list[dict], weights: list[float], memory: dict) -> list[np.ndarray]:
        groups = LAYERS["tensor"]
        adaptive = adaptive_mean(
            chosen, rule, groups, clients, lambda c: c["scores"], weights, memory
        )
        plain = _plain_twin(clients, weights, memory)
        losses = [c["loss"] for c in clients]
        return twins.gated(adaptive, plain, losses, weights, memory, gate)

    return twin


def _redescending_twin(**numbers: float) -> Callable[..., list[np.ndarray]]:
    def twin(clients: list[dict], weights: list[float], memory: dict) -> list[np.ndarray]:
        return twins.redescending([c["delta"] for c in clients], weights, memory, **numbers)

    return twin


def jury_twin(
    candidates: tuple[str, ...], layers: str = "model", direction: bool = False, **numbers: float
) -> Callable[..., list[np.ndarray]]:
    """The twin of `rules.jury_mean` with candidates of softmax weights of temperature 1."""
    groups = LAYERS[layers]

    def scores_of(name: str, c: dict) -> np.ndarray:
        found = c["scores"] if name == "kl" else np.full(len(groups), c["loss"])
        return found.astype(np.float64)

    def twin(clients: list[dict], weights: list[float], memory: dict) -> list[np.ndarray]:
        raw = []
        for name in candidates:
            found = np.array([scores_of(name, c) for c in clients])
            sound = np.all(np.isfinite(found) & (found >= 0), 1) & (np.float64(weights) > 0)
            typical = memory.setdefault(f"typical {name}", np.zeros(len(groups)))
            relative = np.where(sound[:, None], found, 0.0) / np.where(typical > 0, typical, 1.0)
            by = np.where(typical > 0, np.exp(-relative), 1.0)
            by = np.ones_like(by) if name == "uniform" else np.float64(weights)[:, None] * by
            raw.append(np.where(sound[:, None], by, 0.0))
            if sound.any():
                memory[f"typical {name}"] = twins.next_typical(typical, found[sound].mean(0))

        def vote(k: int, memory: dict) -> Any:
            if direction:
                return twins.cosine_vote(clients[k]["delta"])(memory)
            errors = np.float64(clients[k]["errors"])
            number = len(candidates) + ("stride_step" in numbers)
            return errors[0] - errors[1 : 1 + number]

        deltas = [c["delta"] for c in clients]
        return twins.jury(deltas, weights, raw, vote, memory, groups=groups, **numbers)

    return twin


def _of_deltas(
    twin: Callable[..., list[np.ndarray]], *numbers: float
) -> Callable[..., list[np.ndarray]]:
    """The twin of a rule that looks at updates alone, each counting once."""
    return lambda clients, weights, memory: twin([c["delta"] for c in clients], *numbers)


TWO_CANDIDATES = [("loss", weighting.softmax()), (scores.kl_divergence, weighting.softmax())]
THREE_CANDIDATES = [*TWO_CANDIDATES, ("loss", weighting.uniform(times_examples=False))]


def _power(exponent: float, floor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda r: np.maximum(r, floor) ** exponent


_NEAR = weighting.softmax(0.7, decay=0.25)

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
    _adaptive(
        "loss-softmax",
        "softmax",
        weighting.softmax(0.5, prefer="far", bound=9.0),
        lambda r: np.exp(r / 0.5),
        score="loss",
    ),
    Case("plain", ("plain_mean",), rules.plain_mean(), _plain_twin),
    Case(
        "fed-att",
        ("fed_att",),
        rules.fed_att(0.7, temperature=2.0),
        lambda clients, weights, memory: [0.7 * t for t in _att_mean(clients, weights, memory)],
    ),
    Case("q-fed-avg", ("q_fed_avg",), rules.q_fed_avg(1.5, 0.05), _q_twin(1.5, 0.05)),
    Case("fed-nova", ("fed_nova",), rules.fed_nova(), _nova_twin(0.0)),
    Case("fed-nova-momentum", ("fed_nova",), rules.fed_nova(0.9), _nova_twin(0.9)),
    Case(
        "loss-gated",
        ("loss_gated",),
        rules.loss_gated(_NEAR, min_decrease=0.05),
        _gated_twin(_NEAR, lambda r: np.exp(-r / 0.7), _not_fallen(0.05)),
    ),
    Case(
        "loss-gated-fallen",
        ("loss_gated",),
        rules.loss_gated(_NEAR, gate="fallen", loss_at="initial"),
        _gated_twin(_NEAR, lambda r: np.exp(-r / 0.7), twins.fallen),
    ),
    Case(
        "loss-gated-by-share",
        ("loss_gated",),
        rules.loss_gated(_NEAR, gate=lambda seen: tf.minimum(0.3 * seen.loss / 3.0, 1.0)),
        _gated_twin(_NEAR, lambda r: np.exp(-r / 0.7), lambda loss, previous: 0.1 * loss),
    ),
    Case(
        "coordinate-median",
        ("coordinate_median",),
        rules.coordinate_median(),
        _of_deltas(twins.coordinate_median),
    ),
    Case(
        "trimmed-mean",
        ("trimmed_mean",),
        rules.trimmed_mean(0.25),
        _of_deltas(twins.trimmed_mean, 0.25),
    ),
    Case(
        "multi-krum",
        ("multi_krum",),
        rules.multi_krum(0, 2),
        _of_deltas(twins.multi_krum, 0, 2),
        fewest=3,
    ),
    Case(
        "geometric-median",
        ("geometric_median",),
        rules.geometric_median(5, smoothing=0.01),
        lambda clients, weights, memory: twins.geometric_median(
            [c["delta"] for c in clients], weights, 5, 0.01
        ),
    ),
    Case(
        "centered-clipping",
        ("centered_clipping",),
        rules.centered_clipping(2.5),
        lambda clients, weights, memory: twins.centered_clipping(
            [c["delta"] for c in clients], memory, 2.5
        ),
    ),
    Case(
        "redescending",
        ("redescending_mean",),
        rules.redescending_mean(),
        _redescending_twin(),
    ),
    Case(
        "redescending-otherwise",
        ("redescending_mean",),
        rules.redescending_mean(
            cutoff=0.9, power=1.5, initial_norm=4.0, norm_quantile=0.7, norm_rate=0.5
        ),
        _redescending_twin(cutoff=0.9, power=1.5, start=4.0, quantile=0.7, rate=0.5),
    ),
    Case("jury", ("jury_mean",), rules.jury_mean(), jury_twin(("loss",))),
    Case(
        "jury-direction",
        ("jury_mean",),
        rules.jury_mean(
            votes="direction", sharpness=10.0, margin=0.1, cutoff=4.0, initial_norm=3.0
        ),
        jury_twin(("loss",), direction=True, sharpness=10.0, margin=0.1, cutoff=4.0, start=3.0),
    ),
    Case(
        "jury-two-candidates",
        ("jury_mean",),
        rules.jury_mean(
            TWO_CANDIDATES,
            layers="tensor",
            sharpness=3.0,
            vote_decay=0.3,
            gap_decay=0.2,
            vote_limit=1.5,
            vote_floor=0.02,
        ),
        jury_twin(
            ("loss", "kl"),
            "tensor",
            sharpness=3.0,
            vote_decay=0.3,
            gap_decay=0.2,
            limit=1.5,
            floor=0.02,
        ),
    ),
    Case(
        "jury-stride",
        ("jury_mean",),
        rules.jury_mean(
            THREE_CANDIDATES,
            layers="tensor",
            margin=0.2,
            gap_decay=0.8,
            stride_step=0.05,
            initial_norm=None,
        ),
        jury_twin(
            ("loss", "kl", "uniform"),
            "tensor",
            margin=0.2,
            gap_decay=0.8,
            stride_step=0.05,
            start=None,
        ),
    ),
]

# One for each kind of part that a rule may have: a score, layers, a scale, a bound, a reduction.
QUICK = [
    "softmax-near",
    "softmax-bounded",
    "update-spectral",
    "loss-softmax",
    "plain",
    "fed-att",
    "q-fed-avg",
    "fed-nova-momentum",
    "loss-gated",
    "redescending-otherwise",
    "jury-two-candidates",
]

_processes: dict[str, tff.templates.AggregationProcess] = {}


def process(case: Case) -> tff.templates.AggregationProcess:
    """The case's process, built once for all suites."""
    if case.name not in _processes:
        factory = aggregators.RuleFactory(case.rule, sample_size=case.sample_size)
        _processes[case.name] = factory.create(value_type(case), WEIGHT_TYPE)
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
        output = process(case).next(state, *values(case, clients, weights))
        state = output.state
        outputs.append(output)
    return outputs


def flat(measurements: OrderedDict) -> dict[str, np.ndarray]:
    """Measurements by name; those per layer as a vector in the layers' order."""
    return {
        name: np.array(list(found.values())) if isinstance(found, dict) else np.asarray(found)
        for name, found in measurements.items()
    }
