"""Every public optax transformation against plain optax, and what is said of what cannot run."""

import asyncio
import contextlib
import copy
import functools
import pathlib
import pickle

import contracts
import federated_twin as twin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import optax_cases
import problems
import pytest
import selection
import side_by_side
import tensorflow as tf
import tensorflow_federated as tff
from optax_cases import RUNS

import tff_optim
from tff_optim import build_optax_optimizer

# One of each way to be made, to keep a state, and to have numbers.
QUICK = [
    "adafactor",  # a factored state
    "adam",
    "adamw",  # a schedule
    "add_noise",  # a random key
    "apply_if_finite",  # around another
    "flatten",  # all weights in one
    "inject_hyperparams",
    "inject_stateful_hyperparams",
    "masked",  # by position
    "MultiSteps",
    "named_chain",
    "rprop",  # no rate among its numbers
    "scale_by_distance_over_gradients",  # for positive gradients
    "set_to_zero",  # no state
    "contrib.cocob",  # starts from the weights
    "contrib.mechanize",  # 32 bits alone
    "contrib.prodigy",  # both
]
every_case = pytest.mark.parametrize("case", selection.params(RUNS, QUICK))
# In 64 bits each is traced anew: a schedule, a key, all in one, numbers, by position, refused, both.
WIDE = ["adamw", "add_noise", "flatten", "inject_hyperparams", "masked", "contrib.mechanize"]
ANY_SIGN = [name for name, case in RUNS.items() if not case.positive]
# As many as go into one process of TFF.
SOME = {
    "some": [name for name in QUICK if name in ANY_SIGN][:8],
    "others": [name for name in QUICK if name in ANY_SIGN][8:],
    "positive": [name for name, case in RUNS.items() if case.positive],
}
GROUPS = {f"from {ANY_SIGN[i]} on": ANY_SIGN[i : i + 11] for i in range(0, len(ANY_SIGN), 11)}
TOLERANCE = {"float32": 5e-5, "float64": 1e-12}


def make_problem(case, dtype="float32", steps=5):
    weights, gradients = contracts.make_problem(steps=steps, dtype=dtype)
    if case.positive:
        gradients = [[np.abs(g) for g in row] for row in gradients]
    return weights, gradients


def start(optimizer, weights):
    return contracts.tensors(optimizer.initialize(contracts.specs_of(weights)))


def run(optimizer, weights, gradients, state=None, step=None):
    state = start(optimizer, weights) if state is None else state
    step = tf.function(optimizer.next) if step is None else step
    return contracts.run(step, state, contracts.tensors(weights), contracts.tensors(gradients))


def run_shared(case, weights, gradients, state=None):
    return run(case.shared, weights, gradients, state, case.step)


def assert_near(found, expected, tolerance=TOLERANCE["float32"]):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert np.asarray(a).dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a), b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- every place


