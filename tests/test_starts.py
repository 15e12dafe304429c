"""Where runs start, and what tells that a folder holds another run."""

import collections
import functools
import json
import warnings

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near
from test_simulation import SPEC, build_process, evaluate, make_clients, numbers

import aggregators
from tff_optim import ResidentProcess, simulation

ModelWeights = tff.learning.models.ModelWeights
FEW = {"rounds": 1, "clients_per_round": 2}


def build_keras_model(initializer="glorot_uniform", outputs=1):
    dense = tf.keras.layers.Dense(outputs, input_shape=(2,), kernel_initializer=initializer)
    return tf.keras.Sequential([dense])


@functools.cache
def build_fed_avg(rate=0.1, client_rate=0.05, start=1, functional=False):
    """Federated averaging whose model starts from weights drawn by the seed `start`."""
    loss = tf.keras.losses.MeanSquaredError()
    initializer = tf.keras.initializers.GlorotUniform(seed=start)
    if functional:
        model = tff.learning.models.functional_model_from_keras(
            lambda: build_keras_model(initializer), loss, SPEC
        )
    else:

        def model():
            return tff.learning.models.from_keras_model(build_keras_model(initializer), loss, SPEC)

    return aggregators.build_fed_avg(
        model,
        tff.learning.optimizers.build_sgdm(client_rate),
        tff.learning.optimizers.build_adam(rate),
    )


def kernel(weights):
    return {"first": weights.trainable[0][0, 0], "second": weights.trainable[0][1, 0]}


def test_all_processes_start_where_they_are_told_by_seed():
    asked = []

    def start(seed):
        asked.append(seed)
        return ModelWeights([np.float32([[seed], [2]]), np.float32([0])], [])

    with ResidentProcess(build_fed_avg(), workers=1) as resident:
        processes = {
            "plain": build_fed_avg(),
            "functional": build_fed_avg(functional=True),
            "resident": resident,
            "python": lambda seed: ResidentProcess(build_fed_avg(), device="CPU:0"),
        }
        history = simulation.run(
            processes,
            make_clients(),
            seed=[3, 4],
            evaluate=kernel,
            initial_weights=start,
            **FEW,
        )
    assert asked == [3, 4]
    for name in processes:
        for seed in (3, 4):
            first, last = history.only(name, seed).rounds
            assert (first["evaluation/first"], first["evaluation/second"]) == (seed, 2)
            assert last["evaluation/first"] != seed
    ends = [history.only(name, 3).rounds[1]["evaluation/first"] for name in processes]
    assert_near(np.asarray(ends), ends[0], rtol=1e-5)


