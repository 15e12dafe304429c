"""The short examples do, in a few rounds, what they say, and stay short."""

import ast
import http.server
import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near
from tensorflow_federated.python.simulation.models import mobilenet_v2

from tff_optim import build_keras_optimizer

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
TESTS = [pathlib.Path(__file__), pathlib.Path(__file__).with_name("test_examples.py")]


def called(path):
    """The examples that the tests of a file import, or run as programs."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(ast.Name("example" | "run_example"), [ast.Constant(name), *_]):
                yield name.removesuffix(".py")


CALLED = {name for path in TESTS for name in called(path)}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_listed_and_tested(name, example):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100
    assert f"| [`{name}.py`]({name}.py) |" in (EXAMPLES / "README.md").read_text()
    assert name in CALLED
    example(name)  # all that it imports is there


@pytest.mark.slow
def test_as_a_program_it_prints_and_ends_its_worker():
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "porting.py"), "2"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    assert "sum and maximum over clients: (8.0, 5.0)" in run.stdout
    assert "Exception ignored" not in run.stderr


@pytest.mark.slow  # by the test after it, from the same start
def test_old_code_trains_as_it_is_written_now(example):
    losses, evaluated = example("porting").main("6")
    assert losses[-1] < losses[0]
    assert evaluated < losses[0]


def test_a_round_written_by_hand_is_that_of_a_builder(example):
    """Federated averaging by Keras' SGD and Adam, which TFF's builder makes too."""
    by_hand, porting = example("porting_round"), example("porting")
    assert len(by_hand.main("1")) == 2
    process = tff.templates.IterativeProcess(by_hand.initialize, by_hand.step)
    keras = tf.keras.optimizers
    built = tff.learning.algorithms.build_weighted_fed_avg(
        porting.model_fn,
        build_keras_optimizer(keras.SGD(0.05)),
        build_keras_optimizer(keras.Adam(0.1)),
    )
    mine, clients = process.initialize(), porting.make_clients()
    start = tff.learning.models.ModelWeights(mine[0].trainable, mine[0].non_trainable)
    theirs = built.set_model_weights(built.initialize(), start)
    for _ in range(2):
        mine, examples = process.next(mine, clients)
        theirs = built.next(theirs, clients).state
    assert examples == 128
    for one, other in zip(
        mine[0].trainable, built.get_model_weights(theirs).trainable, strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_rules_are_compared_on_every_client(example, tmp_path, capfd):
    assert len((EXAMPLES / "compare_fairness.py").read_text().splitlines()) < 60
    history = example("compare_fairness").main("1", "2", str(tmp_path))
    assert len(history.ended) == 10
    held_out = history.clients.where(process="jury", seed=1, round=1)
    shares = held_out["evaluation/accuracy"]
    assert len(shares) == 20
    (record,) = history.rounds.where(process="jury", seed=1, round=1)
    assert record["evaluation/clients/accuracy/mean"] == pytest.approx(np.mean(shares))
    worst = record["evaluation/clients/accuracy/lowest_decile"]
    assert worst == pytest.approx(np.mean(np.sort(shares)[:2]))
    assert capfd.readouterr().out.count("| jury |") == 2
    assert (tmp_path / "fairness.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "fairness.pdf").read_bytes().startswith(b"%PDF")


class Server(http.server.BaseHTTPRequestHandler):
    """Takes what MLflow's server takes."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        runs = self.server.runs
        answer = {}
        if self.path == "/api/2.0/mlflow/runs/create":
            runs[body["run_name"]] = []
            answer = {"run": {"info": {"run_id": body["run_name"]}}}
        else:
            assert self.path == "/api/2.0/mlflow/runs/log-batch"
            runs[body["run_id"]] += body["metrics"]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments):
        """Says nothing."""


