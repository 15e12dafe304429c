"""Rules whose clients keep a state, against the same training written in NumPy."""

import functools

import aggregation_twins as twins
import federated_twin as twin
import numpy as np
import pytest
import runtimes
import selection
import tensorflow as tf
import tensorflow_federated as tff
from problems import model_fn

import aggregators
import tff_optim
from aggregators import ClientStates, rules, weighting

UNIFORM = tff.learning.ClientWeighting.UNIFORM
IDS = ["a", "b", "c", "d", "bad"]
DATA = dict(zip(IDS, twin.make_data((12, 7, 5, 3, 6)), strict=True))
DATA["bad"][0][2, 1] = np.nan
# Partial participation, in orders of their own; client `bad` fails whenever it takes part.
COHORTS = [["a", "b"], ["c", "bad", "a"], ["d"], ["b", "d", "c"], ["bad", "a"]] * 2


def train(start, x, y, correct, momentum=0.0, speed=None):
    """One client's steps, each `correct(gradients, weights)`ed.

    Returns the weights, the mean over steps of raw gradients, the optimizer's speed, and the loss.
    """
    weights, seen, steps, loss = [np.array(w) for w in start], [0.0, 0.0], 0, 0.0
    speed = speed or [np.zeros_like(w) for w in start]
    x, y = np.float64(x), np.float64(y)
    for begin in range(0, len(x), twin.BATCH):
        batch = x[begin : begin + twin.BATCH], y[begin : begin + twin.BATCH]
        raw = gradient(weights, *batch)
        loss += mse(weights, *batch) * len(batch[0]) / len(x)
        seen = [s + g for s, g in zip(seen, raw, strict=True)]
        speed = [momentum * v + g for v, g in zip(speed, correct(raw, weights), strict=True)]
        weights = [w - twin.RATE * v for w, v in zip(weights, speed, strict=True)]
        steps += 1
    return weights, [s / steps for s in seen], speed, loss


def mse(weights, x, y):
    return np.mean((x @ weights[0] + weights[1] - y) ** 2)


def gradient(weights, x, y):
    off = np.float64(x) @ weights[0] + weights[1] - y
    return [2 / off.size * np.float64(x).T @ off, 2 / off.size * off.sum(0)]


def zeros():
    return [np.zeros((3, 2)), np.zeros(2)]


def mean_of(weights, chosen, deltas, losses, memory):
    del weights, chosen, losses, memory
    return [np.mean(d, 0) for d in zip(*deltas, strict=True)]


def jury_of(weights, chosen, deltas, losses, memory):
    """The jury mean, clients of weight 1, candidates scored on all of a client's data."""
    losses, ones = np.array(losses)[:, np.newaxis], np.ones(len(chosen))
    typical = memory.setdefault("typical", np.zeros(1))
    by = np.exp(-losses / typical) if typical > 0 else np.ones_like(losses)
    memory["typical"] = twins.next_typical(typical, losses.mean(0))

    def vote(k, memory):
        (share,), (gap,), (x, y) = memory["share"], memory["gap"], DATA[chosen[k]]
        a = [w + share * g for w, g in zip(weights, gap, strict=True)]
        b = [w - (1 - share) * g for w, g in zip(weights, gap, strict=True)]
        return [mse(a, np.float64(x), np.float64(y)) - mse(b, np.float64(x), np.float64(y))]

    return twins.jury(deltas, ones, [by], vote, memory, groups=twin.MODEL, **JURY)


JURY = {"sharpness": 5.0, "margin": -0.1, "cutoff": 1.5}


