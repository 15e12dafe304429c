"""States of clients in every place of a process, moved from one to another, and in faults."""

import asyncio
import os
import subprocess
import sys
import textwrap

import federated_twin as twin
import numpy as np
import pytest
import selection
import tensorflow as tf
import test_stateful_clients as cases
from resident_cases import children_of
from test_stateful_clients import COHORTS, DATA, IDS

import tff_optim
from aggregators import ClientStates

PLACES = {
    "here": {},
    "by two": {"clients_at_once": 2},
    "a worker": {"workers": 1},
    "a worker, by two": {"workers": 1, "clients_at_once": 2, "device": "CPU:1"},
    "two workers": {"workers": 2},
}


def scaffold():
    return cases.built("scaffold-II")


def contents(path):
    """All that a store holds, by name; the table as its rows."""
    return {name: (path / name).read_bytes() for name in os.listdir(path) if name != "lock"}


def broken(dataset):
    """Data that a client can read but for its last batch."""

    def check(number, batch):
        poison = tf.cast(number > 0, tf.float32) * tf.constant(np.nan)
        return {**batch, "x": tf.debugging.check_numerics(batch["x"] + poison, "broken disk")}

    return dataset.repeat(2).enumerate().map(check)


@pytest.mark.parametrize(
    "place", selection.params([*PLACES], ["here", "a worker, by two", "two workers"])
)
def test_rounds_equal_the_twin_and_one_that_fails_changes_nothing(place, tmp_path):
    weights, shared, own = cases.scaffold_twin(COHORTS[:5], "II")
    with (
        tff_optim.ResidentProcess(scaffold(), **PLACES[place]) as resident,
        ClientStates(IDS, str(tmp_path)) as states,
    ):
        state = cases.run(resident, states, COHORTS[:3])
        before, plain = contents(tmp_path), resident.materialize(state)
        data = twin.datasets([DATA[one] for one in "abc"])
        data[1] = broken(data[1])
        with (
            pytest.raises(Exception, match="broken disk"),
            states.cohort(list("abc"), data) as cohort,
        ):
            resident.next(state, cohort)
        # A client of the round that failed may still write: to a file that is no state's.
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
        after = resident.materialize(state)
        for a, b in zip(tf.nest.flatten(after), tf.nest.flatten(plain), strict=True):
            np.testing.assert_array_equal(a, b)
        state = cases.run(resident, states, COHORTS[3:5], state)
        token = cohort[0]["client"]["save"].rpartition("-")[2]
        assert not [name for name in os.listdir(tmp_path) if token in name]  # cleared away
        cases.close(resident.get_model_weights(state).trainable, weights)
        cases.close(resident.materialize(state).aggregator["control"], shared)
        for one in "abcd":
            cases.close(states.get(one).values(), own[one])


def test_a_run_goes_on_in_another_place_from_files_alone(tmp_path):
    """Ten rounds, two in each place, which has nothing but the checkpoint and the store."""
    folder, store = str(tmp_path / "server"), str(tmp_path / "clients")
    for number, place in enumerate(PLACES.values()):
        with (
            tff_optim.ResidentProcess(scaffold(), **place) as resident,
            ClientStates(IDS, store, keep=3) as states,
        ):
            checkpoints = tff_optim.resident.ResidentCheckpoints(resident, folder)
            state, done = checkpoints.resume()
            assert done == 2 * number
            states.restore(done)
            state = cases.run(resident, states, COHORTS[done : done + 2], state)
            asyncio.run(checkpoints.save(state, done + 2))
            # A round more, of which no checkpoint was written: as if it were killed here.
            cases.run(resident, states, [["a", "b"]], state)
            if done + 2 == len(COHORTS):
                states.restore(len(COHORTS))
                weights, shared, own = cases.scaffold_twin(COHORTS, "II")
                cases.close(resident.get_model_weights(state).trainable, weights)
                cases.close(resident.materialize(state).aggregator["control"], shared)
                for one in "abcd":
                    cases.close(states.get(one).values(), own[one])


_TWO_ROUNDS = """
    import sys
    import test_stateful_clients as cases
    from aggregators import ClientStates
    with ClientStates(cases.IDS, sys.argv[1]) as states:
        state = cases.run(cases.built("scaffold-II"), states, cases.COHORTS[:1])
        print("first round", states.round, flush=True)
        data = cases.twin.datasets([cases.DATA[one] for one in "ab"])
        with states.cohort(["a", "b"], data) as cohort:
            cases.built("scaffold-II").next(state, cohort)
            print("second round trained", flush=True)
            sys.stdin.read()  # until killed, the states written and not yet counted
"""


@pytest.mark.slow
def test_a_process_that_is_killed_within_a_round_leaves_the_states_before_it(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(_TWO_ROUNDS))
    store = tmp_path / "store"
    paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    child = subprocess.Popen(
        [sys.executable, str(program), str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *sys.path])},
    )
    try:
        lines = [child.stdout.readline().strip() for _ in range(2)]
        assert lines == ["first round 1", "second round trained"]
        with pytest.raises(RuntimeError, match="`path` must be open in one place at a time"):
            ClientStates(IDS, str(store))  # another operating-system process has it
        assert len([name for name in os.listdir(store) if name.endswith(".index")]) == 4
    finally:
        workers = children_of(child.pid)
        child.kill()
        child.wait()
        for pid in workers:
            os.kill(pid, 9)
        child.stdin.close()
        child.stdout.close()
    _, _, own = cases.scaffold_twin(COHORTS[:1], "II")
    with ClientStates(IDS, str(store)) as states:
        assert (states.round, states.seen()) == (1, ("a", "b"))
        for one in "ab":
            cases.close(states.get(one).values(), own[one])
        assert len([name for name in os.listdir(store) if name.endswith(".index")]) == 2
