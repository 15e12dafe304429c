"""Whole learning processes against federated training written in NumPy."""

import asyncio
import functools

import federated_twin as twin
import numpy as np
import pytest
import runtimes
import selection
import tensorflow as tf
import tensorflow_federated as tff
import test_stateful_clients
from aggregation_twins import fed_nova, js, kl, l2, q_fed_avg, spectral
from nearness import assert_near
from problems import make_keras_model, model_fn

import aggregators
from aggregators import rules, scores, weighting

SGD = tff.learning.optimizers.build_sgdm(twin.RATE)
MOMENTUM = tff.learning.optimizers.build_sgdm(twin.RATE, momentum=0.8)
DATA = twin.make_data()


def near(temperature=1.0):
    return lambda r: np.exp(-r / temperature)


def _q(weights, clients, memory):
    return q_fed_avg(
        [c["delta"] for c in clients],
        [c["initial_loss"] for c in clients],
        q=2.0,
        learning_rate=twin.RATE,
    )


def _nova(weights, clients, memory):
    return fed_nova(
        [c["delta"] for c in clients],
        [c["steps"] for c in clients],
        [c["examples"] for c in clients],
        momentum=0.8,
    )


def _loss_softmax(weights, clients, memory):
    shares = np.array([[c["examples"] * np.exp(c["loss"] / 3.0)] for c in clients])
    return twin.twins.weighted_mean([c["delta"] for c in clients], shares, twin.MODEL)


def _fed_med(weights, clients, memory):
    adaptive = twin.adaptive(js, near())(weights, clients, memory)
    plain = twin.by_examples(weights, clients, memory)
    losses, examples = ([c[name] for c in clients] for name in ("loss", "examples"))
    return twin.twins.gated(adaptive, plain, losses, examples, memory, twin.twins.fallen)


# name: the public builder, its process, the combination of clients in NumPy, and how to simulate.
PROCESSES = {
    "adaptive": (
        "build_fed_avg",
        lambda model: aggregators.build_fed_avg(
            model,
            SGD,
            rule=rules.adaptive_mean(
                scores.cosine_distance, weighting.power(0.5, bound=3.0), layers="model"
            ),
            loop_implementation=tff.learning.LoopImplementation.DATASET_REDUCE,
        ),
        twin.adaptive(
            twin.twins.cosine, lambda r: np.maximum(r, 1e-3) ** 0.5, groups=twin.MODEL, bound=3.0
        ),
        {},
    ),
    "loss-softmax": (
        "build_fed_avg",
        lambda model: aggregators.build_fed_avg(
            model,
            SGD,
            rule=rules.adaptive_mean("loss", weighting.softmax(3.0, prefer="far", scale=None)),
        ),
        _loss_softmax,
        {},
    ),
    "fed-kl": (
        "build_fed_kl",
        lambda model: aggregators.build_fed_kl(
            model, SGD, tff.learning.optimizers.build_sgdm(0.7), temperature=0.5
        ),
        twin.adaptive(kl, near(0.5)),
        {"server_rate": 0.7},
    ),
    "fed-att": (
        "build_fed_att",
        lambda model: aggregators.build_fed_att(model, SGD),
        twin.adaptive(l2, np.exp, running=False, times_examples=False),
        {"server_rate": 1.2},
    ),
    "fed-att-spectral": (
        "build_fed_att",
        lambda model: aggregators.build_fed_att(model, SGD, norm="spectral", step_size=0.5),
        twin.adaptive(spectral, np.exp, running=False, times_examples=False),
        {"server_rate": 0.5},
    ),
    "fed-med": (
        "build_fed_med",
        lambda model: aggregators.build_fed_med(model, SGD, gate="fallen"),
        _fed_med,
        {},
    ),
    "q-fed-avg": (
        "build_q_fed_avg",
        lambda model: aggregators.build_q_fed_avg(model, SGD, q=2.0, learning_rate=twin.RATE),
        _q,
        {},
    ),
    "fed-nova": (
        "build_fed_nova",
        lambda model: aggregators.build_fed_nova(model, MOMENTUM, momentum=0.8),
        _nova,
        {"momentum": 0.8},
    ),
}


@functools.cache
def built(name):
    """The process of this name, built once for all tests."""
    return PROCESSES[name][1](twin.functional_model())


def trained(process, rounds=3, data=DATA):
    state, outputs = process.initialize(), []
    for _ in range(rounds):
        output = process.next(state, twin.datasets(data))
        state = output.state
        outputs.append(output)
    return process.get_model_weights(state).trainable, outputs