def test_each_round_is_sent_to_mlflow(example):
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        server.runs = {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        history = example("mlflow_sink").main("2", url)
        server.shutdown()
    assert list(server.runs) == ["FedAvg, seed 0", "FedAvg, seed 1"]
    for seed, name in enumerate(server.runs):
        sent = [one for one in server.runs[name] if one["key"] == "client_work/train/error"]
        found = history.rounds.where(seed=seed)["client_work/train/error"].tolist()
        assert [(one["step"], one["value"]) for one in sent] == list(enumerate(found, 1))


@pytest.mark.slow
def test_rules_are_compared_in_a_picture(example, tmp_path):
    history = example("compare_rules").main("2", "2", str(tmp_path))
    names = ("FedAvg", "KL, near", "jury")
    assert list(history.ended) == [(name, seed) for name in names for seed in (0, 1)]
    assert history.rounds["evaluation/accuracy"].shape == (18,)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_keras_optimizers_train(example):
    losses = example("keras_in_five_lines").main("6")
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_fed_prox_holds_clients_and_constraints_hold_the_server(example):
    moved, (kernel, bias) = example("fed_prox_pipeline").main("6")
    assert max(moved[3:]) < 0.5 * min(moved[:3])  # from the middle on the pull is 50 times stronger
    assert kernel.min() >= -1 - 1e-6
    assert max(abs(kernel).max(), abs(bias).max()) <= 3 + 1e-6
    _, (kernel, _) = example("fed_prox_pipeline").main("12")
    assert kernel.min() == pytest.approx(-1, abs=1e-6)  # the truth is -2


@pytest.mark.slow
def test_a_run_goes_on(example, tmp_path):
    module = example("kill_and_resume")
    module.main("2", str(tmp_path / "pieces"))
    pieces, weights = module.main("4", str(tmp_path / "pieces"))
    assert pieces.rounds["round"].tolist() == [1, 2, 3, 4]
    assert np.shape(weights.trainable[0]) == (3, 1)


@pytest.mark.slow
def test_three_ways_of_kl_weighting_agree(example):
    by_way, shares = example("kl_three_ways").main("3")
    for weights in by_way[1:]:
        assert_near(weights, by_way[0], rtol=1e-5)
    # The first round is plain averaging; after it the client that has the truth upside down loses.
    assert shares[2][-1] < 0.5 * shares[0][-1]


def test_a_gate_of_yours_opens_and_shuts(example):
    history = example("own_gate").main("6")
    loss, share = history.rounds["aggregator/loss"], history.rounds["aggregator/share"]
    opened = [min(done / 4, 1) for done in range(6)]
    risen = [False] + [now > 1.1 * before for before, now in itertools.pairwise(loss)]
    assert any(risen)
    expected = [0 if up else at for up, at in zip(risen, opened)]
    assert_near(share, expected)


@pytest.mark.slow
def test_lamb_trains_on_the_server(example):
    accuracy = example("lamb_on_server").main("12").rounds["evaluation/accuracy"]
    assert accuracy[-1] > accuracy[0] + 0.2


@pytest.mark.slow
def test_several_workers_give_the_numbers_of_plain_tff(example):
    plain, *others = example("several_workers").main("2").values()
    assert len(others) == 2
    for weights in others:
        assert_near(weights, plain, rtol=1e-5)


@pytest.mark.slow
def test_a_language_model_learns(example):
    history = example("language_model").main("10")
    first, last = history.rounds.where(round=0)[0], history.rounds.where(round=10)[0]
    assert last["evaluation/perplexity"] < 0.5 * first["evaluation/perplexity"]


def small_network(input_shape, num_groups, num_classes):
    """What stands in for MobileNetV2: as many numbers in and out, one layer."""
    del num_groups
    return tf.keras.Sequential(
        [
            tf.keras.layers.GlobalAveragePooling2D(input_shape=input_shape),
            tf.keras.layers.Dense(num_classes, "softmax"),
        ]
    )


TASKS = [
    "cifar100",
    "emnist",
    "emnist_autoencoder",
    "landmark",
    "shakespeare",
    "stackoverflow_tags",
    "stackoverflow_words",
]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_baseline_task_trains(example, task, monkeypatch):
    if task == "landmark":
        # Plain TFF takes most of a minute to build MobileNetV2 and run its first round, with three
        # examples. So this runs the task's data, loss and metrics with a small network.
        monkeypatch.setattr(mobilenet_v2, "create_mobilenet_v2", small_network)
    history = example("baselines").main(task, "1")[task]
    assert np.isfinite(history.rounds["client_work/train/loss"]).all()
    assert history.rounds["finalizer/update_non_finite"].tolist() == [0]


def test_no_baseline_task_is_left_out(example):
    assert set(TASKS) == set(example("baselines").TASKS)


def test_the_baseline_tasks_are_those_of_tff(example):
    import tensorflow_federated as tff

    tasks = tff.simulation.baselines
    modules = (tasks.cifar100, tasks.emnist, tasks.landmark, tasks.shakespeare, tasks.stackoverflow)
    there = {
        getattr(module, name)
        for module in modules
        for name in dir(module)
        if name.startswith("create_") and name.endswith("_task")
    }
    assert set(example("baselines").TASKS.values()) == there


def test_a_score_of_yours_weighs_clients(example):
    history = example("own_score").main("3")
    (name,) = [
        column for column in history.clients.columns if column.endswith("weights/dense/kernel")
    ]
    for number in (1, 2, 3):
        assert history.clients.where(round=number)[name].sum() == pytest.approx(1, abs=1e-5)
