"""What a caller may decide in the loop, against rounds called by hand and plain arithmetic."""

import contextlib
import functools
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff
from test_run_folder import files_of
from test_several_runs import build_scaffold
from test_simulation import build_model, make_clients, wait_for

import aggregators
from tff_optim import ResidentProcess, simulation
from tff_optim.simulation import calls

ROOT = pathlib.Path(__file__).parent.parent
RATE = "client_work/learning_rate"


@functools.cache
def process():
    """Federated averaging with Adam on the server, which moves on an update of 0 too."""
    return aggregators.build_fed_avg(
        build_model(),
        tff.learning.optimizers.build_sgdm(0.05),
        tff.learning.optimizers.build_adam(0.1),
    )


def kernel(state):
    return np.asarray(process().get_model_weights(state).trainable[0])


def run(**arguments):
    given = {"process": process(), "clients": make_clients(), "rounds": 3, "progress": False}
    if "draw" not in arguments:
        given["clients_per_round"] = 3
    return simulation.run(**(given | arguments))


# -------------------------------------------------------------------------------- numbers by round


def test_numbers_are_set_before_each_round_and_shown():
    def rates(number):
        return {"finalizer": {"learning_rate": 0.1 / number}} if number < 3 else {}

    history = run(hparams=rates)
    clients, state = make_clients(), process().initialize()
    for number in (1, 2, 3):
        hparams = process().get_hparams(state)
        if number < 3:
            hparams["finalizer"]["learning_rate"] = np.float32(0.1 / number)
        state = process().set_hparams(state, hparams)
        cohort = history.clients.where(round=number)["client"]
        state = process().next(state, [clients[one] for one in cohort]).state
    np.testing.assert_array_equal(kernel(history.state), kernel(state))
    shown = history.rounds["hparams/finalizer/learning_rate"].tolist()
    assert shown[:2] == [0.1, 0.05]
    assert math.isnan(shown[2])  # left as it was


def test_one_process_under_several_names_is_a_grid():
    rates = {"slow": 0.01, "fast": 0.05}
    grid = run(
        process=dict.fromkeys(rates, process()),
        hparams=lambda number, process, seed: {RATE: rates[process] / (1 + seed)},
        seed=[0, 1],
        rounds=1,
    )
    for name, rate in rates.items():
        for seed in (0, 1):
            alone = run(hparams=lambda number: {RATE: rate / (1 + seed)}, seed=seed, rounds=1)  # noqa: B023
            np.testing.assert_array_equal(kernel(grid.states[name, seed]), kernel(alone.state))
            assert grid.only(name, seed).rounds["hparams/" + RATE] == rate / (1 + seed)


# ------------------------------------------------------------------------------- who takes part