def test_no_public_process_is_missing_from_the_table():
    public = {
        name
        for name in aggregators.__all__
        if name.startswith("build_") and not name.endswith("client_work")
    }
    # Those whose clients keep a state have a suite of their own.
    with_state = {name for name in test_stateful_clients.COVERED if name.startswith("build_")}
    assert public == {builder for builder, *_ in PROCESSES.values()} | with_state


# One of each kind of arguments: a rule by hand, a server's rate, a state, and each measurement.
QUICK = ["adaptive", "fed-kl", "fed-med", "q-fed-avg", "fed-nova"]


@pytest.mark.parametrize("name", selection.params([*PROCESSES], QUICK))
def test_equals_federated_training_in_numpy(name):
    _, _, combine, how = PROCESSES[name]
    process = built(name)
    weights, outputs = trained(process)
    for found, expected in zip(weights, twin.simulate(3, DATA, combine, **how), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert outputs[-1].metrics["finalizer"]["update_non_finite"] == 0
    # One pass, or TFF could not split it.
    split = tff.backends.native.compile_to_mergeable_comp_form(process.next)
    assert isinstance(split, tff.framework.MergeableCompForm)
    # The rule did something: plain averaging ends elsewhere.
    plain = twin.simulate(3, DATA, twin.by_examples, **how)
    assert max(abs(w - p).max() for w, p in zip(weights, plain, strict=True)) > 1e-3


IN_PIECES = {
    f"{name}-{runtime}": (name, runtime) for name in PROCESSES for runtime in runtimes.IN_PIECES
}


@pytest.mark.parametrize(
    ("name", "runtime"),
    # Merges of rules are tested with the rules; those of clients' metrics need a process.
    selection.params(IN_PIECES, ["fed-med-subrounds"], unpack=True),
)
def test_pieces_of_a_cohort_give_the_same_rounds(name, runtime):
    """Pieces of four clients, merged; the second round sees what the first has carried over."""
    process = built(name)
    weights, outputs = trained(process, 2)
    with runtimes.IN_PIECES[runtime](3):
        merged, merged_outputs = trained(process, 2)
    for a, b in zip(weights, merged, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(outputs, merged_outputs, strict=True):
        assert a.metrics["aggregator"]["clients"] == len(DATA)
        for part in ("aggregator", "client_work"):
            tf.nest.map_structure(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4),
                a.metrics[part],
                b.metrics[part],
            )
        tf.nest.map_structure(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4),
            a.state.aggregator,
            b.state.aggregator,
        )


