"""The loop against rounds called by hand: the same numbers, whatever stops and resumes it."""

import collections
import csv
import functools
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from tff_optim import ResidentProcess, simulation

ROOT = pathlib.Path(__file__).parent.parent
SPEC = collections.OrderedDict(
    x=tf.TensorSpec([None, 2], tf.float32), y=tf.TensorSpec([None, 1], tf.float32)
)


@functools.cache
def build_model():
    dense = tf.keras.layers.Dense(1, input_shape=(2,), kernel_initializer="ones")
    return tff.learning.models.functional_model_from_keras(
        tf.keras.Sequential([dense]),
        tf.keras.losses.MeanSquaredError(),
        SPEC,
        lambda: collections.OrderedDict(loss=tf.keras.metrics.MeanSquaredError()),
    )


@functools.cache
def build_process():
    """KL-weighted averaging with Adam on the server, which has a state worth resuming."""
    return aggregators.build_fed_kl(
        build_model(),
        tff.learning.optimizers.build_sgdm(0.05),
        tff.learning.optimizers.build_adam(0.1),
        sample_size=3,
    )


def make_clients(count=6):
    rng = np.random.default_rng(1)
    clients = {}
    for i in range(count):
        x = rng.normal(size=(8, 2)).astype(np.float32)
        data = collections.OrderedDict(x=x, y=x[:, :1] * (i + 1))
        clients[f"client {i}"] = tf.data.Dataset.from_tensor_slices(data).batch(4)
    return clients


def evaluate(weights):
    return {"size": np.float32(sum(np.abs(w).sum() for w in weights.trainable))}


def learning():
    return build_process(), make_clients(), evaluate


def numbers(history):
    """The records without times, which differ."""
    return [
        sorted((k, v) for k, v in record.items() if "time_in_seconds" not in k)
        for record in history.rounds
    ]


@pytest.fixture(scope="module")
def process():
    return build_process()


@pytest.fixture(scope="module")
def undisturbed(process):
    return simulation.run(process, make_clients(), rounds=4, clients_per_round=3, evaluate=evaluate)


