"""The store of clients' states: all or nothing, across restarts, never mixed up."""

import multiprocessing
import os
import sqlite3
from collections import OrderedDict

import federated_twin as twin
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from aggregators import ClientMemory, ClientStates, Needs, rules

SGD = tff.learning.optimizers.build_sgdm(0.1)
SIZES = {"a": 12, "b": 7, "c": 5}
DATA = dict(zip(SIZES, twin.datasets(twin.make_data(tuple(SIZES.values()))), strict=True))


def process_of(shape):
    """Clients that count their rounds and remember their steps: what each keeps is known."""
    base = rules.plain_mean()

    def finish(context, done):
        kept = context.state["rounds"] + 1
        return OrderedDict(rounds=kept, steps=context.state["steps"] + done.steps), ()

    memory = ClientMemory(
        lambda weights, optimizer: OrderedDict(
            rounds=tf.zeros(shape, tf.int32), steps=tf.constant(0)
        ),
        finish,
    )
    rule = aggregators.Rule(
        base.client, base.reduction, base.server, needs=Needs(layers="model", memory=memory)
    )
    return aggregators.build_fed_avg(twin.functional_model(), SGD, rule=rule)


PROCESS = process_of(())


def play(states, state, ids, process=PROCESS):
    with states.cohort(ids, [DATA[one] for one in ids]) as cohort:
        return process.next(state, cohort).state


def play_and_fail(states, state, ids):
    with states.cohort(ids, [DATA[one] for one in ids]) as cohort:
        PROCESS.next(state, cohort)
        raise KeyboardInterrupt


def open_only(states, ids, data):
    with states.cohort(ids, data):
        pass


def kept(states, one):
    found = states.get(one)
    return found and (int(found["rounds/0"]), int(found["steps/0"]))


def test_each_client_gets_its_own_back_also_after_a_restart(tmp_path):
    state = PROCESS.initialize()
    with ClientStates(SIZES, str(tmp_path)) as states:
        state = play(states, state, ["b", "a"])
        state = play(states, state, ["c", "b"])
    with ClientStates(reversed(list(SIZES)), str(tmp_path)) as states:
        assert states.round == 2
        state = play(states, state, ["b"])
        assert {one: kept(states, one) for one in SIZES} == {"a": (1, 3), "b": (3, 6), "c": (1, 2)}
        assert states.seen() == ("a", "b", "c")
        assert state.aggregator["round"] == states.round == 3


def test_a_round_that_fails_leaves_every_state_as_it_was(tmp_path):
    state = PROCESS.initialize()
    with ClientStates(SIZES, str(tmp_path)) as states:
        state = play(states, state, ["a", "b"])
        files = sorted(os.listdir(tmp_path))
        with pytest.raises(KeyboardInterrupt):
            play_and_fail(states, state, ["a", "c"])
        with pytest.raises(RuntimeError, match=r"`process.next` once inside"):
            open_only(states, ["a"], [DATA["a"]])
        assert (kept(states, "a"), kept(states, "c"), states.round) == ((1, 3), None, 1)
        assert sorted(os.listdir(tmp_path)) == files
        state = play(states, state, ["a", "c"])
        assert (kept(states, "a"), kept(states, "c")) == ((2, 6), (1, 2))


def test_files_of_a_crash_are_cleared(tmp_path):
    with ClientStates(SIZES, str(tmp_path)) as states:
        play(states, PROCESS.initialize(), ["a"])
    (tmp_path / "0-2-0123456789ab.index").write_text("half a round")
    with ClientStates(SIZES, str(tmp_path)) as states:
        assert not (tmp_path / "0-2-0123456789ab.index").exists()
        assert kept(states, "a") == (1, 3)


def test_going_back_with_the_server(tmp_path):
    history = [PROCESS.initialize()]
    with ClientStates(SIZES, str(tmp_path), keep=2) as states:
        for ids in (["a"], ["a", "b"], ["a"], ["b"]):
            history.append(play(states, history[-1], ids))
        assert (states.client_ids, states.keep, states.round) == (("a", "b", "c"), 2, 4)
        with pytest.raises(ValueError, match="`round_number` must be from 2 to 4; found 1"):
            states.restore(1)
        # A server's state of another round is refused, and nothing is lost by it.
        with pytest.raises(Exception, match=r"restore\(round\)"):
            play(states, history[2], ["a"])
        states.restore(2)
        assert (kept(states, "a"), kept(states, "b"), states.round) == ((2, 6), (1, 2), 2)
        again = play(states, history[2], ["a"])
        assert kept(states, "a") == (3, 9)
        for x, y in zip(tf.nest.flatten(again), tf.nest.flatten(history[3]), strict=True):
            np.testing.assert_array_equal(x, y)