def test_a_keras_model_gives_its_weights():
    process, model = build_process(), build_keras_model()  # TFF builds models in graphs: first it
    history = simulation.run(process, make_clients(), evaluate=kernel, initial_weights=model, **FEW)
    assert history.rounds[0]["evaluation/first"] == model.get_weights()[0][0, 0]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, r"`initial_weights` must be .*found 3"),
        (lambda seed: None, TypeError, "from a seed to one of these; found None"),
        (
            lambda seed: build_keras_model(outputs=2),
            ValueError,
            r"model of 'process', .*float32\[2, 1\].*; found .*float32\[2, 2\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        simulation.run(build_fed_avg(), make_clients(), initial_weights=given, **FEW)


def test_different_starts_of_what_is_compared_are_told_once():
    starts = {"one": 1, "two": 2, "three": 3}
    processes = {name: build_fed_avg(start=start) for name, start in starts.items()}
    with pytest.warns(UserWarning, match="`initial_weights` should be.*'one' and 'two'") as told:
        simulation.run(processes, make_clients(), seed=[0, 1], **FEW)
    assert len([w for w in told if "initial_weights" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        simulation.run({"one": processes["one"]}, make_clients(), **FEW)
        same = {"one": processes["one"], "two": build_fed_avg(functional=True)}
        simulation.run(same, make_clients(), **FEW)
        simulation.run(
            processes, make_clients(), initial_weights=lambda seed: build_keras_model(), **FEW
        )


def test_another_rate_model_or_optimizer_is_another_run(tmp_path):
    process = build_fed_avg()  # before a model, as above
    arguments = {"directory": tmp_path, "initial_weights": build_keras_model(), **FEW}
    for _ in range(2):
        simulation.run(process, make_clients(), **arguments)
    for change in ({"rate": 0.2}, {"client_rate": 0.2}):
        with pytest.raises(ValueError, match=r"learning_rate': 0\.2.*, or none; found one with"):
            simulation.run(build_fed_avg(**change), make_clients(), **arguments)
    with pytest.raises(ValueError, match=r"state_type.*is another model, optimizer or rule\."):
        simulation.run(build_process(), make_clients(), directory=tmp_path, **FEW)
    with ResidentProcess(process) as resident:  # another place is the same run
        simulation.run(resident, make_clients(), **{**arguments, "directory": tmp_path / "new"})
        with pytest.raises(ValueError, match=r"client_work/learning_rate': 0\.2"):
            simulation.run(
                build_fed_avg(client_rate=0.2), make_clients(), directory=tmp_path / "new", **FEW
            )
    known = json.loads((tmp_path / "arguments.json").read_text())
    assert known["hparams/finalizer/learning_rate"] == pytest.approx(0.1)


def test_files_that_no_run_has_written_are_left_alone(tmp_path):
    (tmp_path / "rounds.csv").write_text("mine\n")
    with pytest.raises(ValueError, match=r"none of its files; found \['rounds.csv'\]"):
        simulation.run(build_process(), make_clients(), directory=tmp_path, **FEW)
    assert (tmp_path / "rounds.csv").read_text() == "mine\n"


def test_numbers_of_numpy_are_numbers(tmp_path):
    history = simulation.run(
        build_process(),
        make_clients(),
        rounds=np.int64(1),
        clients_per_round=np.int32(2),
        seed=np.arange(2),
        directory=tmp_path,
        runs_at_once=np.int64(1),
        evaluate=evaluate,
        stop=simulation.no_better("min evaluation/size", np.int64(5)),
    )
    assert list(history.ended) == [("process", 0), ("process", 1)]
    alone = simulation.run(
        build_process(), make_clients(), seed=np.int64(1), evaluate=evaluate, **FEW
    )
    assert str(numbers(alone)) == str(numbers(history.only("process", 1)))


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        ({"a": None}, TypeError, "mapping from names to numbers; found None at 'a'"),
        ({"a": 1j}, TypeError, r"found 1j at 'a'"),
        ({"a": {"b": 1}, "a/b": 2}, ValueError, "`metrics` must .*found 'a/b' twice"),
        (
            {"evaluation_time_in_seconds": 1},
            ValueError,
            "`evaluate` must not .*_in_seconds'. Rename",
        ),
    ],
)
def test_what_evaluate_may_not_return(found, error, message):
    with pytest.raises(error, match=message):
        simulation.run(build_process(), make_clients(), evaluate=lambda weights: found, **FEW)


@pytest.mark.parametrize("name", ["round", "seed", "process", "evaluation"])
def test_metrics_of_a_process_leave_the_columns_of_the_loop_alone(name):
    @tff.tensorflow.computation
    def zero():
        return np.float32(0)

    @tff.federated_computation
    def initialize():
        return tff.federated_eval(zero, tff.SERVER)

    @tff.tensorflow.computation(np.float32)
    def show(value):
        return collections.OrderedDict([(name, collections.OrderedDict(a=value))])

    @tff.tensorflow.computation(np.float32)
    def show_alone(value):
        return collections.OrderedDict([(name, value)])

    shown = show if name == "evaluation" else show_alone

    @tff.federated_computation(
        tff.FederatedType(np.float32, tff.SERVER), tff.FederatedType(np.float32, tff.CLIENTS)
    )
    def step(state, values):
        return state, tff.federated_map(shown, tff.federated_mean(values))

    process = tff.templates.IterativeProcess(initialize, step)
    with pytest.raises(ValueError, match=rf"`process` must not .*found '{name}"):
        simulation.run(process, [np.float32(1), np.float32(2)], **FEW)


def test_a_history_prints_how_its_runs_ended(monkeypatch):
    history = simulation.run(
        build_process(),
        make_clients(),
        rounds=21,
        clients_per_round=2,
        seed=[3, 4],
        evaluate=evaluate,
        rounds_per_evaluation=7,
    )
    first, *ends = str(history).splitlines()
    last = history.only("process", 4).rounds[-1]
    assert first.split()[:4] == ["process", "seed", "round", "ended"]
    assert [end.split()[:4] for end in ends] == [
        ["process", seed, "21", "finished"] for seed in "34"
    ]
    assert f"{last['evaluation/size']:.4g}" in ends[1]
    assert f"{last['client_work/train/loss']:.4g}" in ends[1]
    assert history._repr_html_().count("<tr>") == 3

    monkeypatch.setenv("COLUMNS", "70")
    lines = str(history.rounds).splitlines()
    assert max(map(len, lines)) <= 70
    for name in history.rounds.columns:
        assert str(lines).count(name + " ") + str(lines).count(name + "'") >= 1
    block = lines[: lines.index("")]
    assert len(block) == 1 + 20 + 1 + 20  # of 44 records, the ends
    assert block[21].split()[:3] == ["..."] * 3
    assert "  21" in block[-1]
    two = history.rounds[["round", "client_work/train/loss"]]
    assert two.columns == ["round", "client_work/train/loss"]
    assert two[-1] == {"round": 21, "client_work/train/loss": last["client_work/train/loss"]}
    with pytest.raises(KeyError, match="found 'lost'"):
        history.rounds[["round", "lost"]]
