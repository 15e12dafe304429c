"""The redescending and the jury mean over many rounds, and the models that clients score for it."""

import functools
import json
import pathlib

import aggregation_twins as twins
import federated_twin as twin
import numpy as np
import pytest
import rule_contracts as contracts
import runtimes
import selection
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near
from problems import model_fn

import aggregators
from aggregators import rules, scores, weighting
from aggregators.core.candidates import Candidates

SGD = tff.learning.optimizers.build_sgdm(twin.RATE)
DATA = twin.make_data()
NAMES = ("redescending", "jury", "jury-direction", "jury-two-candidates", "jury-stride")
CASES = {case.name: case for case in contracts.CASES if case.name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_twin_over_many_rounds_of_good_and_bad_clients(name):
    case = CASES[name]
    cohorts = contracts.rounds(case, seed=21, sizes=(4, 3, 5, 6) * 3)
    sent, kept = [], []
    for number, (clients, weights) in enumerate(cohorts):
        rng = np.random.default_rng(number)
        clients[0]["delta"][0] *= 30.0  # huge, and counted
        bad = [contracts.client(rng, case.num_layers) for _ in range(4)]
        bad[0]["delta"][1][0] = np.nan
        bad[1]["loss"] = bad[1]["errors"][1] = np.float32(np.nan)
        if case.plain:
            bad[1]["delta"][2][0] = np.inf
        bad[3]["scores"] = np.full_like(bad[3]["scores"], -1.0)  # no divergence: flagged
        own = [3.0, 2.0, 0.0, 4.0]
        everybody, numbers = [*bad, *clients], [*own, *weights]
        if number % 7 == 3:
            everybody, numbers = bad[:3], own[:3]  # nobody is left
            kept.append(([], []))
        else:
            kept.append(([bad[3], *clients], [4.0, *weights]))
        sent.append((everybody, numbers))
    memory = {}
    for output, (clients, weights) in zip(contracts.run(case, sent), kept, strict=True):
        assert output.measurements["non_finite_clients"] == 2
        assert output.measurements["zero_weight_clients"] == 1
        assert output.measurements["clients"] == len(clients)
        if not clients:
            assert output.measurements["unchanged"] == 1
            continue
        expected = case.twin(clients, weights, memory)
        for a, b in zip(output.result, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(output.state["typical_norm"], memory["norm"], rtol=1e-6)
        if name != "redescending":
            np.testing.assert_allclose(output.state["share"], memory["share"], atol=1e-5)
        if name == "jury-stride":
            np.testing.assert_allclose(output.state["stride"], memory["stride"], rtol=1e-4)
            np.testing.assert_allclose(output.measurements["stride"], memory["stride"], rtol=1e-4)
            np.testing.assert_allclose(output.state["vote_scale"], memory["scale"], rtol=1e-6)
        if name in ("jury", "jury-two-candidates", "jury-stride"):
            by_loss = sum(c["steps"] % 2 for c in clients)  # as the contracts make them up
            assert output.measurements["loss_voting_clients"] == by_loss
        if name in ("jury-two-candidates", "jury-stride"):
            assert output.measurements["clients_without_score"]["kl_divergence"] == 1
    assert memory["norm"] > 1.2  # the state went somewhere


def test_the_listing_shows_the_weights_that_the_mean_was_made_with():
    case = CASES["jury"]
    cohorts = contracts.rounds(case, seed=14, sizes=(2,) * 8)
    for clients, _ in cohorts:
        clients[0]["delta"] = [30.0 * x for x in clients[0]["delta"]]  # shrunk
        clients[0]["loss"] = np.float32(3.0)
    for output, (clients, _) in zip(contracts.run(case, cohorts), cohorts, strict=True):
        used = contracts.flat(output.measurements)["sample_weights"]  # of one layer
        assert used[0] < 0.2 * used[1]
        for position, tensor in enumerate(output.result):
            mean = sum(w * c["delta"][position] for w, c in zip(used, clients, strict=True))
            np.testing.assert_allclose(tensor, mean, rtol=1e-4, atol=1e-5)


def second_order(server, client):
    """The KL divergence of softmaxed tensors to second order: half a variance."""
    change = tf.cast(client[0] - server[0], tf.float64)
    p = tf.nn.softmax(tf.cast(server[0], tf.float64))
    return tf.reduce_sum(p * (change - tf.reduce_sum(p * change)) ** 2) / 2.0


def test_equals_the_reference_vectors_of_a_jury_with_a_stride():
    vectors = json.loads((pathlib.Path(__file__).parent / "jury_vectors.json").read_text())
    near = scores.Score(second_order, name="near")
    candidates = [("loss", weighting.softmax()), (near, weighting.softmax())]
    rule = rules.jury_mean(
        [*candidates, ("loss", weighting.uniform(times_examples=False))],
        layers=[(0,), (1,)],
        margin=0.2,
        gap_decay=0.8,
        stride_step=0.05,
        initial_norm=None,
    )
    cut = np.cumsum(vectors["sizes"])[:-1]

    def parts(numbers):
        return np.split(np.array(numbers), cut)

    delta_type = tff.to_type([(np.float64, [size]) for size in vectors["sizes"]])
    case = contracts.Case("vectors", (), rule, lambda *_: None)
    process = aggregators.RuleFactory(rule).create(
        contracts.value_type(case, delta_type), contracts.WEIGHT_TYPE
    )
    state = process.initialize()
    for number, expected in enumerate(vectors["rounds"]):
        model = parts(expected["x"])
        candidates = rule.needs.candidates.of([tf.constant(x) for x in model], state)
        flat = [np.concatenate(candidate) for candidate in candidates]
        np.testing.assert_allclose(flat, expected["candidates"], rtol=1e-6)
        clients = []
        for sent in expected["clients"]:
            moved = parts(sent["delta"])
            pairs = zip(model, moved, strict=True)
            clients.append(
                {
                    "delta": [-x for x in moved],
                    "scores": np.float32([second_order([x], [x + d]) for x, d in pairs]),
                    "loss": np.float32(sent["loss"]),
                    "errors": np.float32(sent["errors"]),
                    "steps": 1,
                }
            )
        weights = [float(sent["n"]) for sent in expected["clients"]]
        output = process.next(state, *contracts.values(case, clients, weights))
        state, truth = output.state, expected["state"]
        np.testing.assert_allclose(
            np.concatenate(output.result), -np.array(expected["update"]), 1e-5
        )
        for name, found in (
            ("norm", state["typical_norm"]),
            ("loss", state["loss_typical_score"][0]),
            ("near", state["near_typical_score"]),
            ("gap", [-np.concatenate(gap) for gap in state["gap"]]),
            ("share", [*state["share"], state["stride"]]),
            ("agree", state["agreement"]),
            ("size", state["vote_size"]),
            ("scale", state["vote_scale"]),
        ):
            np.testing.assert_allclose(
                found, truth[name], rtol=1e-5, atol=1e-7, err_msg=f"{name} of round {number}"
            )


def mse(weights, x, y):
    return np.mean((np.float64(x) @ weights[0] + weights[1] - y) ** 2)


def jury_in_numpy(error=mse, **numbers):
    """Combines whole clients of `federated_twin` by the jury mean, candidates and all."""

    def combine(weights, clients, memory):
        losses = np.array([[c["loss"]] for c in clients])
        typical = memory.setdefault("typical", np.zeros(1))
        by = np.exp(-losses / typical) if typical > 0 else np.ones_like(losses)
        memory["typical"] = twins.next_typical(typical, losses.mean(0))
        examples = np.array([c["examples"] for c in clients], np.float64)

        def vote(k, memory):
            (share,), (gap,) = memory["share"], memory["gap"]
            a = [w + share * g for w, g in zip(weights, gap, strict=True)]
            b = [w - (1 - share) * g for w, g in zip(weights, gap, strict=True)]
            return [error(a, *DATA[k]) - error(b, *DATA[k])]

        deltas = [c["delta"] for c in clients]
        return twins.jury(
            deltas, examples, [examples[:, None] * by], vote, memory, groups=twin.MODEL, **numbers
        )

    return combine


def trained(process, rounds):
    state, outputs = process.initialize(), []
    for _ in range(rounds):
        outputs.append(process.next(state, twin.datasets(DATA)))
        state = outputs[-1].state
    return process.get_model_weights(state).trainable, outputs


@functools.cache
def built(model):
    rule = rules.jury_mean(sharpness=5.0, margin=-0.1, cutoff=1.5)
    return aggregators.build_fed_avg(model(), SGD, rule=rule)


@pytest.mark.parametrize(
    "model",
    selection.params(
        {"pure": twin.functional_model, "variable": lambda: model_fn},
        ["pure"],
    ),
)
def test_a_process_equals_numpy(model):
    process = built(model)
    weights, outputs = trained(process, 6)
    expected = twin.simulate(6, DATA, jury_in_numpy(sharpness=5.0, margin=-0.1, cutoff=1.5))
    for a, b in zip(weights, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # A regression has no classes, and its clients vote by their loss.
    assert outputs[-1].metrics["aggregator"]["loss_voting_clients"] == len(DATA)
    shares = [float(output.metrics["aggregator"]["share"]) for output in outputs]
    assert max(shares) - min(shares) > 0.2  # the votes moved it
    # What the clients' training reports is that of their training alone.
    plain = aggregators.build_fed_avg(model(), SGD)
    first = plain.next(plain.initialize(), twin.datasets(DATA)).metrics["client_work"]["train"]
    tf.nest.map_structure(
        assert_near,
        outputs[0].metrics["client_work"]["train"],
        first,
    )


@pytest.mark.slow  # the rule in pieces, and processes in pieces, are quick in their own tests
@pytest.mark.parametrize("in_pieces", runtimes.IN_PIECES.values(), ids=runtimes.IN_PIECES)
def test_a_process_gives_the_same_in_pieces(in_pieces):
    process = built(twin.functional_model)
    weights, _ = trained(process, 6)
    with in_pieces(3):
        pieces, _ = trained(process, 6)
    for a, b in zip(weights, pieces, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_votes_by_a_function_of_ones_own():
    def largest(predictions, labels):
        return tf.reduce_max(tf.abs(predictions - labels), axis=1)

    def in_numpy(weights, x, y):
        return np.mean(np.max(np.abs(np.float64(x) @ weights[0] + weights[1] - y), axis=1))

    rule = rules.jury_mean(votes=largest, sharpness=5.0, margin=-0.1)
    weights, _ = trained(aggregators.build_fed_avg(twin.functional_model(), SGD, rule=rule), 5)
    expected = twin.simulate(5, DATA, jury_in_numpy(in_numpy, sharpness=5.0, margin=-0.1))
    for a, b in zip(weights, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def jury_run(cohorts, weights=None, **numbers):
    """Rounds of the jury mean over `(errors, losses)` of clients with made-up updates."""
    case = CASES["jury"]
    rng = np.random.default_rng(5)
    made = []
    for errors, losses in cohorts:
        clients = [contracts.client(rng, 1) for _ in losses]
        for c, error, loss in zip(clients, errors, losses, strict=True):
            c["errors"] = np.array([0.5, 0.5 - error, 0.0], np.float32)
            c["loss"] = np.float32(loss)
        made.append((clients, weights or [5.0] * len(clients)))
    rule = rules.jury_mean(**numbers)
    process = aggregators.RuleFactory(rule).create(
        contracts.value_type(case), contracts.WEIGHT_TYPE
    )
    state, outputs = process.initialize(), []
    for clients, weights in made:
        outputs.append(process.next(state, *contracts.values(case, clients, weights)))
        state = outputs[-1].state
    return outputs


def test_rounding_in_the_second_round_does_not_lock_the_vote():
    start = 1 / (1 + np.exp(20 * 0.3))
    noise, real = ([6e-8] * 3, [1.0, 1.1, 0.9]), ([-0.05, -0.04, -0.06], [1.0, 1.1, 0.9])
    outputs = jury_run([noise, noise, noise, real])
    # Three clients agree to the last bit, about nothing.
    for output in outputs[:3]:
        np.testing.assert_allclose(output.measurements["share"], start, rtol=0.02)
    # The first real votes count for what they say, not for what noise was.
    assert outputs[3].measurements["trust"] < -0.9
    assert outputs[3].measurements["share"] < 1e-8
    np.testing.assert_allclose(outputs[2].state["vote_scale"], 1e-3)  # the floor
    np.testing.assert_allclose(outputs[3].state["vote_scale"], 1e-3 * np.exp(0.25), rtol=1e-6)


@pytest.mark.parametrize("liars", [1, 2])
def test_a_few_liars_do_not_outvote_the_honest(liars):
    rng = np.random.default_rng(liars)
    cohorts = []
    for _ in range(16):
        # Each of the honest says that the candidate is worse by a little; liars, that it is all right.
        errors = [*-rng.uniform(0.01, 0.03, 10 - liars), *[1.0] * liars]
        losses = [*rng.uniform(0.5, 1.5, 10 - liars), *[0.0] * liars]
        cohorts.append((errors, losses))
    outputs = jury_run(cohorts)
    assert all(output.measurements["share"] < 0.05 for output in outputs)
    assert all(output.measurements["trust"] < 0.15 for output in outputs)
    # The typical vote is one of the honest, in spite of two of ten that are fifty times as large.
    assert 0.01 < outputs[-1].state["vote_scale"] < 0.03


def test_the_typical_vote_counts_every_client_once():
    grown = np.exp(3.0 * (1 / 2 - 1 / 3))
    for votes, scales in (
        ([1e-4, -2e-4, 0.5], [1e-2] * 3),  # which never falls below the floor
        ([0.3, -0.4, 1e-4], [1e-2, 1e-2 * grown, 1e-2 * grown**2]),
    ):
        outputs = jury_run(
            [(votes, [1.0, 1.1, 0.9])] * 3, [1.0, 2.0, 90.0], vote_floor=1e-2, vote_rate=3.0
        )
        found = [float(output.state["vote_scale"]) for output in outputs]
        np.testing.assert_allclose(found, scales, rtol=1e-6)


def test_the_first_gap_is_nothing_to_the_last_bit():
    outputs = jury_run([([0.0] * 5, [0.1, 3.0, 0.7, 0.2, 1.3])] * 2)
    assert all(not np.any(x) for gap in outputs[0].state["gap"] for x in gap)
    assert any(np.any(x) for gap in outputs[1].state["gap"] for x in gap)


def test_a_candidate_that_nobody_has_a_part_in_is_the_first_mean():
    outputs = jury_run([([0.3] * 3, [-1.0, -2.0, -0.5])] * 4, margin=-1.0)
    for output in outputs:
        assert output.measurements["clients_without_score"] == 3
        assert output.measurements["clients"] == 3
        assert output.measurements["share"] > 0.99
        assert all(not np.any(x) for gap in output.state["gap"] for x in gap)


def test_numbers_change_between_rounds():
    rule = rules.jury_mean(initial_norm=0.05)
    process = aggregators.build_fed_avg(twin.functional_model(), SGD, rule=rule)
    state = process.next(process.initialize(), twin.datasets(DATA)).state
    hparams = process.get_hparams(state)
    assert {"sharpness", "margin", "cutoff", "loss_temperature", "loss_decay"} <= set(
        hparams["aggregator"]
    )
    hparams["aggregator"]["margin"] = -1.0
    hparams["aggregator"]["cutoff"] = 1e9
    output = process.next(process.set_hparams(state, hparams), twin.datasets(DATA))
    np.testing.assert_allclose(
        output.metrics["aggregator"]["share"],
        1 / (1 + np.exp(-20 * (output.metrics["aggregator"]["trust"] + 1))),
        rtol=1e-5,
    )
    assert output.metrics["aggregator"]["shrunk_clients"] == 0
    before = process.next(state, twin.datasets(DATA)).metrics["aggregator"]
    assert before["shrunk_clients"] > 0


def test_the_redescending_mean_stands_in_tffs_own_builder():
    process = tff.learning.algorithms.build_weighted_fed_avg(
        twin.functional_model(),
        SGD,
        model_aggregator=aggregators.RuleFactory(rules.redescending_mean(cutoff=0.4)),
    )
    weights, _ = trained(process, 3)

    def combine(weights, clients, memory):
        examples = [c["examples"] for c in clients]
        return twins.redescending([c["delta"] for c in clients], examples, memory, cutoff=0.4)

    for a, b in zip(weights, twin.simulate(3, DATA, combine), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


REFUSED = {
    "a client work, which does not see the rule's state": (
        lambda: aggregators.build_client_work(model_fn, SGD, rules.jury_mean().needs),
        "`needs` must not need candidates.*direction",
    ),
    "a factory for updates alone": (
        lambda: aggregators.RuleFactory(rules.jury_mean()).create(
            contracts.DELTA_TYPE, contracts.WEIGHT_TYPE
        ),
        "needs training_loss, candidate_errors",
    ),
    "a stride without models": (
        lambda: rules.jury_mean(votes="direction", stride_step=0.05),
        "`stride_step` must be None",
    ),
    "a stride that jumps": (lambda: rules.jury_mean(stride_step=2.0), "`stride_step` must be"),
    "a word that is no vote": (
        lambda: rules.jury_mean(votes="models"),
        '`votes` must be "model", "direction" or a function',
    ),
    "no candidate": (lambda: rules.jury_mean([]), "`candidates` must be pairs"),
    "two scores": (
        lambda: rules.jury_mean(
            [(scores.l2_distance, weighting.softmax()), (scores.kl_divergence, weighting.softmax())]
        ),
        "`candidates` must have at most one score",
    ),
    "a cutoff of nothing": (lambda: rules.redescending_mean(cutoff=0.0), "`cutoff` must be"),
    "a norm of nothing": (lambda: rules.jury_mean(initial_norm=0.0), "`initial_norm` must be"),
    "a memory that never fades": (
        lambda: rules.jury_mean(vote_decay=1.0),
        "`vote_decay` must be",
    ),
    "models of another shape": (
        lambda: Candidates(lambda weights, state: [weights[:1]], 1).of([tf.zeros(2)] * 2, {}),
        "`models` must return 1 models of the shapes",
    ),
    "no models": (lambda: Candidates(lambda weights, state: [], 0), "`number` must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_words(name):
    write, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        write()


def test_a_round_of_ones_own_has_no_candidates():
    rule = rules.jury_mean()
    start = aggregators.rule_state(rule, contracts.DELTA_TYPE)
    with pytest.raises(ValueError, match="`rule` must not need candidates"):

        @tff.federated_computation(
            tff.FederatedType(start.type_signature.result, tff.SERVER),
            tff.FederatedType(contracts.DELTA_TYPE, tff.CLIENTS),
        )
        def run(state, deltas):
            return aggregators.federated_rule(rule, deltas, state, value_is="delta")
