"""Runs side by side, and runs whose clients keep a state: the numbers of one after the other."""

import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow_federated as tff
from test_simulation import build_model, build_process, evaluate, make_clients, numbers

import aggregators
from tff_optim import ResidentProcess, simulation

ROOT = pathlib.Path(__file__).parent.parent


class Wrapped:
    """A process that calls a function before each round."""

    def __init__(self, process, before):
        self.process, self._before = process, before
        self.initialize, self.get_model_weights = process.initialize, process.get_model_weights

    def next(self, state, data):
        self._before()
        return self.process.next(state, data)


@pytest.fixture(scope="module")
def process():
    return build_process()


@pytest.mark.slow
def test_runs_side_by_side_give_the_numbers_of_one_after_the_other(process, tmp_path):
    busy = threading.Lock()

    def alone(weights):
        assert busy.acquire(blocking=False)
        try:
            return evaluate(weights)
        finally:
            busy.release()

    def run(at_once, folder):
        with ResidentProcess(process, workers=1) as shared:
            processes = {
                "plain": process,
                "made": lambda seed: ResidentProcess(process, device="CPU:0"),
                "shared": shared,
            }
            return simulation.run(
                processes,
                make_clients(),
                rounds=3,
                clients_per_round=3,
                seed=[3, 4],
                evaluate=alone,
                directory=folder,
                runs_at_once=at_once,
            )

    one, other = run(1, tmp_path / "one"), run(4, tmp_path / "other")
    assert list(one.ended) == list(other.ended)
    for name, seed in one.ended:
        mine, theirs = other.only(name, seed), one.only(name, seed)
        assert str(numbers(mine)) == str(numbers(theirs))
        assert str(list(mine.clients)) == str(list(theirs.clients))
    assert (tmp_path / "other" / "made" / "seed_4" / "rounds.csv").exists()


def test_clients_made_by_a_function_are_those_of_the_seed(process, tmp_path):
    made = {3: make_clients(), 4: dict(list(make_clients().items())[:4])}
    asked = []

    def make(seed):
        asked.append(seed)
        return made[seed]

    arguments = {"rounds": 2, "clients_per_round": 3, "evaluate": evaluate}
    both = simulation.run(
        {"one": process, "two": process}, make, seed=[3, 4], directory=tmp_path, **arguments
    )
    assert asked == [3, 4]  # once each, whatever the number of processes
    for seed, clients in made.items():
        alone = simulation.run({"two": process}, clients, seed=seed, **arguments)
        assert str(numbers(both.only("two", seed))) == str(numbers(alone))
    with pytest.raises(ValueError, match="at most the number of clients, 4; found 5"):
        simulation.run(process, make, seed=[3, 4], rounds=1, clients_per_round=5)
    with pytest.raises(ValueError, match=r"'ids': .6 from.* none; found one with .*'ids': .4 from"):
        simulation.run(
            {"two": process}, made[3], seed=[4], rounds=3, clients_per_round=3, directory=tmp_path
        )


def test_rounds_of_two_runs_are_under_way_at_once(process):
    meeting = threading.Barrier(2, timeout=60)  # breaks if one comes alone
    wrapped = Wrapped(process, meeting.wait)
    history = simulation.run(
        {"a": wrapped, "b": wrapped}, make_clients(), rounds=2, clients_per_round=2, runs_at_once=2
    )
    assert list(history.ended.values()) == ["finished"] * 2


def test_where_one_run_fails_the_others_are_saved(process, tmp_path):
    started = threading.Event()

    def fail():
        assert started.wait(60)
        raise RuntimeError("so it goes")

    def run(processes):
        return simulation.run(
            processes,
            make_clients(),
            rounds=3 if "bad" not in processes else 10**6,
            clients_per_round=2,
            directory=tmp_path,
            runs_at_once=2,
        )

    with pytest.raises(RuntimeError, match="so it goes"):
        run({"good": Wrapped(process, started.set), "bad": Wrapped(process, fail)})
    saved = list((tmp_path / "good" / "seed_0" / "checkpoints").iterdir())
    assert max(int(path.name.rpartition("_")[2]) for path in saved) >= 1


def test_ctrl_c_ends_all_runs_after_their_rounds(process):
    pressed = threading.Barrier(2, timeout=60, action=lambda: os.kill(os.getpid(), signal.SIGINT))
    rounds = {"a": 0, "b": 0}

    def before(name):
        def count():
            rounds[name] += 1
            if rounds[name] == 2:
                pressed.wait()

        return count

    history = simulation.run(
        {name: Wrapped(process, before(name)) for name in rounds},
        make_clients(),
        rounds=10**6,
        clients_per_round=2,
        runs_at_once=2,
    )
    assert list(history.ended.values()) == ["interrupted"] * 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@functools.cache
