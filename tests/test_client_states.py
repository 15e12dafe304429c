"""The store of clients' states: all or nothing, across restarts, never mixed up."""

import contextlib
import errno
import functools
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import OrderedDict

import federated_twin as twin
import numpy as np
import pytest
import selection
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from aggregators import ClientStates, Needs, StatefulClient, rules
from aggregators.client import state_io

SGD = tff.learning.optimizers.build_sgdm(0.1)
SIZES = {"a": 12, "b": 7, "c": 5}
DATA = dict(zip(SIZES, twin.datasets(twin.make_data(tuple(SIZES.values()))), strict=True))


def process_of(shape):
    """Clients that count their rounds and remember their steps: what each keeps is known."""
    base = rules.plain_mean()

    def finish(context, done):
        kept = context.state["rounds"] + 1
        return OrderedDict(rounds=kept, steps=context.state["steps"] + done.steps), ()

    client = StatefulClient(
        lambda weights, optimizer: OrderedDict(
            rounds=tf.zeros(shape, tf.int32), steps=tf.constant(0)
        ),
        finish,
    )
    rule = aggregators.Rule(
        base.client,
        base.reduction,
        base.server,
        needs=Needs(layers="model", stateful_client=client),
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


def test_only_files_that_the_store_has_made_are_cleared(tmp_path):
    with ClientStates(SIZES, str(tmp_path)) as states:
        state = play(states, PROCESS.initialize(), ["a"])
        with states.cohort(["b"], [DATA["b"]]) as cohort:
            PROCESS.next(state, cohort)
            shutil.copytree(tmp_path, tmp_path / "killed within the round")
    copy, left = tmp_path / "killed within the round", tmp_path / "left"
    copy.rename(left)
    a, b = [sorted(left.glob(pattern)) for pattern in ("0-1-*", "1-2-*")]
    half = left / f"{b[0].name}.tempstate17"
    half.write_text("half")
    mine = ["0-2-0123456789ab.index", "0-1-0123456789ab-01234567.index", f"{b[0].name}.bak", "x"]
    for name in mine:
        (left / name).write_text("mine")
    with ClientStates(SIZES, str(left)) as states:
        assert (kept(states, "a"), kept(states, "b"), states.round) == ((1, 3), None, 1)
    assert len(a) == len(b) == 2
    assert not any(path.exists() for path in [*b, half])
    rest = {path.name for path in left.iterdir()}
    assert rest == {*mine, "lock", "states.sqlite", *(path.name for path in a)}


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
        # The present state and the one before, two files each, of one client; lock and table.
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
    with pytest.raises(ValueError, match=r"format 2; found format 7 .* another version"):
        ClientStates(SIZES, str(tmp_path))


def test_a_directory_of_other_files_is_refused(tmp_path):
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"`path` must be a directory of its own; found 'results"):
        ClientStates(SIZES, str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_a_store_says_how_far_back_it_can_go(tmp_path):
    """Also where it is opened with a larger `keep` than the rounds were written with."""
    history = [PROCESS.initialize()]
    with ClientStates(SIZES, tmp_path) as states:
        for _ in range(3):
            history.append(play(states, history[-1], ["a"]))
    with ClientStates(SIZES, tmp_path, keep=5) as states:
        assert (states.oldest_round, states.round) == (2, 3)
        for wrong in (1, 4, -1, 2.0, "2", None, True, np.nan):
            with pytest.raises(ValueError, match=r"must be from 2 to 3; found .* round 2 is gone"):
                states.restore(wrong)
        assert (states.round, kept(states, "a")) == (3, (3, 9))
        states.restore(np.int64(2))
        assert (states.round, kept(states, "a")) == (2, (2, 6))
        state = history[2]
        for _ in range(4):
            state = play(states, state, ["b"])
        assert (states.oldest_round, states.round) == (2, 6)
        states.restore(2)
        assert (kept(states, "a"), kept(states, "b")) == ((2, 6), None)


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    """A closed store after the rounds "ab" and "a", and the server's states."""
    path, history = tmp_path_factory.mktemp("two rounds"), [PROCESS.initialize()]
    with ClientStates(SIZES, path, keep=2) as states:
        for ids in ("ab", "a"):
            history.append(play(states, history[-1], list(ids)))
    return path, history


@pytest.fixture
def store(two_rounds, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(two_rounds[0], path)
    return path


def parts_of(store, number, round_number):
    data, index = sorted(store.glob(f"{number}-{round_number}-*"))
    return data, index


def files(store):
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != "lock"}


def exchange(store):
    for a, b in zip(parts_of(store, 0, 2), parts_of(store, 1, 1), strict=True):
        a.rename(store / "between")
        b.rename(a)
        (store / "between").rename(b)


def put_the_older_one(store):
    for old, new in zip(parts_of(store, 0, 1), parts_of(store, 0, 2), strict=True):
        shutil.copy(old, new)


def put_that_of_another_store(store):
    path = store.parent / "other"
    with ClientStates(SIZES, path) as states:
        state = play(states, PROCESS.initialize(), ["a"])
        play(states, state, ["a"])
    for theirs, mine in zip(parts_of(path, 0, 2), parts_of(store, 0, 2), strict=True):
        shutil.copy(theirs, mine)


def put_for(part, content):
    def put(store):
        path = parts_of(store, 0, 2)[part]
        path.write_bytes(content(path.read_bytes()))

    return put


def flipped(content, position):
    changed = bytearray(content)
    changed[position] ^= 4
    return bytes(changed)


DAMAGES = {
    "exchanged": exchange,
    "copied": put_the_older_one,
    "of another store": put_that_of_another_store,
    "a pipe": lambda store: [(path.unlink(), os.mkfifo(path)) for path in parts_of(store, 0, 2)],
    "gone": lambda store: [path.unlink() for path in parts_of(store, 0, 2)],
    **{
        f"{kind}, {part}": put_for(number, change)
        for number, part in enumerate(("data", "index"))
        for kind, change in {
            "empty": lambda content: b"",
            "foreign": lambda content: b"mine" * 100,
            "cut": lambda content: content[:-1],
            "flipped": lambda content: flipped(content, 10),
        }.items()
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_is_not_the_one_written_is_refused(store, two_rounds, damage):
    DAMAGES[damage](store)
    with ClientStates(SIZES, store, keep=2) as states:
        before = sorted(os.listdir(store))
        with pytest.raises(RuntimeError, match="The state of client 'a' must be readable; found /"):
            states.get("a")
        with pytest.raises(RuntimeError, match="The state of client 'a' must be readable; found /"):
            play(states, two_rounds[1][2], ["a", "c"])
        assert (states.round, kept(states, "c")) == (2, None)
        assert sorted(os.listdir(store)) == before
        if damage != "exchanged":  # which is to be told of b as well
            states.restore(1)
            assert (kept(states, "a"), kept(states, "b")) == ((1, 3), (1, 2))


def test_a_byte_that_is_flipped_is_found_or_is_none_of_the_state(store):
    found = 0
    with ClientStates(SIZES, store, keep=2) as states:
        for part in parts_of(store, 0, 2):
            whole = part.read_bytes()
            for position in range(len(whole)):
                part.write_bytes(flipped(whole, position))
                try:
                    assert kept(states, "a") == (2, 6)
                except RuntimeError:
                    found += 1
            part.write_bytes(whole)
    assert found > 200


def test_a_restore_that_fails_changes_nothing(store):
    path = parts_of(store, 0, 1)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with ClientStates(SIZES, store, keep=2) as states:
        before = files(store)
        with pytest.raises(RuntimeError, match=r"client 'a' must be readable; .* as before"):
            states.restore(1)
        with pytest.raises(RuntimeError, match="found another cohort open"):
            play_before(states, 3, lambda: states.restore(2))
        with no_room(), pytest.raises(RuntimeError, match=r"could not be written: .*make room"):
            states.restore(0)
        assert files(store) == before
        assert (states.round, kept(states, "a")) == (2, (2, 6))
        path.write_bytes(whole)
        states.restore(1)
        assert (states.round, kept(states, "a")) == (1, (1, 3))


@contextlib.contextmanager
def no_room():
    """No file of this process can grow, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_states(cohort, number):
    """Writes what the clients of a cohort would write, without a process."""
    for one in cohort:
        state = OrderedDict(rounds=tf.constant(number), steps=tf.constant(3 * number))
        state_io.save(tf.constant(one["client"]["save"]), state)


def play_before(states, number, event):
    """A round of "a" and "c", and what happens before its end."""
    with states.cohort(["a", "c"], [None, None]) as cohort:
        write_states(cohort, number)
        event()


def test_a_round_that_cannot_be_kept_changes_nothing(store, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read_only(states):
        states._table._connection.execute("PRAGMA query_only = 1")

    def in_use(states):
        states._table._connection.execute("PRAGMA busy_timeout = 0")
        stack.enter_context(contextlib.closing(sqlite3.connect(store / "states.sqlite"))).execute(
            "BEGIN EXCLUSIVE"
        )

    for obstacle, message in (
        (lambda states: stack.enter_context(no_room()), "could not be written: .*make room"),
        (lambda states: patch.setattr(os, "fsync", refuse), "could not be kept .*No space left"),
        (read_only, "could not be written: attempt to write a readonly"),
        (in_use, "could not be written: database is locked.*let no other program use the file"),
    ):
        with ClientStates(SIZES, store, keep=2) as states:
            before = files(store)
            with (
                contextlib.ExitStack() as stack,
                monkeypatch.context() as patch,
                pytest.raises(RuntimeError, match=message),
            ):
                play_before(states, 3, functools.partial(obstacle, states))
            assert (states.round, kept(states, "a"), kept(states, "c")) == (2, (2, 6), None)
        with ClientStates(SIZES, store, keep=2) as states:
            assert files(store) == before
    with ClientStates(SIZES, store, keep=2) as states:
        with no_room(), pytest.raises(tf.errors.OpError, match="File too large"):
            play_before(states, 3, lambda: None)
        assert files(store) == before
        play_before(states, 3, lambda: None)
        assert (states.round, kept(states, "a"), kept(states, "c")) == (3, (3, 9), (3, 9))


def test_no_room_for_a_store(tmp_path):
    with no_room(), pytest.raises(RuntimeError, match=r"could not be opened: .*make room"):
        ClientStates(SIZES, tmp_path)
    with ClientStates(SIZES, tmp_path) as states:
        assert states.round == 0


def test_a_kill_leaves_the_old_round_or_the_new_one(tmp_path):
    """Of every step in which a round or a restore is written, a copy is what a kill leaves."""
    copies = []

    def copy(*why):
        copies.append(tmp_path / f"copy {len(copies)}")
        shutil.copytree(tmp_path / "store", copies[-1])

    with ClientStates(SIZES, tmp_path / "store", keep=5) as states:
        sync = states._files._sync
        states._files._sync = lambda path: (copy(), sync(path))
        remove = states._files.keep_only
        states._files.keep_only = lambda *given: (copy(), remove(*given), copy())
        states._table._connection.set_trace_callback(copy)
        for number in (1, 2, 3):
            with states.cohort(list("abc"), [None] * 3) as cohort:
                write_states(cohort, number)
        states.restore(1)
    found = []
    for path in copies:
        with ClientStates(SIZES, path, keep=5) as states:
            found.append(states.round)
            for one in SIZES:
                assert kept(states, one) == ((found[-1], 3 * found[-1]) if found[-1] else None)
            assert len(list(path.glob("[0-9]*"))) == 6 * found[-1]  # no file is left over
    changes = [a for a, b in zip(found, [*found[1:], None], strict=True) if a != b]
    assert changes == [0, 1, 2, 3, 1]
    assert len(found) > 40


def test_an_emptied_or_damaged_table_is_refused_and_deletes_nothing(store, tmp_path):
    table = store / "states.sqlite"
    whole = table.read_bytes()

    def change(statement):
        with contextlib.closing(sqlite3.connect(table)) as connection:
            connection.executescript(statement)

    def replace(content):
        table.write_bytes(content)

    with ClientStates(SIZES, tmp_path / "other"):
        pass
    for damage, *given in (
        (change, "DELETE FROM states"),
        (change, "DELETE FROM states WHERE round = 2"),
        (change, "DELETE FROM store"),
        (change, "DROP TABLE states"),
        (change, "UPDATE store SET round = 1"),
        (change, "UPDATE store SET oldest = 1"),
        (change, "UPDATE states SET cohort = 'x'"),
        (change, "UPDATE states SET number = 2 WHERE number = 1"),
        (change, "UPDATE clients SET id = '\"z\"' WHERE number = 0"),
        (replace, b""),
        (replace, b"no table" * 1000),
        (replace, whole[:5000]),
        (replace, whole.replace(b"-", b"+")),
    ):
        damage(*given)
        before = files(store)
        for _ in range(2):  # and it is not left locked
            with pytest.raises(ValueError, match=r"`path` must hold a whole store .* damaged: "):
                ClientStates(SIZES, store)
        assert files(store) == before
        table.write_bytes(whole)
    with ClientStates(SIZES, store) as states:
        assert (kept(states, "a"), kept(states, "b")) == ((2, 6), (1, 2))


def _use_in_a_fork(states, queue):
    for use in (
        lambda: states.round,
        lambda: states.get("a"),
        lambda: states.restore(0),
        lambda: open_only(states, ["a"], [None]),
    ):
        try:
            use()
            queue.put("accepted")
        except RuntimeError as error:
            queue.put(str(error))
    states.close()
    queue.put("closed")


def test_a_closed_or_forked_store_says_so(tmp_path):
    context = multiprocessing.get_context("fork")
    for path in (tmp_path, None):
        queue = context.Queue()
        with ClientStates(SIZES, path) as states:
            with states.cohort(["a"], [None]) as cohort:
                write_states(cohort, 1)
            child = context.Process(target=_use_in_a_fork, args=(states, queue))
            child.start()
            for _ in range(4):
                assert f"found process {child.pid}, a fork of it" in queue.get(timeout=60)
            assert queue.get(timeout=60) == "closed"
            child.join()
            assert kept(states, "a") == (1, 3)
        for use in (
            lambda: states.round,
            lambda: states.oldest_round,
            lambda: states.seen(),
            lambda: states.get("a"),
            lambda: states.restore(0),
            lambda: open_only(states, ["a"], [None]),
            lambda: states.__enter__(),
        ):
            with pytest.raises(RuntimeError, match=r"This `ClientStates` of .* is closed"):
                use()
        states.close()  # once more does nothing
    with ClientStates(SIZES, tmp_path) as states, pytest.raises(RuntimeError, match="is closed"):
        play_before(states, 2, states.close)
    with ClientStates(SIZES, tmp_path) as states:
        assert (states.round, kept(states, "a")) == (1, (1, 3))


def test_a_lock_does_not_outlive_its_store_in_a_fork(tmp_path):
    """As that of a pool which was started while the store was open."""
    with ClientStates(SIZES, tmp_path):
        pid = os.fork()
        if not pid:
            signal.pause()
    try:
        ClientStates(SIZES, tmp_path).close()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


IN_MEMORY = """
import os, signal, sys, time
from aggregators import ClientStates
states = ClientStates(["a"])
with states.cohort(["a"], [None]) as cohort:
    path = cohort[0]["client"]["save"]
    for part in (".index", ".data-00000-of-00001"):
        open(path + part, "w").write("state")
if not os.fork():
    time.sleep(600)
print(path, flush=True)
{end}
"""


ENDS = [
    "os.kill(os.getpid(), signal.SIGKILL)",
    "os.killpg(os.getpgid(0), signal.SIGKILL)",
    "os._exit(1)",
    "os.kill(os.getpid(), signal.SIGTERM)",
    "sys.exit()",
]


@pytest.mark.parametrize("end", selection.params(ENDS, ["os.kill(os.getpid(), signal.SIGKILL)"]))
def test_memory_is_free_however_the_program_ends(end):
    root = os.path.dirname(os.path.dirname(__file__))
    child = subprocess.Popen(
        [sys.executable, "-c", IN_MEMORY.replace("{end}", end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
        text=True,
    )
    try:
        path = child.stdout.readline().strip()
        child.wait()
        store = os.path.dirname(os.path.dirname(path))
        assert os.path.basename(store).startswith("client-states-")
        for _ in range(3000):  # a moment is enough
            if not os.path.exists(store):
                break
            time.sleep(0.01)
        assert not os.path.exists(store)
        # A client that is at work still cannot make the directory anew.
        state = OrderedDict(rounds=tf.constant(1))
        with pytest.raises(tf.errors.NotFoundError):
            state_io.save(tf.constant(path), state)
        assert not os.path.exists(store)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.stdout.close()


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (
        tmp_path / "file",
        tmp_path / "file" / "store",
        "/proc/store",
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(
            RuntimeError, match="`path` must be a directory that can be used; found /"
        ):
            ClientStates(SIZES, path)
    for path in ("", "a\0b", "gs://bucket/store"):
        with pytest.raises(ValueError, match="`path` must be a directory of this machine's files"):
            ClientStates(SIZES, path)
    for path in (3.5, ["x"], "\udc80"):
        with pytest.raises(TypeError, match="`path` must be the path of a directory"):
            ClientStates(SIZES, path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "states.sqlite").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="damaged: it is no file"):
        ClientStates(SIZES, tmp_path / "store")
    assert not (tmp_path / "elsewhere").exists()


def test_ids_of_any_characters_and_numbers_of_numpy(tmp_path):
    ids = ["", "a\r\n", "\udc80", "'; DROP TABLE states; --", "\0", "ä", "a\u0308"]
    for number in (1, 2):
        with ClientStates(ids, tmp_path, keep=np.int64(2)) as states:
            assert type(states.keep) is int
            with states.cohort(ids, [None] * len(ids)) as cohort:
                write_states(cohort, number)
            assert states.seen() == tuple(sorted(ids))
            assert kept(states, "\udc80") == (number, 3 * number)


def test_repeated_ids_are_found_among_many():
    """In linear time: counting each among all would take hours."""
    ids = [str(number) for number in range(500_000)]
    with pytest.raises(ValueError, match="none repeated; found '0', '1', '10', '100', '1000', "):
        ClientStates([*ids, *ids])


def test_bad_arguments():
    for ids, message in (
        ("abc", "`client_ids` must be a list of strings"),
        ([1, 2], "`client_ids` must be a list of strings"),
    ):
        with pytest.raises(TypeError, match=message):
            ClientStates(ids)
    with pytest.raises(ValueError, match="none repeated; found 'a'"):
        ClientStates(["a", "b", "a"])
    for keep in (0, -1, True, 1.0, "1", None, np.float64(1)):
        with pytest.raises(ValueError, match="`keep` must be a whole number of at least 1; found"):
            ClientStates(["a"], keep=keep)
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