def test_replaced_states_do_not_pile_up(tmp_path):
    state = PROCESS.initialize()
    with ClientStates(SIZES, str(tmp_path)) as states:
        for _ in range(4):
            state = play(states, state, ["a"])
        # The present state and the one before, of one client, two files each; lock and table.
        assert len(os.listdir(tmp_path)) == 6


def test_a_state_of_another_kind_is_refused(tmp_path):
    with ClientStates(SIZES, str(tmp_path)) as states:
        state = play(states, PROCESS.initialize(), ["a"])
        with pytest.raises(Exception, match="The state of a client must be of this model and rule"):
            play(states, state, ["a"], process_of((2,)))
        assert kept(states, "a") == (1, 3)


def _open_elsewhere(path, queue):
    try:
        ClientStates(SIZES, path)
    except RuntimeError as error:
        queue.put(str(error))


def test_one_process_at_a_time(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with ClientStates(SIZES, str(tmp_path)):
        with pytest.raises(RuntimeError, match="`path` must be open in one place at a time"):
            ClientStates(SIZES, str(tmp_path))
        other = context.Process(target=_open_elsewhere, args=(str(tmp_path), queue))
        other.start()
        assert "in use" in queue.get(timeout=60)
        other.join()
    ClientStates(SIZES, str(tmp_path)).close()


def test_stores_of_others(tmp_path):
    ClientStates(SIZES, str(tmp_path)).close()
    with pytest.raises(ValueError, match=r"`client_ids` must be those of the store .* 'x'"):
        ClientStates([*SIZES, "x"], str(tmp_path))
    with pytest.raises(ValueError, match=r"found none that it does not have, and without 'a'"):
        ClientStates([one for one in SIZES if one != "a"], str(tmp_path))
    with sqlite3.connect(tmp_path / "states.sqlite") as table:
        table.execute("UPDATE store SET format = 7")
    with pytest.raises(ValueError, match=r"format 1; found format 7 .* another version"):
        ClientStates(SIZES, str(tmp_path))


def test_files_of_yours_stay(tmp_path):
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"`path` must be a directory of its own; found 'results"):
        ClientStates(SIZES, str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]
    store = tmp_path / "store"
    with ClientStates(SIZES, str(store)) as states:
        (store / "notes.txt").write_text("mine")
        play(states, PROCESS.initialize(), ["a"])
    ClientStates(SIZES, str(store)).close()
    assert (store / "notes.txt").read_text() == "mine"


def test_damage_is_told(tmp_path):
    with ClientStates(SIZES, str(tmp_path)) as states:
        play(states, PROCESS.initialize(), ["a"])
        (data,) = tmp_path.glob("*.data-00000-of-00001")
        data.write_bytes(data.read_bytes()[:3])
        with pytest.raises(
            RuntimeError, match=r"The state of client 'a' must be readable; found /"
        ):
            states.get("a")
    (tmp_path / "states.sqlite").write_bytes(b"no table" * 1000)
    with pytest.raises(
        ValueError, match=r"`path` must hold a store of client states; found a states"
    ):
        ClientStates(SIZES, str(tmp_path))
    with pytest.raises(ValueError, match=r"`path` must hold a store"):  # and it is not left locked
        ClientStates(SIZES, str(tmp_path))


def test_bad_arguments():
    for ids, message in (
        ("abc", "`client_ids` must be a list of strings"),
        ([1, 2], "`client_ids` must be a list of strings"),
    ):
        with pytest.raises(TypeError, match=message):
            ClientStates(ids)
    with pytest.raises(ValueError, match="none repeated; found 'a'"):
        ClientStates(["a", "b", "a"])
    with pytest.raises(ValueError, match="`keep` must be a whole number of at least 1; found 0"):
        ClientStates(["a"], keep=0)
    with ClientStates(SIZES) as states:
        for ids, data, message in (
            (["a", "z"], [1, 2], "`client_ids` must be among .* found 'z'"),
            (["a", "a"], [1, 2], "`client_ids` must not repeat a client; found 'a'"),
            (["a"], [], "`client_data` must have one entry for each id; found 0 for 1"),
        ):
            with pytest.raises(ValueError, match=message):
                open_only(states, ids, data)
        with (
            pytest.raises(RuntimeError, match="`cohort` must be the only one open"),
            states.cohort(["a"], [1]),
        ):
            open_only(states, ["b"], [1])