def build_scaffold():
    sgd = tff.learning.optimizers.build_sgdm(0.05)
    return aggregators.build_scaffold(build_model(), sgd, num_clients=len(make_clients()))


@pytest.fixture(scope="module")
def scaffold():
    return build_scaffold()


def run_scaffold(scaffold, rounds, directory=None, **options):
    return simulation.run(
        scaffold,
        make_clients(),
        rounds=rounds,
        clients_per_round=3,
        evaluate=evaluate,
        directory=directory,
        rounds_per_checkpoint=2,
        client_states=aggregators.ClientStates,
        **options,
    )


@pytest.fixture(scope="module")
def undisturbed(scaffold):
    return run_scaffold(scaffold, 5)


def test_states_are_taken_by_client_id(scaffold, undisturbed):
    clients, state = make_clients(), scaffold.initialize()
    with aggregators.ClientStates(list(clients)) as states:
        for number in range(1, 6):
            cohort = undisturbed.clients.where(round=number)["client"].tolist()
            with states.cohort(cohort, [clients[one] for one in cohort]) as data:
                state = scaffold.next(state, data).state
    for mine, theirs in zip(
        undisturbed.state.global_model_weights.trainable, state.global_model_weights.trainable
    ):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("resident", [False, True])
def test_a_run_in_pieces_finds_the_states_of_its_round(scaffold, undisturbed, tmp_path, resident):
    for rounds in (3, 5):
        one = ResidentProcess(scaffold) if resident else scaffold
        history = run_scaffold(one, rounds, tmp_path)
        if resident:
            one.close()
    assert str(numbers(history)) == str(numbers(undisturbed))


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import tensorflow_federated as tff
from test_several_runs import build_scaffold, run_scaffold
tff.backends.native.set_sync_local_cpp_execution_context()
class Slow(tff.program.ReleaseManager):
    async def release(self, value, key):
        print("round", key, flush=True)
        import time; time.sleep(0.3)
run_scaffold(build_scaffold(), 1000, sys.argv[2], managers=[Slow()])
"""


def test_after_a_kill_the_states_go_back_to_the_last_checkpoint(scaffold, undisturbed, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(ROOT / "tests"), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        assert "round 3\n" in iter(child.stdout.readline, "")  # its states are there; 2 is saved
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    with aggregators.ClientStates(list(make_clients()), str(tmp_path / "client_states")) as states:
        assert states.round == 3
    assert str(numbers(run_scaffold(scaffold, 5, tmp_path))) == str(numbers(undisturbed))


def test_several_runs_have_a_store_each(scaffold, undisturbed, tmp_path):
    history = run_scaffold(
        {"SCAFFOLD": scaffold, "plain": build_process()},
        5,
        tmp_path,
        seed=[0, 1],
        runs_at_once=2,
    )
    mine = [[pair for pair in row if pair[0] != "process"] for row in numbers(undisturbed)]
    theirs = [
        [pair for pair in row if pair[0] != "process"]
        for row in numbers(history.only("SCAFFOLD", 0))
    ]
    assert str(mine) == str(theirs)
    assert (tmp_path / "SCAFFOLD" / "seed_1" / "client_states").is_dir()
    assert not (tmp_path / "plain" / "seed_1" / "client_states").exists()


def test_states_that_are_missing_are_named(scaffold, tmp_path):
    with pytest.raises(ValueError, match=r"`client_states` must be given .*aggregators.ClientSt"):
        simulation.run(scaffold, make_clients(), rounds=1, clients_per_round=2)
    run_scaffold(scaffold, 2, tmp_path)
    shutil.rmtree(tmp_path / "client_states")
    with pytest.raises(ValueError, match=r"states of round 2, .*; found those of round 0 in"):
        run_scaffold(scaffold, 3, tmp_path)
    with pytest.raises(TypeError, match="`client_states` must be a function or None; found 3"):
        simulation.run(scaffold, [3], rounds=1, clients_per_round=1, client_states=3)
    with pytest.raises(ValueError, match=r"`client_states` must be None unless .*\['process'\]"):
        simulation.run(
            build_process(), make_clients(), rounds=1, clients_per_round=1, client_states=dict
        )
    with pytest.raises(ValueError, match="`runs_at_once` must be a whole number of at least 1"):
        simulation.run(scaffold, [3], rounds=1, clients_per_round=1, runs_at_once=0)