def test_the_rounds_are_those_of_the_process(process, undisturbed):
    clients = make_clients()
    state = process.initialize()
    for number in (1, 2, 3, 4):
        cohort = [r["client"] for r in undisturbed.clients.where(round=number)]
        assert len(set(cohort)) == 3
        output = process.next(state, [clients[client] for client in cohort])
        state = output.state
        (record,) = undisturbed.rounds.where(round=number)
        loss = output.metrics["client_work"]["train"]["loss"]
        assert record["client_work/train/loss"] == loss
        shown = output.metrics["aggregator"]
        for layer, score in shown["score_mean"].items():
            np.testing.assert_equal(record[f"aggregator/score_mean/{layer}"], float(score))
        for place, row in enumerate(undisturbed.clients.where(round=number)):
            for layer, weights in shown["sample_weights"].items():
                assert row[f"aggregator/weights/{layer}"] == weights[place]
        weights = process.get_model_weights(state)
        assert record["evaluation/size"] == evaluate(weights)["size"]
    for mine, theirs in zip(
        undisturbed.state.global_model_weights.trainable, weights.trainable, strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert not any("sample" in column for column in undisturbed.rounds.columns)
    assert undisturbed.ended == {("process", 0): "finished"}


def test_evaluation_runs_before_the_first_round_and_then_every_kth(process):
    history = simulation.run(
        process,
        make_clients(),
        rounds=4,
        clients_per_round=2,
        evaluate=evaluate,
        rounds_per_evaluation=2,
    )
    evaluated = [r["round"] for r in history.rounds if "evaluation/size" in r]
    assert evaluated == [0, 2, 4]


PIECES = {
    "plain-1": (False, 1),
    "plain-3": (False, 3),
    "resident-1": (True, 1),
    "resident-3": (True, 3),
}


@pytest.mark.parametrize(
    ("resident", "every"), selection.params(PIECES, ["plain-3", "resident-1"], unpack=True)
)
def test_a_run_in_pieces_gives_the_numbers_of_one_in_a_piece(
    process, undisturbed, tmp_path, resident, every
):
    for rounds in (2, 4):
        one = ResidentProcess(process) if resident else process
        history = simulation.run(
            one,
            make_clients(),
            rounds=rounds,
            clients_per_round=3,
            evaluate=evaluate,
            directory=tmp_path,
            rounds_per_checkpoint=every,
        )
        if resident:
            weights = one.get_model_weights(history.state)
            one.close()
        else:
            weights = one.get_model_weights(history.state)
    assert str(numbers(history)) == str(numbers(undisturbed))
    assert str(list(history.clients)) == str(list(undisturbed.clients))
    expected = process.get_model_weights(undisturbed.state)
    for mine, theirs in zip(weights.trainable, expected.trainable, strict=True):
        np.testing.assert_array_equal(mine, theirs)


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import tensorflow_federated as tff
import test_simulation
from tff_optim import ResidentProcess, simulation
tff.backends.native.set_sync_local_cpp_execution_context()
class Slow(tff.program.ReleaseManager):
    async def release(self, value, key):
        print("round", key, flush=True)
        import time; time.sleep(0.3)
try:
    process, clients, evaluate = getattr(test_simulation, sys.argv[6])()
    if sys.argv[4]:
        process = ResidentProcess(process, device=sys.argv[4])
    for _ in range(int(sys.argv[5])):
        history = simulation.run(process, clients, rounds=int(sys.argv[3]),
            clients_per_round=3, evaluate=evaluate, directory=sys.argv[2],
            rounds_per_checkpoint=2, managers=[Slow()])
        print("ended", history.ended, flush=True)
finally:
    tff.test.set_no_default_context()
"""


def start(directory, rounds, device="", times=1, what="learning"):
    arguments = (ROOT / "tests", directory, rounds, device, times, what)
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def wait_for(child, line):
    for found in child.stdout:
        if found.strip() == line:
            return
    raise AssertionError(f"no {line!r}")


def test_ctrl_c_ends_after_the_round_and_loses_nothing_even_if_the_worker_gets_it_too(tmp_path):
    child = start(tmp_path, 1000, times=2, what="adding")
    try:
        # At a terminal it reaches the worker too, with which the same run then goes on.
        for send in (os.killpg, os.kill):
            first, _ = (next(s for s in child.stdout if s.startswith("round")) for _ in range(2))
            send(child.pid, signal.SIGINT)
            assert "interrupted" in next(s for s in child.stdout if s.startswith("ended"))
        assert child.wait(timeout=60) == 0
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.stdout.close()
    assert int(first.split()[1]) > 1  # the second run went on from the first
    with open(tmp_path / "rounds.csv", newline="") as file:
        rounds = [int(row["round"]) for row in csv.DictReader(file)]
    assert rounds == list(range(len(rounds)))
    assert f"program_state_{rounds[-1]}" in os.listdir(tmp_path / "checkpoints")


def test_ctrl_c_in_this_process_leaves_the_process_usable(process, undisturbed):
    class Presser(tff.program.ReleaseManager):
        async def release(self, value, key):
            if key == 2:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)

    arguments = {"clients_per_round": 3, "evaluate": evaluate}
    history = simulation.run(
        {"a": process, "b": process}, make_clients(), rounds=9, managers=[Presser()], **arguments
    )
    assert history.ended == {("a", 0): "interrupted"}
    assert history.rounds["round"].tolist() == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = simulation.run(process, make_clients(), rounds=4, **arguments)
    assert str(numbers(again)) == str(numbers(undisturbed))


def test_several_processes_and_seeds_in_one_call(process, tmp_path):
    made = []

    def build(seed):
        made.append(seed)
        return process

    history = simulation.run(
        {"KL": process, "built": build},
        make_clients(),
        rounds=2,
        clients_per_round=2,
        seed=[3, 4],
        directory=tmp_path,
    )
    assert made == [3, 4]
    assert list(history.ended) == [("KL", 3), ("KL", 4), ("built", 3), ("built", 4)]
    assert len(history.rounds) == 8
    assert (tmp_path / "built" / "seed_4" / "rounds.csv").exists()
    one = history.only("KL", 4)
    assert one.clients["client"].tolist() != history.only("KL", 3).clients["client"].tolist()
    assert one.rounds[0].items() >= {"process": "KL", "seed": 4, "round": 1}.items()
    with pytest.raises(ValueError, match="`state` must be that of a single run; found runs"):
        _ = history.state
    with pytest.raises(KeyError, match=r"`process` and `seed` must be those of a run; found .*7"):
        history.only("KL", 7)
    with pytest.raises(KeyError, match="`key` must be a column of the table; found 'lost'"):
        _ = history.rounds["lost"]
    with pytest.raises(KeyError, match=r"`values` must name columns of the table; found .*lost"):
        history.rounds.where(lost=1)


def test_a_stop_is_kept_over_a_resume(process, tmp_path):
    def run():
        return simulation.run(
            process,
            make_clients(),
            rounds=9,
            clients_per_round=2,
            directory=tmp_path,
            stop=lambda rounds: len(rounds) >= 3,
        )

    for history in (run(), run()):
        assert history.ended == {("process", 0): "stopped"}
        assert history.rounds["round"].tolist() == [1, 2, 3]
        assert np.shape(history.state.global_model_weights.trainable[0]) == (2, 1)


def test_it_runs_where_an_event_loop_runs_as_in_a_notebook(process, undisturbed):
    import asyncio

    async def cell():
        return simulation.run(
            process, make_clients(), rounds=4, clients_per_round=3, evaluate=evaluate
        )

    assert str(numbers(asyncio.run(cell()))) == str(numbers(undisturbed))


def adding():
    """An iterative process that learns nothing, its clients, and what evaluates its state."""

    @tff.tensorflow.computation
    def zero():
        return np.float32(0)

    @tff.tensorflow.computation(np.float32, np.float32)
    def add(a, b):
        return a + b

    @tff.federated_computation
    def initialize():
        return tff.federated_eval(zero, tff.SERVER)

    @tff.federated_computation(
        tff.FederatedType(np.float32, tff.SERVER), tff.FederatedType(np.float32, tff.CLIENTS)
    )
    def step(state, values):
        mean = tff.federated_mean(values)
        return tff.federated_map(add, (state, mean)), mean

    clients = [np.float32(2.0)] * 3
    return tff.templates.IterativeProcess(initialize, step), clients, lambda s: {"state": s}


def test_any_iterative_process_runs_and_evaluate_gets_its_state():
    process, clients, evaluate = adding()
    history = simulation.run(process, clients, rounds=3, clients_per_round=2, evaluate=evaluate)
    assert history.rounds["evaluation/state"].tolist() == [0, 2, 4, 6]
    assert history.rounds.where(round=2)[0]["result"] == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rounds": -1}, ValueError, "`rounds` must be a whole number of at least 0; found -1"),
        ({"clients_per_round": 7}, ValueError, "at most the number of clients, 6; found 7"),
        ({"clients_per_round": 0}, ValueError, "at least 1; found 0"),
        ({"rounds_per_checkpoint": 0}, ValueError, "`rounds_per_checkpoint` must be"),
        ({"seed": [1, 1]}, ValueError, "several different ones; found \\[1, 1\\]"),
        ({"seed": -1}, ValueError, "`seed` must be"),
        ({"evaluate": 3}, TypeError, "`evaluate` must be a function or None; found 3"),
        ({"evaluate": lambda w: 3}, TypeError, "`evaluate` must return a mapping"),
        ({"stop": 3}, TypeError, "`stop` must be a function or None; found 3"),
        ({"clients": 3}, TypeError, "`clients` must be a mapping .*found 3"),
        ({"clients": lambda seed: 3}, TypeError, "a function from a seed to one of these; found 3"),
        ({"clients": []}, ValueError, "`clients` must hold at least one client"),
        ({"process": 3}, TypeError, "`process` must be a learning process.*found 3"),
        ({"process": {}}, ValueError, "at least one process"),
        *(
            (
                {"process": {name: None}},
                ValueError,
                "`process` must have names that can be those of f",
            )
            for name in ("", ".", "..", "a/b", "\0", "x" * 256, "\u20ac" * 90, "\ud800", 3)
        ),
        ({"process": lambda seed: 3}, TypeError, "'process' returned 3"),
        *(
            ({"directory": path}, TypeError, "`directory` must be the path of a folder")
            for path in ("", "a\0b", "\ud800", b"bytes", 3)
        ),
    ],
)
def test_a_bad_argument_is_an_error_before_the_first_round(process, change, error, message):
    arguments = {
        "process": process,
        "clients": make_clients(),
        "rounds": 1,
        "clients_per_round": 2,
        **change,
    }
    with pytest.raises(error, match=message):
        simulation.run(arguments.pop("process"), arguments.pop("clients"), **arguments)


def test_a_directory_of_another_run_is_refused(process, tmp_path):
    arguments = {"rounds": 1, "clients_per_round": 2, "directory": tmp_path}
    simulation.run(process, make_clients(), **arguments)
    with pytest.raises(ValueError, match=r"`directory` must hold a run with .*'seed': 1"):
        simulation.run(process, make_clients(), seed=1, **arguments)
    with pytest.raises(ValueError, match="must be a new one, since `resume` is False"):
        simulation.run(process, make_clients(), resume=False, **arguments)


def test_large_metrics_are_summed_up_and_texts_kept():
    found = simulation.flatten(
        {"big": np.arange(1000.0), "text": b"so", "list": [1, (2.5, True)], "none": {}}
    )
    assert found == {
        "big/mean": 499.5,
        "big/min": 0.0,
        "big/max": 999.0,
        "text": "so",
        "list/0": 1,
        "list/1/0": 2.5,
        "list/1/1": True,
    }


def test_no_better_looks_at_the_best_so_far():
    stop = simulation.no_better("accuracy", rounds=2)
    table = [{"round": i, "accuracy": a} for i, a in enumerate([0.1, 0.5, math.nan, 0.4])]
    assert [stop(simulation.Table(table[:n])) for n in range(5)] == [False] * 4 + [True]
    with pytest.raises(ValueError, match="`metric` must be a metric of the run; found 'accuracy'"):
        stop(simulation.Table([{"round": i, "loss": 1.0} for i in range(3)]))
    with pytest.raises(ValueError, match="`rounds` must be a whole number"):
        simulation.no_better("loss", rounds=0)
