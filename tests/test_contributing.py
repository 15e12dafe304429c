"""The rule that CONTRIBUTING.md writes, in every door; and what it promises about forgotten places."""

import asyncio
import pathlib
import re

import federated_twin as twin
import numpy as np
import pytest
import runtimes
import tensorflow as tf
import tensorflow_federated as tff
from problems import model_fn

import aggregators
from aggregators import rules, scores, weighting

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCK, *_ = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)

SGD = tff.learning.optimizers.build_sgdm(twin.RATE)
DATA = twin.make_data()
LIMIT = 0.4


@pytest.fixture(scope="module")
def rule():
    assert len(BLOCK.partition("def damped_mean")[2].splitlines()) <= 10
    namespace: dict = {}
    exec(compile(BLOCK, "CONTRIBUTING.md", "exec"), namespace)
    made = namespace["damped_mean"](LIMIT)
    assert made == namespace["damped_mean"](limit=LIMIT) != namespace["damped_mean"]()
    assert repr(made) == f"damped_mean(limit={LIMIT})"
    return made


def damped(weights, clients, memory):
    del memory  # the rule keeps nothing
    norms = [np.sqrt(sum(np.sum(d**2) for d in c["delta"])) for c in clients]
    raw = [[c["examples"] / (1 + norm / LIMIT)] for c, norm in zip(clients, norms, strict=True)]
    return twin.twins.weighted_mean([c["delta"] for c in clients], np.array(raw), twin.MODEL)


def trained(process, rounds=3):
    state = process.initialize()
    for _ in range(rounds):
        output = process.next(state, twin.datasets(DATA))
        state = output.state
    return state, output.metrics


def test_as_a_process_and_on_two_workers_and_in_tensorboard(rule, tmp_path):
    process = aggregators.build_fed_avg(model_fn, SGD, rule=rule)
    expected = twin.simulate(3, DATA, damped)
    state, metrics = trained(process)
    with runtimes.two_workers():
        spread, _ = trained(process)
    for found in (state, spread):
        for a, b in zip(found.global_model_weights.trainable, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    asyncio.run(tff.program.TensorBoardReleaseManager(tmp_path).release(metrics, key=3))
    (events,) = pathlib.Path(tmp_path).glob("events*")
    shown = {
        value.tag: tf.make_ndarray(value.tensor)
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "scalars"
    }
    assert shown["aggregator/clients"] == len(DATA)
    assert 1.0 < shown["aggregator/effective_clients"] < len(DATA)
    assert process.get_hparams(state)["aggregator"] == {"limit": LIMIT}


def test_as_a_factory_in_tffs_builder(rule):
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, SGD, model_aggregator=aggregators.RuleFactory(rule)
    )
    state, _ = trained(process)
    for a, b in zip(
        state.global_model_weights.trainable, twin.simulate(3, DATA, damped), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_inside_a_round(rule):
    kind = tff.to_type([(np.float32, [2]), (np.float32, [3])])
    start = aggregators.rule_state(rule, kind)

    @tff.federated_computation(
        tff.FederatedType(start.type_signature.result, tff.SERVER),
        tff.FederatedType(kind, tff.CLIENTS),
    )
    def run(state, deltas):
        return aggregators.federated_rule(rule, deltas, state, value_is="delta")

    rng = np.random.default_rng(1)
    deltas = [[np.float32(rng.normal(size=n)) for n in (2, 3)] for _ in range(4)]
    output = run(start(), deltas)
    expected = damped(None, [{"delta": d, "examples": 1} for d in deltas], {})
    for a, b in zip(output.result, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_guides_name_every_rule_score_and_weighting():
    pages = "".join(path.read_text() for path in (ROOT / "docs/pages").rglob("*.md"))
    named = [f"rules.{name}" for name in rules.__all__]
    named += [score.name for score in scores.ALL]
    named += ["softmax", "power", "uniform"]
    assert [name for name in named if f"`{name}" not in pages] == []


def test_no_score_is_missing_from_the_list():
    made = {one for one in vars(scores).values() if isinstance(one, scores.Score)}
    assert made == set(scores.ALL)
    assert all(one.is_own is False for one in (weighting.softmax(), weighting.power()))


def test_every_place_that_is_named_exists():
    named = re.findall(r"`([\w/.]+\.(?:py|md|cfg|lock))`", TEXT)
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).exists()] == []
    for place, name in re.findall(r"`([A-Z_]{3,})` (?:of|in) `([\w/]+\.py)`", TEXT):
        assert re.search(rf"^{place}\b", (ROOT / name).read_text(), re.M), (place, name)