@pytest.mark.parametrize("name", selection.params(["adaptive", "q-fed-avg"], ["q-fed-avg"]))
def test_variable_models_train_alike(name):
    _, build, combine, how = PROCESSES[name]
    weights, outputs = trained(build(model_fn))
    for found, expected in zip(weights, twin.simulate(3, DATA, combine, **how), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # Metrics are those of training alone, whatever else looked at the data.
    measured = outputs[-1].metrics["client_work"]["train"]
    assert measured["num_examples"] == sum(len(x) for x, _ in DATA)


@pytest.mark.parametrize("kind", selection.params(["variable", "functional"], ["variable"]))
def test_uniform_weights_give_tffs_own_process(kind):
    model = model_fn if kind == "variable" else twin.functional_model()
    weighting_ = tff.learning.ClientWeighting.UNIFORM
    server = tff.learning.optimizers.build_adam(0.1)
    theirs = tff.learning.algorithms.build_weighted_fed_avg(
        model, MOMENTUM, server, client_weighting=weighting_
    )
    ours = aggregators.build_fed_avg(
        model,
        MOMENTUM,
        server,
        rule=rules.adaptive_mean(scores.kl_divergence, weighting.uniform()),
        client_weighting=weighting_,
    )
    # The third client's data give a model that is not finite. TFF counts a client without data in
    # a uniform mean; here it has neither score nor loss, and no weight.
    data = [*DATA[:2], (np.full_like(DATA[2][0], np.nan), DATA[2][1]), DATA[3]]
    their_weights, their_outputs = trained(theirs, data=data)
    our_weights, our_outputs = trained(ours, data=[*data, tuple(a[:0] for a in DATA[3])])
    for a, b in zip(our_weights, their_weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(our_outputs, their_outputs, strict=True):
        tf.nest.map_structure(
            lambda x, y: assert_near(x, y, rtol=1e-5),
            a.metrics["client_work"],
            b.metrics["client_work"],
        )
        assert a.metrics["aggregator"]["non_finite_clients"] == 1
        assert a.metrics["aggregator"]["clients"] == 3
        assert a.metrics["aggregator"]["zero_weight_clients"] == 1
    if kind == "variable":
        ours_type, theirs_type = (p.get_hparams.type_signature.result for p in (ours, theirs))
        for part in ("client_work", "finalizer"):
            assert ours_type[part].is_equivalent_to(theirs_type[part])
    theirs_state, ours_state = (p.next.type_signature.parameter[0].member for p in (theirs, ours))
    assert ours_state.finalizer.is_equivalent_to(theirs_state.finalizer)
    assert ours_state.global_model_weights.is_equivalent_to(theirs_state.global_model_weights)


@pytest.mark.parametrize("kind", selection.params(["variable", "functional"], ["functional"]))
def test_without_a_rule_it_is_tffs_weighted_averaging(kind):
    model = model_fn if kind == "variable" else twin.functional_model()
    server = tff.learning.optimizers.build_adam(0.1)
    theirs = tff.learning.algorithms.build_weighted_fed_avg(model, MOMENTUM, server)
    ours = aggregators.build_fed_avg(model, MOMENTUM, server)
    data = [*DATA, tuple(a[:0] for a in DATA[3])]
    their_weights, their_outputs = trained(theirs, data=data)
    our_weights, our_outputs = trained(ours, data=data)
    for a, b in zip(our_weights, their_weights, strict=True):
        assert_near(a, b)
    for a, b in zip(our_outputs, their_outputs, strict=True):
        tf.nest.map_structure(
            lambda x, y: assert_near(x, y, rtol=1e-5),
            a.metrics["client_work"],
            b.metrics["client_work"],
        )


def test_numbers_of_a_rule_are_hyperparameters_and_follow_schedules():
    falling = tf.keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [2.0, 0.5, 0.25])
    scheduled, by_hand = (
        aggregators.build_fed_kl(twin.functional_model(), SGD, temperature=t, bound=50.0)
        for t in (falling, 2.0)
    )
    assert "temperature" not in scheduled.get_hparams(scheduled.initialize())["aggregator"]
    states = [scheduled.initialize(), by_hand.initialize()]
    for temperature in (2.0, 0.5, 0.25):
        hparams = by_hand.get_hparams(states[1])
        assert list(hparams["aggregator"]) == ["temperature", "bound", "decay"]
        hparams["aggregator"]["temperature"] = temperature
        states[1] = by_hand.set_hparams(states[1], hparams)
        assert states[0].aggregator["temperature"] == temperature
        states = [
            p.next(s, twin.datasets(DATA)).state
            for p, s in zip((scheduled, by_hand), states, strict=True)
        ]
    for a, b in zip(*(s.global_model_weights.trainable for s in states), strict=True):
        assert_near(a, b)
    # And the numbers matter: with those of the first round all along, training ends elsewhere.
    weights, _ = trained(by_hand)
    assert max(abs(w - a).max() for w, a in zip(weights, states[0].global_model_weights[0])) > 1e-5


def test_a_schedule_that_leaves_the_range_of_its_number_ends_the_round_that_would_use_it():
    steps = tf.keras.optimizers.schedules.PiecewiseConstantDecay
    with pytest.raises(ValueError, match=r"`temperature` must be .*; found a schedule that starts"):
        weighting.softmax(steps([2], [-1.0, 1.0]))

    class OfTensors(tf.keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return tf.cast(step, tf.float32) + tf.cast(step.dtype.is_integer, tf.float32)

    weighting.softmax(OfTensors())
    ends = steps([0, 1], [2.0, 1.0, -1.0])
    model, data = twin.functional_model(), twin.datasets(DATA)
    work = tff.learning.templates.build_functional_model_delta_client_work(
        model=model,
        optimizer=SGD,
        client_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES,
    )
    weighted = aggregators.build_self_weighting_client_work(
        work, scores.l2_distance, weighting.softmax(ends)
    )
    for process in (
        aggregators.build_fed_kl(model, SGD, temperature=ends),
        aggregators.compose_fed_avg(model, weighted),
    ):
        state = process.initialize()
        for _ in range(2):  # the number of the third round stands in the state, unused
            state = process.next(state, data).state
        with pytest.raises(Exception, match=r"`temperature` must be .* its schedule gives.*-1"):
            process.next(state, data)


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_number_out_of_its_range_cannot_be_set(value, fed_kl):
    state = fed_kl.initialize()
    hparams = fed_kl.get_hparams(state)
    hparams["aggregator"]["temperature"] = value
    with pytest.raises(Exception, match="`temperature` must be a finite number of at least"):
        fed_kl.set_hparams(state, hparams)


@pytest.fixture(scope="module")
def fed_kl():
    return aggregators.build_fed_kl(twin.functional_model(), SGD, sample_size=2)


def test_hyperparameters_are_read_and_set(fed_kl):
    state = fed_kl.initialize()
    hparams = fed_kl.get_hparams(state)
    assert np.isclose(hparams["client_work"]["learning_rate"], twin.RATE)
    hparams["client_work"]["learning_rate"] = 0.0
    frozen = fed_kl.next(fed_kl.set_hparams(state, hparams), twin.datasets(DATA)).state
    moved = fed_kl.next(state, twin.datasets(DATA)).state
    before = fed_kl.get_model_weights(state).trainable[0]
    np.testing.assert_array_equal(fed_kl.get_model_weights(frozen).trainable[0], before)
    assert np.any(fed_kl.get_model_weights(moved).trainable[0] != before)


def test_tffs_training_loop_and_checkpoints_resume_bit_for_bit(fed_kl, tmp_path):
    def run(rounds, folder):
        manager = tff.program.FileProgramStateManager(tmp_path / folder)
        return tff.simulation.run_training_process(
            fed_kl,
            lambda round_num: twin.datasets(twin.make_data(seed=round_num)),
            total_rounds=rounds,
            program_state_manager=manager,
        )

    run(1, "cut")
    resumed, whole = run(2, "cut"), run(2, "whole")
    tf.nest.map_structure(np.testing.assert_array_equal, resumed, whole)


class _Source(tff.program.FederatedDataSource):
    """All clients, every round; TFF's own source cannot copy datasets that live in memory."""

    federated_type = None

    def __init__(self, process):
        self.federated_type = process.next.type_signature.parameter[1]

    def iterator(self):
        return _Iterator(self.federated_type)


class _Iterator(tff.program.FederatedDataSourceIterator):
    federated_type = None

    def __init__(self, federated_type):
        self.federated_type = federated_type

    @classmethod
    def from_bytes(cls, data):
        raise NotImplementedError  # nothing here resumes

    def to_bytes(self):
        return b"all clients"

    def __deepcopy__(self, memo):
        return self  # it has nothing that changes, and TFF's types cannot be copied

    def select(self, k=None):
        return twin.datasets(DATA[:k])


def test_tffs_training_program_trains_and_releases(fed_kl, tmp_path):
    models, metrics = tff.program.MemoryReleaseManager(), tff.program.MemoryReleaseManager()
    context = tff.program.NativeFederatedContext(
        tff.backends.native.create_async_local_cpp_execution_context()
    )
    with tff.framework.get_context_stack().install(context):
        asyncio.run(
            tff.learning.programs.train_model(
                train_process=fed_kl,
                train_data_source=_Source(fed_kl),
                train_per_round_clients=len(DATA),
                train_total_rounds=2,
                program_state_manager=tff.program.FileProgramStateManager(tmp_path),
                model_output_manager=models,
                train_metrics_manager=metrics,
                evaluation_manager=None,
                evaluation_periodicity=1,
            )
        )
    expected, _ = trained(fed_kl, 2)
    (released,) = list(models.values().values())[-1:]
    found = fed_kl.get_model_weights(released).trainable
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b)
    assert metrics.values()[2]["aggregator"]["clients"] == len(DATA)


@pytest.mark.parametrize(
    "build",
    selection.params(
        {
            "momentum": lambda: aggregators.build_fed_kl(
                model_fn, SGD, tff.learning.optimizers.build_sgdm(1.0, momentum=0.9), bound=5.0
            ),
            "adam": lambda: aggregators.build_fed_med(
                twin.functional_model(), SGD, tff.learning.optimizers.build_adam(0.1)
            ),
        },
        ["adam"],
    ),
)
def test_all_clients_bad_leaves_the_model_and_the_optimizer_as_they_were(build):
    process = build()
    state = process.next(process.initialize(), twin.datasets(DATA)).state
    bad = [(np.full_like(x, np.inf), y) for x, y in DATA]
    output = process.next(state, twin.datasets(bad))
    for a, b in zip(
        process.get_model_weights(output.state).trainable,
        process.get_model_weights(state).trainable,
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    tf.nest.map_structure(np.testing.assert_array_equal, output.state.finalizer, state.finalizer)
    before, after = dict(state.aggregator), dict(output.state.aggregator)
    assert after.pop("round") == before.pop("round") + 1
    tf.nest.map_structure(np.testing.assert_array_equal, after, before)
    assert output.metrics["finalizer"]["update_non_finite"] == 1
    assert output.metrics["aggregator"]["unchanged"] == 1
    assert output.metrics["aggregator"]["non_finite_clients"] == len(DATA)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: aggregators.build_fed_kl(m, SGD, temperature=0), ValueError, "`temperature`"),
        (lambda m: aggregators.build_fed_att(m, SGD, norm="l1"), ValueError, "`norm`.*'l1'"),
        (lambda m: aggregators.build_fed_att(m, SGD, step_size=-1), ValueError, "`step_size`"),
        (
            lambda m: aggregators.build_fed_med(m, SGD, gate="x"),
            ValueError,
            "`gate` must be",
        ),
        (lambda m: aggregators.build_fed_med(m, SGD, min_decrease=1), ValueError, "`min_decrease`"),
        (
            lambda m: aggregators.build_q_fed_avg(m, SGD, q=-1, learning_rate=1.0),
            ValueError,
            "`q` must be a finite number of at least 0; found -1",
        ),
        (
            lambda m: aggregators.build_q_fed_avg(m, SGD, learning_rate=0.0),
            ValueError,
            "`learning_rate` must be a finite number above 0",
        ),
        (lambda m: aggregators.build_fed_att(m, SGD, step_size=np.nan), ValueError, "`step_size`"),
        (lambda m: aggregators.build_fed_att(m, SGD, step_size=np.inf), ValueError, "`step_size`"),
        (lambda m: aggregators.build_fed_nova(m, SGD, momentum=1.0), ValueError, "`momentum`"),
        (
            lambda m: aggregators.build_fed_nova(m, MOMENTUM),
            ValueError,
            "`momentum` must be that of `client_optimizer_fn`; found 0.0, and 0.8",
        ),
        (
            lambda m: aggregators.build_fed_nova(m, SGD, momentum=0.8),
            ValueError,
            "`momentum` must be that of `client_optimizer_fn`; found 0.8, and 0.0",
        ),
        (
            lambda m: aggregators.build_q_fed_avg(m, SGD, learning_rate=5.0),
            ValueError,
            "`learning_rate` must be that of `client_optimizer_fn`; found 5.0, and 0.2",
        ),
        (lambda m: aggregators.build_fed_kl(m, SGD, "adam"), TypeError, "`server_optimizer_fn`"),
        (lambda m: aggregators.build_fed_kl(m, "sgd"), TypeError, "`client_optimizer_fn`.*'sgd'"),
        (lambda m: aggregators.build_fed_med(m, "sgd"), TypeError, "`client_optimizer_fn`"),
        (lambda m: aggregators.build_fed_nova(m, "sgd"), TypeError, "`client_optimizer_fn`"),
        (
            lambda m: aggregators.build_q_fed_avg(m, "sgd", learning_rate=0.1),
            TypeError,
            "`client_optimizer_fn`",
        ),
        (lambda m: aggregators.build_fed_kl(m, SGD, sample_size=-1), ValueError, "`sample_size`"),
        (lambda m: aggregators.build_fed_kl(m, SGD, layers=[(0,)]), ValueError, "`layers` must"),
        (lambda m: aggregators.build_fed_kl(3, SGD), TypeError, "`model_fn`"),
        (
            lambda m: aggregators.build_fed_kl(make_keras_model(), SGD),
            TypeError,
            "`model_fn` must be .*from_keras_model",
        ),
        (
            lambda m: aggregators.build_fed_avg(m, SGD, rule=rules.q_fed_avg),
            TypeError,
            "`rule` must be a `Rule`",
        ),
        (
            lambda m: aggregators.build_fed_kl(m, SGD, layers="layer"),
            ValueError,
            "A functional model keeps no names",
        ),
        (
            lambda m: aggregators.build_fed_kl(m, SGD, client_weighting=None),
            TypeError,
            "`client_weighting` must be a `ClientWeighting`",
        ),
        (
            lambda m: aggregators.build_fed_kl(m, SGD, loop_implementation="reduce"),
            TypeError,
            "`loop_implementation` must be a `LoopImplementation`",
        ),
    ],
)
def test_bad_arguments_raise_when_a_process_is_built(call, error, message):
    with pytest.raises(error, match=message):
        call(twin.functional_model())