def scaffold_twin(cohorts, option, momentum=0.0, combine=mean_of):
    """The paper's Algorithm 1, with the server's step 1; returns weights, c and all c_k."""
    weights, c, own = twin.initial_weights(), zeros(), {one: zeros() for one in IDS}
    memory = {}
    for cohort in cohorts:
        chosen, deltas, changes, losses = [], [], [], []
        for one in cohort:
            x, y = DATA[one]
            if one == "bad":
                continue

            def correct(raw, at, one=one, c=c):
                del at
                return [g - k + s for g, k, s in zip(raw, own[one], c, strict=True)]

            trained, mean, _, loss = train(weights, x, y, correct, momentum)
            new = gradient(weights, x, y)
            if option == "II":
                steps = -(-len(x) // twin.BATCH)
                # As in the paper, from the weights; with momentum it is the mean of the gradients.
                new = [
                    k - s + (w - t) / (steps * twin.RATE)
                    for k, s, w, t in zip(own[one], c, weights, trained, strict=True)
                ]
                new = mean if momentum else new
            chosen.append(one)
            losses.append(loss)
            deltas.append([w - t for w, t in zip(weights, trained, strict=True)])
            changes.append([n - k for n, k in zip(new, own[one], strict=True)])
            own[one] = new
        if deltas:
            update = combine(weights, chosen, deltas, losses, memory)
            weights = [w - u for w, u in zip(weights, update, strict=True)]
            c = [s + np.sum(d, 0) / len(IDS) for s, d in zip(c, zip(*changes), strict=True)]
    return weights, c, own


def fed_dyn_twin(cohorts, alpha):
    weights, h, own = twin.initial_weights(), zeros(), {one: zeros() for one in IDS}
    for cohort in cohorts:
        models = []
        for one in cohort:
            if one == "bad":
                continue

            def correct(raw, at, one=one, start=weights):
                terms = zip(raw, own[one], at, start, strict=True)
                return [g - k + alpha * (w - s) for g, k, w, s in terms]

            trained, *_ = train(weights, *DATA[one], correct)
            own[one] = [
                k - alpha * (t - w) for k, t, w in zip(own[one], trained, weights, strict=True)
            ]
            models.append(trained)
        if models:
            h = [
                s - alpha / len(IDS) * sum(m[i] - weights[i] for m in models)
                for i, s in enumerate(h)
            ]
            weights = [np.mean(m, 0) - s / alpha for m, s in zip(zip(*models), h, strict=True)]
    return weights, h, own


def momentum_twin(cohorts, momentum):
    weights, speeds = twin.initial_weights(), {one: zeros() for one in IDS}
    for cohort in cohorts:
        models = []
        for one in cohort:
            if one == "bad":
                continue
            trained, _, speeds[one], _ = train(
                weights, *DATA[one], lambda raw, at: raw, momentum, speeds[one]
            )
            models.append(trained)
        if models:
            weights = [np.mean(m, 0) for m in zip(*models)]
    return weights, None, speeds


def sgd(momentum=None):
    return tff.learning.optimizers.build_sgdm(twin.RATE, momentum=momentum)


@functools.cache
def built(name, model=None):
    model = model or twin.functional_model()
    if name == "scaffold-I":
        return aggregators.build_scaffold(model, sgd(), num_clients=5, option="I")
    if name == "scaffold-II":
        return aggregators.build_scaffold(model, sgd(), num_clients=5)
    if name == "scaffold-II-momentum":
        return aggregators.build_scaffold(
            model,
            tff_optim.build_keras_optimizer(tf.keras.optimizers.SGD(twin.RATE, momentum=0.5)),
            num_clients=5,
            loop_implementation=tff.learning.LoopImplementation.DATASET_REDUCE,
        )
    if name == "scaffold-jury":
        rule = rules.jury_mean(**JURY)
        return aggregators.build_scaffold(model, sgd(), num_clients=5, rule=rule)
    if name == "fed-dyn":
        rule = rules.fed_dyn(5, 0.3)
        return aggregators.build_fed_avg(model, sgd(), rule=rule, client_weighting=UNIFORM)
    rule = rules.kept_optimizer()
    return aggregators.build_fed_avg(model, sgd(0.8), rule=rule, client_weighting=UNIFORM)


# name: the public names that it covers, its twin, and the names of the states of server and clients.
SCAFFOLD = ("scaffold", "build_scaffold")
TWINS = {
    "scaffold-I": (SCAFFOLD, lambda cohorts: scaffold_twin(cohorts, "I"), "control", "control"),
    "scaffold-II": (SCAFFOLD, lambda cohorts: scaffold_twin(cohorts, "II"), "control", "control"),
    "scaffold-II-momentum": (
        SCAFFOLD,
        lambda cohorts: scaffold_twin(cohorts, "II", 0.5),
        "control",
        "control",
    ),
    "scaffold-jury": (
        SCAFFOLD,
        lambda cohorts: scaffold_twin(cohorts, "II", combine=jury_of),
        "control",
        "control",
    ),
    "fed-dyn": (("fed_dyn",), lambda cohorts: fed_dyn_twin(cohorts, 0.3), "drift", "gradient"),
    "kept-momentum": (
        ("kept_optimizer",),
        lambda cohorts: momentum_twin(cohorts, 0.8),
        None,
        "optimizer",
    ),
}
COVERED = {name for covers, *_ in TWINS.values() for name in covers}


def run(process, states, cohorts, state=None):
    state = state or process.initialize()
    for cohort in cohorts:
        data = twin.datasets([DATA[one] for one in cohort])
        with states.cohort(cohort, data) as clients:
            state, metrics = process.next(state, clients)
        bad = sum(one == "bad" for one in cohort)
        assert metrics["aggregator"]["non_finite_clients"] == bad
    return state


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", TWINS)
def test_ten_rounds_equal_the_twin(name):
    _, make, on_server, on_client = TWINS[name]
    weights, shared, own = make(COHORTS)
    with ClientStates(IDS) as states:
        state = run(built(name), states, COHORTS)
        close(built(name).get_model_weights(state).trainable, weights)
        if on_server:
            close(state.aggregator[on_server], shared)
        for one in IDS[:-1]:
            kept = states.get(one)
            found = [value for key, value in kept.items() if key.startswith(on_client)]
            if on_client == "optimizer":  # its rate and momentum come along
                found = [value for value in found if value.ndim]
                found = sorted(found, key=np.ndim, reverse=True)
            close(found, own[one])
        # One that fails keeps what it had: nothing.
        assert all(not value.any() for value in states.get("bad").values() if value.ndim)


@pytest.mark.parametrize(
    "name", selection.params(["scaffold-I", "scaffold-II", "scaffold-jury"], ["scaffold-I"])
)
def test_variable_models_train_alike(name):
    weights, _, _ = TWINS[name][1](COHORTS[:4])
    process = built(name, model_fn)
    with ClientStates(IDS) as states:
        state = run(process, states, COHORTS[:4])
    close(process.get_model_weights(state).trainable, weights)


@pytest.mark.parametrize("runtime", selection.params(runtimes.IN_PIECES, ["two-workers"]))
def test_pieces_of_a_cohort_give_the_same_rounds(runtime):
    weights, _, _ = scaffold_twin(COHORTS[:4], "II")
    with runtime(2), ClientStates(IDS) as states:
        state = run(built("scaffold-II"), states, COHORTS[:4])
        close(built("scaffold-II").get_model_weights(state).trainable, weights)


@pytest.mark.parametrize("option", selection.params(["I", "II"], ["I"]))
def test_is_federated_averaging_whenever_variates_are_zero(option):
    """To the last bit, over six rounds: each with the model before it, and variates put to zero."""
    plain = aggregators.build_fed_avg(twin.functional_model(), sgd(), client_weighting=UNIFORM)
    scaffold = built(f"scaffold-{option}")
    expected, state = plain.initialize(), scaffold.initialize()
    fresh = state.aggregator
    for cohort in (["a", "b", "c", "d"], *COHORTS[:5]):
        data = twin.datasets([DATA[one] for one in cohort])
        expected = plain.next(expected, data).state
        with ClientStates(IDS) as states:
            state = run(scaffold, states, [cohort], state._replace(aggregator=fresh))
        assert all(c.any() for c in state.aggregator["control"])  # it would have corrected
        for a, b in zip(
            state.global_model_weights.trainable,
            expected.global_model_weights.trainable,
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow  # by the test before this one, where it is so to the last bit
def test_is_federated_averaging_of_clients_that_are_alike():
    """Their variates are those of the server, so that the corrections cancel, round for round."""
    plain = aggregators.build_fed_avg(twin.functional_model(), sgd(), client_weighting=UNIFORM)
    process = aggregators.build_scaffold(twin.functional_model(), sgd(), num_clients=3)
    data = twin.datasets([DATA["b"]] * 3)
    expected, state = plain.initialize(), process.initialize()
    with ClientStates(list("pqr")) as states:
        for _ in range(5):
            expected = plain.next(expected, data).state
            with states.cohort(list("pqr"), data) as cohort:
                state = process.next(state, cohort).state
    close(state.global_model_weights.trainable, expected.global_model_weights.trainable)
    assert all(c.any() for c in state.aggregator["control"])


def test_around_another_rule_by_weights_of_its_own():
    """FedNova of the deltas, examples and all; its numbers stay hyperparameters."""
    process = aggregators.build_scaffold(
        twin.functional_model(),
        sgd(),
        num_clients=5,
        rule=rules.adaptive_mean("loss", weighting.softmax(1.0, scale=None)),
    )
    state = process.initialize()
    assert "temperature" in process.get_hparams(state)["aggregator"]
    with ClientStates(IDS) as states:
        state = run(process, states, COHORTS[:2])
        assert states.get("b")["control/0"].any()


QUADRATICS = {
    "p": (1.0, -2.0, 5),
    "q": (4.0, 1.0, 2),
    "r": (0.5, 6.0, 9),
}  # curvature, optimum, steps


def quadratic_process(build):
    """Loss `curvature (w - optimum)^2 / 2`, one step for each of a client's batches."""
    spec = {"x": tf.TensorSpec([None, 1]), "y": tf.TensorSpec([None, 1])}
    model = tff.learning.models.functional_model_from_keras(
        lambda: tf.keras.Sequential(
            [tf.keras.layers.Dense(1, input_shape=(1,), use_bias=False, kernel_initializer="zeros")]
        ),
        tf.keras.losses.MeanSquaredError(),
        spec,
    )
    data = {}
    for one, (curvature, optimum, steps) in QUADRATICS.items():
        x = np.full((steps, 1), np.sqrt(curvature / 2), np.float32)
        batches = tf.data.Dataset.from_tensor_slices({"x": x, "y": x * np.float32(optimum)})
        data[one] = batches.batch(1)
    return build(model), data


@pytest.mark.slow
def test_different_optima_are_reached_where_federated_averaging_provably_is_not():
    rate = 0.05
    optimum = sum(a * b for a, b, _ in QUADRATICS.values()) / sum(
        a for a, _, _ in QUADRATICS.values()
    )
    # Averaging settles where the mean of `(1 - (1 - rate a)^steps) (w - optimum)` is zero.
    pull = {k: 1 - (1 - rate * a) ** steps for k, (a, _, steps) in QUADRATICS.items()}
    elsewhere = sum(pull[k] * QUADRATICS[k][1] for k in pull) / sum(pull.values())
    assert abs(optimum - elsewhere) > 0.1
    optimizer = tff.learning.optimizers.build_sgdm(rate)
    ids = list(QUADRATICS)
    for build, expected in (
        (lambda m: aggregators.build_scaffold(m, optimizer, num_clients=3), optimum),
        (lambda m: aggregators.build_fed_avg(m, optimizer, client_weighting=UNIFORM), elsewhere),
    ):
        process, data = quadratic_process(build)
        state = process.initialize()
        with ClientStates(ids) as states:
            for _ in range(120):
                clients = [data[one] for one in ids]
                if expected == elsewhere:
                    state = process.next(state, clients).state
                    continue
                with states.cohort(ids, clients) as cohort:
                    state = process.next(state, cohort).state
        found = process.get_model_weights(state).trainable[0][0, 0]
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("make", "there"), [(rules.scaffold, 2), (rules.fed_dyn, 4)])
def test_a_wrong_number_of_all_clients_is_told(make, there):
    rule = make(3)
    process = aggregators.build_fed_avg(twin.functional_model(), sgd(), rule=rule)
    data = twin.datasets(twin.make_data((5, 5)))

    def play(states):
        with states.cohort(["a", "b"], data) as cohort:
            process.next(process.initialize(), cohort)

    message = f"`num_clients` must be .* found 3, and client states for.*{there}"
    with ClientStates(list("abcd")[:there]) as states, pytest.raises(Exception, match=message):
        play(states)


def test_other_doors_and_bad_arguments():
    with pytest.raises(ValueError, match="`num_clients` must be a whole number"):
        rules.scaffold(0)
    with pytest.raises(ValueError, match="`num_clients`"):
        rules.fed_dyn(2.5)
    with pytest.raises(ValueError, match='`option` must be "I" or "II"; found 2'):
        rules.scaffold(3, option=2)
    with pytest.raises(ValueError, match="`alpha` must be a finite number above 0"):
        rules.fed_dyn(3, 0.0)
    with pytest.raises(ValueError, match="`rule` must not have a stateful client of its own"):
        rules.scaffold(3, rule=rules.kept_optimizer())
    with pytest.raises(TypeError, match="`rule` must be a `Rule`"):
        rules.kept_optimizer(3)
    needs = rules.scaffold(3).needs
    with pytest.raises(ValueError, match="`needs` must not need a stateful client"):
        aggregators.build_client_work(twin.functional_model(), sgd(), needs)
    with pytest.raises(ValueError, match="sent"):
        aggregators.RuleFactory(rules.scaffold(3)).create(
            tff.to_type((np.float32, [3])), tff.to_type(np.float32)
        )