def test_a_draw_of_the_caller_decides_who_takes_part():
    drawn = {1: ["client 5"], 2: [], 3: ["client 0", "client 2"]}
    history = run(draw=lambda number, ids, rng: drawn[number])
    clients, state = make_clients(), process().initialize()
    for number, cohort in drawn.items():
        assert history.clients.where(round=number)["client"].tolist() == cohort if cohort else True
        if cohort:  # without one the model stays, and Adam's moments too
            state = process().next(state, [clients[one] for one in cohort]).state
    for mine, theirs in zip(tf.nest.flatten(history.state), tf.nest.flatten(state), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert history.rounds["drawn_clients"].tolist() == [1, 0, 2]
    assert len(history.clients) == 3


def test_a_cohort_may_have_another_size_in_each_round():
    history = run(clients_per_round=lambda number: 2 * number)
    assert history.rounds["drawn_clients"].tolist() == [2, 4, 6]
    other = run(clients_per_round=4, rounds=2)  # the same draw for the same size
    cohorts = [one.clients.where(round=2)["client"].tolist() for one in (history, other)]
    assert cohorts[0] == cohorts[1]


def test_poisson_draws_are_independent_with_the_rate_that_was_asked_for():
    rate, ids, rounds = 0.3, list(range(40)), 2000
    draw = simulation.poisson(rate)
    hits = np.zeros([rounds, len(ids)])
    for number in range(rounds):
        hits[number, draw(number, ids, np.random.default_rng([7, number]))] = 1
    # Each client: binomial(2000, 0.3). Five standard deviations; one of 40 lies outside in 2e-5.
    deviation = math.sqrt(rounds * rate * (1 - rate))
    assert np.all(abs(hits.sum(0) - rounds * rate) < 5 * deviation)
    # Sizes: binomial(40, 0.3), whose variance a fixed size, or clients drawn together, would miss.
    sizes = hits.sum(1)
    variance = len(ids) * rate * (1 - rate)
    assert abs(sizes.mean() - len(ids) * rate) < 5 * math.sqrt(variance / rounds)
    assert abs(sizes.var() / variance - 1) < 5 * math.sqrt(2 / rounds)
    # Pairs of clients, and rounds after each other.
    correlations = np.corrcoef(hits.T)[np.triu_indices(len(ids), 1)]
    assert np.max(abs(correlations)) < 5.5 / math.sqrt(rounds)
    assert abs(np.corrcoef(sizes[1:], sizes[:-1])[0, 1]) < 5 / math.sqrt(rounds)


def test_clients_that_keep_a_state_may_be_none_in_a_round(tmp_path):
    drawn = {1: ["client 1"], 2: [], 3: ["client 1"]}
    for rounds in (2, 3):
        history = run(
            process=build_scaffold(),
            rounds=rounds,
            draw=lambda number, ids, rng: drawn[number],
            client_states=aggregators.ClientStates,
            directory=tmp_path,
        )
    assert history.rounds["drawn_clients"].tolist() == [1, 0, 1]


# ------------------------------------------------------------------------------------- evaluation


def test_evaluate_is_told_what_it_asks_for():
    told = []

    def evaluate(weights, round, *, process, seed=None):
        told.append((round, process, seed))
        return {"test": {"size": 1.0}, "train": {"size": 2}}

    history = run(evaluate=evaluate, rounds=2, rounds_per_evaluation=2, seed=3)
    assert told == [(0, "process", None), (2, "process", None)]
    assert history.rounds[-1]["evaluation/train/size"] == 2
    assert calls.call(lambda a, *, seed: (a, seed), 1, seed=2, round=3) == (1, 2)


def losses(weights, clients):
    """The mean squared error on each client, in NumPy."""
    kernel, bias = (np.asarray(one) for one in weights.trainable)
    found = {}
    for client, data in clients.items():
        batches = list(data.as_numpy_iterator())
        x, y = (np.concatenate([batch[name] for batch in batches]) for name in "xy")
        found[client] = float(np.mean((x @ kernel + bias - y) ** 2))
    return found


def evaluate_loss(weights, data, client):
    return {"loss": losses(weights, {client: data})[client]}


@functools.cache
def eval_process():
    return tff.learning.algorithms.build_fed_eval(build_model())


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", ["function", "build_fed_eval"])
def test_clients_are_evaluated_one_by_one(kind, held_out):
    other = {f"client {i}": data for i, data in zip(range(3, 15), make_clients(12).values())}
    evaluate = eval_process() if kind == "build_fed_eval" else evaluate_loss
    history = run(per_client=simulation.PerClient(evaluate, other if held_out else None), rounds=2)
    state, clients = process().initialize(), make_clients()
    for number in (0, 1, 2) if held_out else (1, 2):
        rows = [row for row in history.clients if row["round"] == number]
        drawn = [row["client"] for row in rows if row.get("drawn", True)]
        assert len(drawn) == (3 if number else 0)
        if number:
            state = process().next(state, [clients[one] for one in drawn]).state
        expected = losses(
            process().get_model_weights(state),
            other if held_out else {one: clients[one] for one in drawn},
        )
        found = {row["client"]: row["evaluation/loss"] for row in rows if "evaluation/loss" in row}
        assert found == pytest.approx(expected, rel=1e-5)
        assert {row["client"] for row in rows} == {*drawn, *expected}
        (record,) = [one for one in history.rounds if one["round"] == number]
        values = np.sort(list(expected.values()))
        tenth = 2 if held_out else 1  # of 12 or 3 clients
        for name, value in {
            "mean": values.mean(),
            "lowest_decile": values[:tenth].mean(),
            "highest_decile": values[-tenth:].mean(),
            "spread": values.std(),
        }.items():
            assert record[f"evaluation/clients/loss/{name}"] == pytest.approx(value, rel=1e-5)


# ---------------------------------------------------------------------------------- going on


def rates(number, *, process):
    return {RATE: FACTOR["is"] * 0.05 / number}


FACTOR = {"is": 1.0}


def some(number, ids, rng):
    return list(rng.permutation(ids)[: int(2 * FACTOR["is"])])


@pytest.mark.parametrize("place", ["plain", "CPU:0"])
def test_a_run_goes_on_with_the_same_numbers_and_refuses_others(tmp_path, monkeypatch, place):
    arguments = {
        "hparams": rates,
        "draw": some,
        "per_client": simulation.PerClient(evaluate_loss, make_clients(2)),
        "rounds_per_checkpoint": 2,
    }
    one = process() if place == "plain" else ResidentProcess(process(), device="CPU:0")
    arguments["process"] = one
    for rounds in (1, 3):
        history = run(directory=tmp_path / "pieces", rounds=rounds, **arguments)
    whole = run(**arguments)
    for mine, theirs in ((history.rounds, whole.rounds), (history.clients, whole.clients)):
        kept = [
            [{k: v for k, v in r.items() if "seconds" not in k} for r in t] for t in (mine, theirs)
        ]
        assert kept[0] == kept[1]
    if place != "plain":
        one.close()
        return
    for change, message in (
        ({"draw": lambda number, ids, rng: ids[:2]}, r"hold a run with \{'draw': .*lambda"),
        ({"hparams": None}, r"hold a run with \{'hparams': None\}"),
        ({"per_client": None}, "hold a run with .*'per_client': None"),
        ({"per_client": simulation.PerClient(evaluate_loss)}, "'per_client_ids': None"),
    ):
        with pytest.raises(ValueError, match=message):
            run(directory=tmp_path / "pieces", **(arguments | change))
    monkeypatch.setitem(FACTOR, "is", 2.0)  # the same functions by name and code
    with pytest.raises(ValueError, match=r"`draw` must give what it gave in .* for round 1; found"):
        run(directory=tmp_path / "pieces", **arguments)
    history = run(directory=tmp_path / "pieces", rounds=4, resume="changed", **arguments)
    assert len(history.clients.where(round=4)) >= 4
    # From here on it is that run.
    assert len(run(directory=tmp_path / "pieces", rounds=5, **arguments).rounds) == 6


# --------------------------------------------------------------------------- stopping and keeping

SHOWN = [0.5, 0.7, 0.6, 0.7, 0.8, 0.1]


def show(weights, round):
    return {"accuracy": SHOWN[round], "seconds": -SHOWN[round], "odd": math.nan}


BEST = {
    f"{name}-{place}": (*case, place)
    for name, case in {
        "accuracy": ("evaluation/accuracy", 4),
        "nan": ("max evaluation/odd", None),
    }.items()
    for place in ("plain", "CPU:0")
}


@pytest.mark.parametrize(
    ("metric", "best", "place"),
    selection.params(BEST, ["accuracy-plain", "accuracy-CPU:0", "nan-plain"], unpack=True),
)
def test_the_best_state_is_kept_beside_the_last_ones(tmp_path, place, metric, best):
    alone = run(rounds=4, evaluate=show)  # whose last round is the best one
    histories = []
    for rounds, directory in ((5, None), (3, tmp_path), (5, tmp_path), (5, tmp_path)):
        arguments = {"keep_best": metric, "directory": directory, "rounds_per_checkpoint": 2}
        given = {"process": lambda seed: ResidentProcess(process(), device="CPU:0")}
        given = {} if place == "plain" else given
        histories.append(run(rounds=rounds, evaluate=show, **arguments, **given))
    for history in (histories[0], *histories[2:]):
        if best is None:
            assert history.kept == {}
            continue
        kept = history.kept["process", 0]
        assert (kept.round, kept.value) == (4, 0.8)
        np.testing.assert_allclose(kernel(kept.state), kernel(alone.state), rtol=1e-6)
        assert "best_round" in repr(history)
    if best is not None:
        assert histories[1].kept["process", 0].round == 1  # the first of two that are equal
        prefix = "program_state" if place == "plain" else "version"
        names = {name for name in os.listdir(tmp_path / "best") if not name.startswith(".")}
        assert names == {f"{prefix}_1", f"{prefix}_4"}
        shutil.rmtree(tmp_path / "best" / f"{prefix}_4")
        with pytest.raises(ValueError, match=r"must hold the best state as it was.*_4 is missing"):
            run(rounds=5, evaluate=show, **arguments, **given)


@pytest.mark.parametrize("found", [None, np.ones(2)], ids=["nothing", "an array"])
def test_a_stop_that_does_not_say_yes_or_no_is_told_after_the_first_round(found):
    with pytest.raises(TypeError, match="`stop` must return True or False; found"):
        run(stop=lambda rounds: found)


def test_a_metric_that_no_round_shows_is_told_after_the_first():
    for keep_best in ("evaluation/loss", "min client_work/train/los"):
        with pytest.raises(
            ValueError, match=r"`keep_best` must be a metric of the run; found '.*los"
        ):
            run(evaluate=show, keep_best=keep_best)


def test_a_run_ends_where_the_target_is_reached():
    history = run(evaluate=show, stop=simulation.reached("evaluation/accuracy", 0.7), rounds=5)
    assert history.ended == {("process", 0): "stopped"}
    assert history.rounds["round"].tolist() == [0, 1]
    with pytest.raises(
        ValueError, match="`metric` must be a metric of the run; found 'evaluation/a'"
    ):
        run(evaluate=show, stop=simulation.reached("max evaluation/a", 0.7))
    with pytest.raises(ValueError, match="`value` must be a finite number; found nan"):
        simulation.reached("loss", math.nan)


def test_a_stop_looks_at_each_record_once():
    looked = []

    class Looked(dict):
        def get(self, name, default=None):
            if name == "loss":
                looked.append(self["round"])
            return super().get(name, default)

    stops = [simulation.no_better("loss", rounds=3), simulation.no_better("loss", rounds=90)]
    table = simulation.Table()
    losses = [1 / (1 + i % 40) for i in range(60)]
    for number, loss in enumerate(losses):
        table.append({"round": number, "loss": loss})
        table._records[-1] = Looked(table._records[-1])
        best = int(np.argmin(losses[: number + 1]))
        assert [stop(table) for stop in stops] == [number - best >= 3, False]
    assert looked == [number for number in range(60) for _ in stops]


# ------------------------------------------------------------------------------- killed with all


def some_or_none(number, ids, rng):
    return simulation.poisson(0.5)(number, ids, rng) if number != 2 else []


def two_or_more(number):
    return 2 + number % 3


def size(weights, round):
    size = float(np.abs(weights.trainable[0]).sum())
    sets = {name: {"norm": size * factor} for name, factor in (("near", 0.5), ("far", 2.0))}
    return {"size": size + 10 * (round == 4), **sets}


def arrays():
    data = {name: next(iter(d.batch(2).as_numpy_iterator())) for name, d in make_clients().items()}
    flat = {n: {k: np.concatenate(v) for k, v in columns.items()} for n, columns in data.items()}
    return simulation.ClientArrays(flat, batch_size=3, epochs=2, shuffle=True, seed=5)


class Slow(tff.program.ReleaseManager):
    async def release(self, value, key):
        print("round", key, flush=True)
        time.sleep(0.3)


def run_with_all(directory, rounds, device, managers=()):
    """Clients that keep a state, in arrays, and everything that a caller may decide."""
    one = ResidentProcess(build_scaffold(), device=device) if device else build_scaffold()
    who = {"clients_per_round": two_or_more} if device else {"draw": some_or_none}
    return run(
        process=one,
        clients=arrays(),
        directory=directory,
        rounds=rounds,
        **who,
        hparams=rates,
        evaluate=size,
        per_client=simulation.PerClient(evaluate_loss, make_clients(3)),
        stop=simulation.no_better("max evaluation/size", 100),
        keep_best="max evaluation/size",
        managers=managers,
        rounds_per_checkpoint=2,
        client_states=aggregators.ClientStates,
    )


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import tensorflow_federated as tff
tff.backends.native.set_sync_local_cpp_execution_context()
from test_loop_doors import Slow, run_with_all
run_with_all(sys.argv[2], 1000, sys.argv[3], lambda process, seed: [Slow()])
"""


def workers_of(pid):
    """The workers among the children of a process, and when they were started."""
    found = set()
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{child}/exe").endswith("worker_binary"):
                    found.add((child, started(child)))
    return found


def started(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[21]
    except OSError:
        return None


@pytest.mark.slow  # `test_several_runs.py` kills a run that has less to go on with
@pytest.mark.parametrize("device", ["", "CPU:0"], ids=["plain TFF", "CPU:0"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, device):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(ROOT / "tests"), str(tmp_path / "killed"), device],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        wait_for(child, "round 5")  # shown, and not yet saved
        workers = workers_of(child.pid)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        deadline = time.monotonic() + 60
        while any(started(worker) == when for worker, when in workers):
            assert time.monotonic() < deadline, "a worker is left"
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.stdout.close()
    assert bool(workers) == (not device)
    killed, undisturbed = (run_with_all(tmp_path / n, 6, device) for n in ("killed", "undisturbed"))
    drawn = killed.rounds["drawn_clients"].tolist()[1:]
    assert drawn[1] == (two_or_more(2) if device else 0)
    assert drawn == [sum(c["drawn"] for c in killed.clients.where(round=n)) for n in range(1, 7)]
    assert {f"evaluation/{name}/norm" for name in ("near", "far")} < set(killed.rounds.columns)
    assert killed.kept["process", 0].round == undisturbed.kept["process", 0].round == 4
    files = [files_of(tmp_path / name) for name in ("killed", "undisturbed")]
    assert any(name.startswith("best/") for name in files[0])
    assert files[0] == files[1]


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hparams": 3}, TypeError, "`hparams` must be a function or None; found 3"),
        (
            {"hparams": lambda: {}},
            TypeError,
            "`hparams` must be a function of round, and of process",
        ),
        ({"hparams": lambda n: 3}, TypeError, "`hparams` must return a mapping"),
        (
            {"hparams": lambda n: {"rate": 1.0}},
            ValueError,
            r"found \['rate'\]. There are \['client_w",
        ),
        ({"hparams": lambda n: {RATE: "so"}}, ValueError, "must return numbers; found 'so' at"),
        ({"hparams": lambda n: {RATE: math.nan}}, ValueError, "must return numbers; found nan at"),
        ({"hparams": lambda n: {RATE: 1e300}}, ValueError, "must return a number of float32 at"),
        ({"draw": 3}, TypeError, "`draw` must be a function or None; found 3"),
        (
            {"draw": lambda n, ids: ids},
            TypeError,
            "`draw` must be a function of round, ids, rng; f",
        ),
        ({"draw": lambda n, ids, rng: "client 1"}, TypeError, "`draw` must return a list"),
        (
            {"draw": lambda n, ids, rng: ["bob"]},
            ValueError,
            r"ids of clients, each once; found \['b",
        ),
        ({"draw": lambda n, ids, rng: [ids[:1]]}, ValueError, r"each once; found \[\['client 0"),
        ({"draw": lambda n, ids, rng: ids[:1] * 2}, ValueError, "ids of clients, each once; found"),
        ({"draw": some, "clients_per_round": 2}, ValueError, "`clients_per_round` or `draw` must"),
        ({"clients_per_round": None}, ValueError, "`clients_per_round` or `draw` must be given"),
        (
            {"clients_per_round": lambda: 3},
            TypeError,
            "`clients_per_round` must be a function of r",
        ),
        (
            {"clients_per_round": lambda n: 7},
            ValueError,
            "at most the number of clients, 6; found 7",
        ),
        (
            {"evaluate": lambda w, x: {}},
            TypeError,
            "`evaluate` must be a function of weights, and of",
        ),
        (
            {"per_client": losses},
            TypeError,
            "`per_client` must be a `simulation.PerClient` or None",
        ),
        (
            {"per_client": simulation.PerClient(lambda w, d: 3, {"a": 1})},
            TypeError,
            "`per_client` must return a mapping .*; found 3 for client 'a'",
        ),
        (
            {"per_client": simulation.PerClient(lambda w, d: {}, {"a": 1})},
            ValueError,
            "`per_client` must return at least one number; found none for client 'a'",
        ),
        (
            {"stop": simulation.reached("evaluation/loss", 0.5)},
            ValueError,
            "`stop` must name a metric .* found 'evaluation/loss' and neither",
        ),
        (
            {"managers": lambda process, seed: 3},
            TypeError,
            "`managers` must be a list of .*found 3",
        ),
        ({"keep_best": "seconds"}, ValueError, "`keep_best` must be a metric of which it is known"),
        ({"keep_best": "evaluation/loss"}, ValueError, "found 'evaluation/loss' and neither"),
    ],
)
def test_a_bad_door_is_an_error_before_a_round_is_trained(change, error, message):
    trained = []

    class Counting:
        def __init__(self):
            self.process = process()
            for name in ("initialize", "get_model_weights", "get_hparams", "set_hparams"):
                setattr(self, name, getattr(self.process, name))

        def next(self, state, data):
            trained.append(data)
            return self.process.next(state, data)

    with pytest.raises(error, match=message):
        run(process=Counting(), **change)
    assert not trained


def test_what_evaluates_single_clients_is_checked_at_once():
    for evaluate, message in (
        (3, "found 3"),
        (lambda w: {}, "of weights, data, and of"),
    ):
        with pytest.raises(TypeError, match=f"`evaluate` must be a function.*{message}"):
            simulation.PerClient(evaluate)
    with pytest.raises(TypeError, match="`clients` must be a mapping"):
        simulation.PerClient(evaluate_loss, 3)
    with pytest.raises(ValueError, match="must be a function, or a process of"):
        run(per_client=simulation.PerClient(process()))


def test_rate_of_poisson_is_a_probability():
    for rate in (0, 1.1, math.nan, True, "0.1"):
        with pytest.raises(ValueError, match=r"`rate` must be a number in \(0, 1\]"):
            simulation.poisson(rate)