@contextlib.contextmanager
def told_of(name):
    """Says which transformation of a group a failure is of."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


@functools.cache
def expected_of(name):
    """Plain optax over the steps of `make_problem`."""
    return optax_cases.run_plain(RUNS[name], *make_problem(RUNS[name]))


# The others are held against optax with each of their numbers changed, below.
@pytest.mark.parametrize("names", selection.params(SOME | GROUPS, ["some", "positive"]))
def test_they_equal_optax_in_the_process_and_in_the_worker(names):
    problems_of = [make_problem(RUNS[name]) for name in names]
    together = side_by_side.SideBySide([RUNS[name].shared for name in names])
    weights = [w for own, _ in problems_of for w in own]
    rows = zip(*(own for _, own in problems_of))  # the gradients of a step, of one case each
    gradients = [[g for own in row for g in own] for row in rows]
    in_worker = contracts.in_tff_computations(together, weights, gradients)
    for i, (name, problem) in enumerate(zip(names, problems_of)):
        with told_of(name):
            assert np.isfinite(expected_of(name)[0]).all()
            assert_near(run_shared(RUNS[name], *problem)[1], expected_of(name))
            assert_near(in_worker[2 * i : 2 * i + 2], expected_of(name))


def fed_avg_in_optax(case, initial, clients, rounds):
    """Federated averaging in NumPy and plain optax, one optimizer for clients and server."""
    init, update = case.compiled_plain

    def step(state, weights, gradients):
        gradients = [jnp.asarray(g, jnp.float32) for g in gradients]
        updates, state = update(gradients, state, weights)
        return state, optax.apply_updates(weights, updates)

    server = [jnp.asarray(w) for w in initial]
    server_state = init(server)
    for _ in range(rounds):
        deltas = []
        for data in clients:
            weights, state = server, init(server)
            for batch in data:
                x, y = batch["x"].numpy(), batch["y"].numpy()
                error = 2.0 * (x @ np.asarray(weights[0]) + np.asarray(weights[1]) - y) / y.size
                state, weights = step(state, weights, [x.T @ error, error.sum(0)])
            deltas.append([a - b for a, b in zip(server, weights)])
        mean = [sum(d) / len(clients) for d in zip(*deltas)]
        server_state, server = step(server_state, server, mean)
    return [np.asarray(w) for w in server]


def make_clients(positive):
    """Data; if asked for, such that every gradient is positive as long as the model has not learnt."""
    clients = problems.make_clients(2, batches=2)
    if not positive:
        return clients
    return [data.map(lambda b: {"x": tf.abs(b["x"]), "y": b["y"] - 30.0}) for data in clients]


# TFF takes seconds to build each, on clients and on the server.
IN_TFF = {
    f"{group}, {kind}": (names, kind)
    for group, names in (GROUPS | {"positive": SOME["positive"]}).items()
    for kind in ("variable_model", "functional_model")
}
IN_TFF["one, variable_model"] = (["contrib.prodigy"], "variable_model")


@pytest.mark.parametrize(
    ("names", "kind"),
    selection.params(IN_TFF, ["one, variable_model", "positive, functional_model"], unpack=True),
)
def test_they_train_clients_and_server(names, kind):
    together = side_by_side.SideBySide([RUNS[name].shared for name in names])
    process = tff.learning.algorithms.build_weighted_fed_avg(
        getattr(side_by_side, kind)(len(names)),
        client_optimizer_fn=together,
        server_optimizer_fn=together,
    )
    clients = make_clients(RUNS[names[0]].positive)
    state = process.initialize()
    initial = [np.array(w) for w in process.get_model_weights(state).trainable]
    for _ in range(2):
        state = process.next(state, clients).state
    found = process.get_model_weights(state).trainable
    assert len(found) == 2 * len(names)
    for i, name in enumerate(names):
        own = slice(2 * i, 2 * i + 2)
        expected = fed_avg_in_optax(RUNS[name], initial[own], clients, rounds=2)
        with told_of(name):
            for a, b in zip(found[own], expected):
                assert np.isfinite(b).all()
                np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


# --------------------------------------------------------------------------------- state and hparams


@pytest.mark.parametrize("names", selection.params(SOME | GROUPS, ["some"]))
def test_saved_runs_go_on_bit_for_bit(names, tmp_path):
    weights = make_problem(RUNS[names[0]])[0]
    gradients = {name: make_problem(RUNS[name])[1] for name in names}
    middle = {name: run_shared(RUNS[name], weights, gradients[name][:2]) for name in names}
    manager = tff.program.FileProgramStateManager(str(tmp_path))
    asyncio.run(manager.save(middle, 1))
    again = {name: RUNS[name].named() for name in names}  # as in another process
    like = {name: (start(optimizer, weights), weights) for name, optimizer in again.items()}
    loaded = asyncio.run(manager.load(1, like))
    for name, (state, values) in loaded.items():
        rest = gradients[name][2:]
        undisturbed = run_shared(RUNS[name], middle[name][1], rest, middle[name][0])
        resumed = run(again[name], values, rest, contracts.tensors(state))
        with told_of(name):
            contracts.assert_equal(resumed, undisturbed)


@every_case
def test_a_state_holds_numbers_and_tensors_by_path_and_keeps_their_types(case):
    weights, gradients = make_problem(case, steps=1)
    optimizer = case.shared
    state = optimizer.initialize(contracts.specs_of(weights))
    assert all(isinstance(v, np.number) for v in optimizer.get_hparams(state).values())
    assert all(type(v).__module__.startswith("tensorflow") for v in state["slots"].values())
    after, _ = run_shared(case, weights, gradients)
    assert type(after) is type(state)
    assert list(after) == list(state)
    assert contracts.specs_of(after) == contracts.specs_of(contracts.tensors(state))


@every_case
def test_a_number_that_is_set_equals_one_that_was_built(case):
    weights, gradients = make_problem(case)
    optimizer = case.shared
    state = optimizer.initialize(contracts.specs_of(weights))
    usual = run_shared(case, weights, gradients)[1]
    numbers = optimizer.get_hparams(state)
    assert set(case.others) <= set(numbers)
    for name, value in numbers.items():
        other = case.others.get(name, float(value) * 0.6 + 0.013)
        changed = contracts.tensors(optimizer.set_hparams(state, {name: other}))
        found = run_shared(case, weights, gradients, changed)[1]
        with told_of(f"{name} = {other}"):
            assert_near(found, optax_cases.run_plain(case, weights, gradients, **{name: other}))
            effect = max(np.max(np.abs(a - b)) for a, b in zip(found, usual))
            assert effect > 10 * TOLERANCE["float32"]  # more than what is taken for near


@pytest.mark.parametrize("name", ["adafactor", "lamb", "novograd", "contrib.prodigy"])
def test_numbers_that_are_set_together_equal_those_that_were_built_bit_for_bit(name):
    case = RUNS[name]
    weights, gradients = make_problem(case)
    state = case.shared.initialize(contracts.specs_of(weights))
    others = {n: float(v) * 0.6 + 0.013 for n, v in case.shared.get_hparams(state).items()}
    changed = contracts.tensors(case.shared.set_hparams(state, others))
    found = run_shared(case, weights, gradients, changed)[1]
    rebuilt = run(case.ours(**others), weights, gradients)[1]
    contracts.assert_equal(list(found), list(rebuilt))


def test_numbers_of_inject_hyperparams_are_set_in_a_made_transformation():
    weights, gradients = contracts.make_problem(steps=3)
    optimizer = build_optax_optimizer(optax.inject_hyperparams(optax.adam)(0.05, b1=0.8))
    state = optimizer.initialize(contracts.specs_of(weights))
    assert next(iter(state)) == "learning_rate"
    changed = contracts.tensors(optimizer.set_hparams(state, {"learning_rate": 0.3, "b1": 0.5}))
    other = build_optax_optimizer(optax.inject_hyperparams(optax.adam)(0.3, b1=0.5))
    found = run(optimizer, weights, gradients, changed)
    contracts.assert_equal(found, run(other, weights, gradients))


def test_a_number_called_step_is_not_counted():
    @optax.inject_hyperparams
    def make(learning_rate, step):
        return optax.scale(-learning_rate * step)

    optimizer = build_optax_optimizer(make(learning_rate=1.0, step=0.5))
    _, weights = run(optimizer, [np.float32(2.0)], [[np.float32(1.0)]] * 3)
    np.testing.assert_allclose(weights[0], 0.5)
    state = optimizer.initialize([tf.TensorSpec([])])
    assert list(optimizer.get_hparams(state)) == ["learning_rate"]


def _multi_steps():
    return optax.MultiSteps(optax.adam(0.1), every_k_schedule=2)


MULTI_STEPS = {
    "ready": lambda: build_optax_optimizer(_multi_steps()),
    "made by a function": lambda: build_optax_optimizer(_multi_steps),
    "by its class": lambda: build_optax_optimizer(
        optax.MultiSteps, opt=optax.adam(0.1), every_k_schedule=2
    ),
    "as a transformation": lambda: build_optax_optimizer(_multi_steps().gradient_transformation()),
}


@pytest.mark.parametrize(
    "make", selection.params(MULTI_STEPS, ["made by a function", "as a transformation"])
)
def test_multi_steps_are_those_of_optax(make):
    weights, gradients = contracts.make_problem(steps=5)
    plain = _multi_steps()
    state, expected = plain.init(weights), weights
    for gradient in gradients:
        updates, state = plain.update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_near(run(make(), weights, gradients)[1], expected)


def _matrices(tree):
    return jax.tree_util.tree_map(lambda leaf: leaf.ndim > 1, tree)


def _by_rank(matrix_rate, vector_rate):
    rates = {True: optax.sgd(matrix_rate), False: optax.sgd(vector_rate)}
    return optax.multi_transform(rates, _matrices)


def test_what_a_mask_hides_from_a_scalar_is_set_on_clients():
    def first_round(process, **changes):
        state = process.initialize()
        hparams = process.get_hparams(state)
        assert set(hparams["client_work"]) == {"learning_rate", "b1", "b2", "eps", "weight_decay"}
        hparams["client_work"].update(changes)
        state = process.next(process.set_hparams(state, hparams), problems.make_clients(2)).state
        return process.get_model_weights(state).trainable

    set_later, built = (
        tff.learning.algorithms.build_weighted_fed_avg(
            problems.model_fn,
            build_optax_optimizer(optax.adamw, learning_rate=0.1, mask=_matrices, **more),
        )
        for more in ({}, {"weight_decay": 0.5})
    )
    found = first_round(set_later, weight_decay=0.5)
    assert_near(found, first_round(built))
    assert np.abs(found[0] - first_round(set_later)[0]).max() > 1e-3


def test_what_a_label_hides_from_a_scalar_is_set():
    optimizer = build_optax_optimizer(_by_rank, matrix_rate=0.1, vector_rate=0.2)
    names = ["matrix_rate", "vector_rate"]
    assert list(optimizer.get_hparams(optimizer.initialize(tf.TensorSpec([])))) == names
    weights, gradients = contracts.make_problem(steps=1)
    state = optimizer.initialize(contracts.specs_of(weights))
    state = optimizer.set_hparams(state, {"matrix_rate": 0.3})
    _, found = optimizer.next(state, contracts.tensors(weights), gradients[0])
    rates = (0.3, 0.2)
    assert_near(found, [w - r * g for w, r, g in zip(weights, rates, gradients[0])])


def test_a_scheduled_number_is_optax_own():
    optimizer = RUNS["inject_stateful_hyperparams"].ours()
    state = optimizer.initialize([tf.TensorSpec([2])])
    assert "learning_rate" not in optimizer.get_hparams(state)
    assert "hyperparams/learning_rate" in state["slots"]


def test_numbers_are_those_that_the_step_reads():
    specs = [tf.TensorSpec((3, 2)), tf.TensorSpec((2,))]

    def numbers(*arguments, **options):
        optimizer = build_optax_optimizer(*arguments, **options)
        return list(optimizer.get_hparams(optimizer.initialize(specs)))

    assert numbers(optax.adam, learning_rate=1) == ["learning_rate", "b1", "b2", "eps"]
    # A default of 0 turns a term off; the initial state is made from the others.
    assert numbers(optax.adagrad, learning_rate=0.1) == ["learning_rate", "eps"]
    assert "learning_rate" not in numbers(optax.rprop, learning_rate=0.1)
    assert "eps_root" in numbers(optax.adam, learning_rate=0.1, eps_root=0.0)

    def branching(learning_rate, scale):
        return optax.scale(-learning_rate if scale > 1.0 else learning_rate)

    assert numbers(branching, learning_rate=0.1, scale=2.0) == ["learning_rate"]


def test_a_rate_is_scheduled_by_rounds():
    weights, gradients = contracts.make_problem(steps=3)
    rates = [0.3, 0.2, 0.1]
    optimizer = build_optax_optimizer(optax.adam, learning_rate=1.0)
    scheduled = tff.learning.optimizers.schedule_learning_rate(
        optimizer, lambda i: tf.gather(tf.constant([*rates, 0.0]), i)
    )
    case = optax_cases.case(optax.adam, learning_rate=lambda step: jnp.asarray(rates)[step])
    assert_near(
        run(scheduled, weights, gradients)[1], optax_cases.run_plain(case, weights, gradients)
    )


def test_a_rate_of_a_function_is_given_apart():
    ones = [tf.ones(2)]

    @tf.function(autograph=False)
    def step(rate):
        with pytest.raises(ValueError, match=r"give the rate by itself: .*learning_rate=r"):
            build_optax_optimizer(optax.sgd(rate)).initialize([tf.TensorSpec([2])])
        optimizer = build_optax_optimizer(optax.sgd, learning_rate=rate)
        state = optimizer.initialize([tf.TensorSpec([2])])
        return optimizer.next(state, ones, ones)[1][0]

    np.testing.assert_allclose(step(tf.constant(0.25)), [0.75, 0.75])


def test_a_tensor_of_a_computation_is_a_learning_rate():
    process = tff.learning.algorithms.build_weighted_fed_avg_with_optimizer_schedule(
        twin.functional_model(),
        client_learning_rate_fn=lambda i: 0.1 / tf.cast(i + 1, tf.float32),
        client_optimizer_fn=lambda rate: build_optax_optimizer(optax.adam, learning_rate=rate),
    )
    state = process.next(process.initialize(), problems.make_clients(2)).state
    assert np.isfinite(process.get_model_weights(state).trainable[0]).all()
    with tf.Graph().as_default():
        rate = tf.compat.v1.placeholder(tf.float32, ())
        with pytest.raises(ValueError, match="`learning_rate` must be a number here"):
            build_optax_optimizer(optax.rprop, learning_rate=rate).initialize([tf.TensorSpec([2])])


# ------------------------------------------------------------------------------ weights and gradients


@every_case
def test_a_weight_without_gradient_and_its_slots_stay(case):
    weights, gradients = make_problem(case, steps=3)
    optimizer = case.shared
    if case is RUNS["flatten"]:
        with pytest.raises(ValueError, match="made of several weights, as"):
            optimizer.next(start(optimizer, weights), weights, [gradients[0][0], None])
        return
    before, middle = run_shared(case, weights, gradients[:2])
    after, last = optimizer.next(before, middle, [gradients[2][0], None])
    np.testing.assert_array_equal(last[1], middle[1])
    for path, slot in before["slots"].items():
        if "second" in path.split("/") or (case.by_position and path.endswith("/1")):
            np.testing.assert_array_equal(after["slots"][path], slot)
    if not case.couples:
        expected = optax_cases.run_plain(case, weights, gradients)
        assert_near([last[0]], [expected[0]])


@pytest.mark.parametrize("name", ["contrib.prodigy", "contrib.mechanize", "contrib.cocob"])
def test_a_state_of_the_weights_is_made_of_them_even_if_the_first_gradient_is_none(name):
    weights, gradients = contracts.make_problem(steps=1)
    optimizer = RUNS[name].ours()
    state = start(optimizer, weights)
    made = [
        p for p in state["slots"] if p.endswith("/1") and ("0" in p.split("/")[0] or "init" in p)
    ]
    state, _ = optimizer.next(state, weights, [gradients[0][0], None])
    assert made
    for path in made:
        np.testing.assert_array_equal(state["slots"][path], weights[1])


@pytest.mark.parametrize("case", selection.params(RUNS, [*WIDE, "contrib.prodigy"]))
def test_64_bit_weights_are_computed_in_64_bits_or_refused(case):
    weights, gradients = make_problem(case, "float64")
    if case.narrow:
        with pytest.raises(ValueError, match=r"`transformation_or_factory`.*float32"):
            case.ours().initialize(contracts.specs_of(weights))
        return
    expected = optax_cases.run_plain(case, weights, gradients)
    assert_near(run_shared(case, weights, gradients)[1], expected, TOLERANCE["float64"])


def test_a_mask_fits_lists_tuples_and_names():
    weights, gradients = contracts.make_problem(steps=1)
    by_position = build_optax_optimizer(optax.masked(optax.set_to_zero(), [True, False]))
    by_name = build_optax_optimizer(
        optax.masked(optax.set_to_zero(), lambda tree: {name: "kernel" in name for name in tree}),
        weight_names=["dense/kernel", "dense/bias"],
    )
    for optimizer in (by_position, by_name):
        for container in (list, tuple):
            _, found = run(optimizer, container(weights), [container(gradients[0])])
            assert type(found) is container
            np.testing.assert_array_equal(found[0], weights[0])
            np.testing.assert_array_equal(found[1], weights[1] + gradients[0][1])


def test_labels_by_name_train_on_clients_and_keep_their_numbers():
    def decayed(learning_rate):
        return optax.adamw(learning_rate, mask=lambda tree: {n: "kernel" in n for n in tree})

    optimizer = build_optax_optimizer(
        decayed, learning_rate=0.1, weight_names=["dense/kernel", "dense/bias"]
    )
    process = tff.learning.algorithms.build_weighted_fed_avg(problems.model_fn, optimizer)
    state = process.initialize()
    assert list(process.get_hparams(state)["client_work"]) == ["learning_rate"]
    process.next(state, problems.make_clients(1))

    for positions in (
        build_optax_optimizer(optax.adamw, learning_rate=0.1, mask=[True, False]),
        build_optax_optimizer(optax.inject_hyperparams(optax.adamw)(0.1, mask=[True, False])),
    ):
        with pytest.raises(ValueError, match="as functions of the weights, or pass `weight_names`"):
            tff.learning.algorithms.build_weighted_fed_avg(problems.model_fn, positions)
    # On the server, where TFF shows the weights, either runs and has its numbers.
    process = tff.learning.algorithms.build_weighted_fed_avg(
        problems.model_fn, tff.learning.optimizers.build_sgdm(0.1), positions
    )
    assert "learning_rate" in process.get_hparams(process.initialize())["finalizer"]


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", optax_cases.REFUSED)
def test_what_optax_cannot_run_from_gradients_alone_is_refused_with_the_reason(name):
    case, reason = optax_cases.REFUSED[name]
    with pytest.raises(ValueError, match="`transformation_or_factory`") as raised:
        case.ours().initialize([tf.TensorSpec((3, 2)), tf.TensorSpec((2,))])
    assert reason in str(raised.value)
    weights, gradients = contracts.make_problem(steps=1)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        optax_cases.run_plain(case, weights, gradients)


def _grows(updates, state, params=None):
    del params
    return updates, jnp.concatenate([state, state])


def _sorts(updates, params=None):
    del params
    return jax.tree_util.tree_map(lambda g: jnp.sort(g), updates)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: build_optax_optimizer("adam"), TypeError, "must be an optax.Gradient.*'adam'"),
        (lambda: build_optax_optimizer(optax.adam), TypeError, "missing a required.*learning_rate"),
        (lambda: build_optax_optimizer(optax.adam, learning_rate=0.1, beta=1), TypeError, "beta"),
        (
            lambda: build_optax_optimizer(optax.adam(0.1), learning_rate=0.1),
            TypeError,
            "found a finished transformation and",
        ),
        (lambda: build_optax_optimizer(lambda: 3), TypeError, "returned 3"),
        (lambda: build_optax_optimizer(optax.adam, learning_rate=-0.1), ValueError, "at least 0"),
        (lambda: build_optax_optimizer(optax.adam, learning_rate="x"), TypeError, "learning_rate"),
        (lambda: build_optax_optimizer(optax.adam, learning_rate=0.1, b1="x"), TypeError, "`b1`"),
        (lambda: build_optax_optimizer(optax.adam, learning_rate=0.1, b1=1.5), ValueError, "`b1`"),
        (
            lambda: build_optax_optimizer(optax.adam, learning_rate=0.1, b1=float("nan")),
            ValueError,
            "`b1`",
        ),
        (
            lambda: build_optax_optimizer(
                optax.adam,
                learning_rate=tf.keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5),
            ),
            TypeError,
            "Keras schedule ExponentialDecay",
        ),
        (
            lambda: build_optax_optimizer(optax.sgd(0.1), weight_names=["a", "b", "a"]),
            ValueError,
            r"name every weight differently.*found \['a'\] more than once",
        ),
        (
            lambda: build_optax_optimizer(optax.sgd(0.1), weight_names=["a"]).initialize(
                [tf.TensorSpec([2]), tf.TensorSpec([2])]
            ),
            ValueError,
            "found 1 names for 2 weights",
        ),
        (
            lambda: build_optax_optimizer(
                optax.GradientTransformation(lambda params: jnp.zeros(1), _grows)
            ).initialize([tf.TensorSpec([2])]),
            ValueError,
            r"keep the shapes.*float32\(1,\).*float32\(2,\)",
        ),
        (
            lambda: build_optax_optimizer(optax.sgd(0.1)).initialize(
                [tf.TensorSpec([2], tf.int32)]
            ),
            ValueError,
            "`specs` at '0' must have a floating dtype",
        ),
    ],
)
def test_an_error_names_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_operation_without_a_counterpart_is_named():
    optimizer = build_optax_optimizer(optax.stateless(_sorts))
    weights, gradients = contracts.make_problem(steps=1)
    with pytest.raises(ValueError, match=r"without XLA.*sort"):
        run(optimizer, weights, gradients)


def test_numbers_are_checked_when_they_are_set():
    optimizer = build_optax_optimizer(optax.adam, learning_rate=0.1)
    state = optimizer.initialize([tf.TensorSpec([2])])
    for hparams, message in [
        ({"learning_rate": -1.0}, "`learning_rate` .* at least 0; found -1.0"),
        ({"b1": 2.0}, "`b1`"),
        ({"eps_root": 0.1}, "must hold some of learning_rate, b1, b2, eps; found eps_root"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.set_hparams(state, hparams)
    with pytest.raises(TypeError, match="`b1`"):
        optimizer.set_hparams(state, {"b1": "0.5"})


# ------------------------------------------------------------------------------------------ the object


def test_equal_optimizers_are_equal_and_can_be_copied():
    make = lambda **more: build_optax_optimizer(optax.adam, learning_rate=0.1, **more)  # noqa: E731
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make(b1=0.5)
    assert make() != make(weight_names=["a"])
    optimizer = make()
    optimizer.initialize([tf.TensorSpec([2])])  # traced programs are not part of it
    assert copy.deepcopy(optimizer) == optimizer
    assert pickle.loads(pickle.dumps(optimizer)) == optimizer
    assert "learning_rate': 0.1" in repr(optimizer)
    assert "adam" in repr(optimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: build_optax_optimizer(optax.nadam, learning_rate=0.1),
        lambda: build_optax_optimizer(optax.nadamw, learning_rate=0.1, weight_decay=0.2),
    ],
)
def test_copies_of_a_partial_are_equal_and_keep_its_configuration(make):
    optimizer = make()
    assert make() == optimizer
    config = tff_optim.get_config(optimizer)
    for made in (
        copy.copy(optimizer),
        copy.deepcopy(optimizer),
        pickle.loads(pickle.dumps(optimizer)),
    ):
        assert made == optimizer
        assert hash(made) == hash(optimizer)
        assert tff_optim.get_config(made) == config
    assert tff_optim.from_config(config) == optimizer


def test_partials_are_compared_by_what_they_are_made_of():
    def of(*arguments, **options):
        partial = functools.partial(optax.adam, *arguments, **options)
        return build_optax_optimizer(
            partial, b2=0.9, **({} if arguments else {"learning_rate": 0.1})
        )

    assert of(b1=0.5) == of(b1=0.5)
    assert of(b1=0.5) != of(b1=0.6)
    assert of(0.1) == of(0.1)
    assert of(0.1) != of(0.2)
    made = of(b1=0.5)
    assert pickle.loads(pickle.dumps(made)) == made
    ready = build_optax_optimizer(_multi_steps())
    assert copy.deepcopy(ready) == ready


def test_it_is_placed_on_the_device():
    optimizer = build_optax_optimizer(optax.adam, learning_rate=0.1, device="CPU:1")
    assert optimizer.device == "/CPU:1"
    weights, gradients = contracts.make_problem(steps=1)
    state = optimizer.initialize(contracts.specs_of(weights))
    assert state["slots"]["0/mu/0"].device.endswith("CPU:1")
    state, found = optimizer.next(state, contracts.tensors(weights), gradients[0])
    assert found[0].device.endswith("CPU:1")


def test_it_runs_in_a_hand_written_round():
    optimizer = build_optax_optimizer(optax.adam, learning_rate=0.1)
    _, step = tff_optim.build_optimizer_computations(optimizer, tff.TensorType(np.float32, [2]))
    assert "slots=" in str(step.type_signature.parameter)


# ------------------------------------------------------------------------------------------ what runs


def test_every_public_transformation_has_a_case():
    public = optax_cases.public_transformations()
    assert len(public) >= 70
    assert public == {*RUNS, *optax_cases.REFUSED}


def test_the_table_of_what_runs_is_true():
    page = pathlib.Path(__file__).parent.parent / "docs/pages/guides/optax.md"
    assert optax_cases.table() in page.read_text()
