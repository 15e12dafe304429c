"""Workers that end, hang, never start or are cut off; and Python ending in every way."""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from resident_cases import (
    assert_close,
    assert_equal,
    children_of,
    cohorts,
    connections_of,
    is_running,
    plain_run,
    process,
    wait_until,
)
from worker_faults import Proxy, after, endless, running_worker, slowed

from tff_optim import ResidentProcess
from tff_optim.resident import ResidentCheckpoints, WorkerLostError, WorkerStartError
from tff_optim.resident.clients.in_workers import worker as worker_lib

LOST = r"{}.*The round is run again in a new one. No state is lost"


def worker_of(resident, number=0):
    return connections_of(resident)[number].worker


def slow(seconds):
    """A cohort that takes its time."""
    return [slowed(client, seconds) for client in cohorts()[1]]


def test_a_worker_killed_in_a_round_costs_only_time():
    with ResidentProcess(process(), workers=1) as r:
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        pid = worker_of(r).pid
        timer = after(0.3, lambda: os.kill(pid, signal.SIGKILL))
        with pytest.warns(UserWarning, match=LOST.format("signal SIGKILL")):
            after_it, _ = r.next(state, slow(0.5))
        timer.join()
        assert worker_of(r).pid != pid
        assert_equal(r.materialize(after_it), plain_run()[2][0])
        assert_equal(r.materialize(state), plain_run()[1][0])
        # Between two rounds nothing is in it.
        os.kill(worker_of(r).pid, signal.SIGKILL)
        with pytest.warns(UserWarning, match=LOST.format("signal SIGKILL")):
            state, _ = r.next(after_it, list(cohorts()[2]))
        assert_equal(r.materialize(state), plain_run()[3][0])


def test_a_second_lost_worker_in_a_round_is_an_error_after_which_all_goes_on():
    with ResidentProcess(process(), workers=1) as r:
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        seen = set()

        def kill_every_one():
            while len(seen) < 2:
                known = r._clients._workers._connections[0]
                if known is not None and known.worker.pid not in seen and not known.lost:
                    time.sleep(0.3)
                    seen.add(known.worker.pid)
                    os.kill(known.worker.pid, signal.SIGKILL)
                time.sleep(0.02)

        killer = threading.Thread(target=kill_every_one)
        killer.start()
        with (
            pytest.warns(UserWarning, match="No state is lost"),
            pytest.raises(WorkerLostError, match=r"the second one in this round.*No state is lost"),
        ):
            r.next(state, endless())
        killer.join()
        state, _ = r.next(state, list(cohorts()[1]))
        assert_equal(r.materialize(state), plain_run()[2][0])


def test_a_lost_second_worker_is_replaced_within_the_round():
    with ResidentProcess(process(), workers=2) as r:
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        pid = worker_of(r, 1).pid
        os.kill(pid, signal.SIGSTOP)  # it takes part in no round again
        timer = after(0.5, lambda: os.kill(pid, signal.SIGKILL))
        with pytest.warns(UserWarning, match=LOST.format("signal SIGKILL")):
            state, _ = r.next(state, list(cohorts()[1]))
        timer.join()
        assert worker_of(r, 1).pid != pid
        assert_close(r.materialize(state), plain_run()[2][0])


def test_a_hanging_worker_is_given_up():
    with ResidentProcess(process(), workers=1, heartbeat=0.5) as r:
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        pid = worker_of(r).pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.warns(UserWarning, match=LOST.format("did not answer within 0.5 seconds")):
            state, _ = r.next(state, list(cohorts()[1]))
        assert not is_running(pid)
        assert_equal(r.materialize(state), plain_run()[2][0])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("/bin/sh", "-c", "sleep 60"), "not ready within 1 seconds"),
        (("/bin/sh", "-c", "exit 3"), "exited with code 3"),
        (("/no/such/worker",), "exited with code 127"),
    ],
)
def test_a_worker_that_never_starts(command, message):
    begin = time.monotonic()
    with pytest.raises(WorkerStartError, match=message):
        worker_lib.LocalWorker(start_timeout=1, command=command)
    assert time.monotonic() - begin < 5
    assert not [pid for pid in children_of(os.getpid()) if "sleep 60" in _command(pid)]


def _command(pid):
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/cmdline") as f:
        return f.read().replace("\0", " ")
    return ""


def a_round(resident):
    return resident.next(plain_run()[0][0], list(cohorts()[0]))


def test_a_remote_worker_that_is_not_there():
    sock = socket.create_server(("localhost", 0))
    target = f"localhost:{sock.getsockname()[1]}"
    with ResidentProcess(process(), workers=[target], start_timeout=0.5) as r:
        # Somebody listens, but it is no worker.
        with pytest.raises(WorkerStartError, match=f"{target} cannot be used: .* 0.5 seconds"):
            a_round(r)
        sock.close()
        with pytest.raises(WorkerStartError, match=target):
            a_round(r)


def test_a_port_taken_by_another_program(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(worker_lib, "reserve_port", lambda: (port, socket.socket()))
        with (
            ResidentProcess(process(), workers=1, start_timeout=5) as r,
            pytest.raises(WorkerStartError, match="exited with code 0"),
        ):
            a_round(r)


def test_a_port_shared_with_another_tff_worker(monkeypatch):
    with running_worker() as (port, _):
        # Nothing stops a second worker there, and each connection reaches one of them.
        monkeypatch.setattr(worker_lib, "_WATCHED", "exec sleep 60")
        monkeypatch.setattr(worker_lib, "reserve_port", lambda: (port, socket.socket()))
        with (
            ResidentProcess(process(), workers=1) as r,
            pytest.raises(
                WorkerStartError, match=f"Another TFF worker answers at localhost:{port}"
            ),
        ):
            a_round(r)


def test_connections_that_are_cut_or_frozen():
    with running_worker() as (port, server):
        proxy = Proxy(port)
        with ResidentProcess(process(), workers=[proxy.target], heartbeat=1) as r:
            state, _ = r.next(r.initialize(), list(cohorts()[0]))
            # Cut in the middle of a round, and mended: the round is run again, without a word.
            before = proxy.connections
            timer = after(0.3, proxy.cut)
            again = r.next(state, slow(0.3)).state
            timer.join()
            assert proxy.connections > before
            assert_equal(r.materialize(again), plain_run()[2][0])
            # Frozen, then mended: nothing is refused, but nothing arrives.
            timers = [after(0.3, proxy.freeze), after(4, proxy.mend)]
            with pytest.warns(UserWarning, match=f"{proxy.target} is gone: it did not answer"):
                again = r.next(state, slow(0.3)).state
            for timer in timers:
                timer.join()
            assert_equal(r.materialize(again), plain_run()[2][0])
            # Cut for good.
            proxy.refuse = True
            proxy.cut()
            r._clients._workers._start_timeout = 1.0
            with (
                pytest.warns(UserWarning, match="did not answer within 1 seconds"),
                pytest.raises(WorkerStartError, match=f"{proxy.target} cannot be used"),
            ):
                r.next(state, list(cohorts()[1]))
            assert_equal(r.materialize(state), plain_run()[1][0])
        proxy.close()
        # Closing a process leaves a worker that is not its own alone.
        assert server.poll() is None


def test_a_remote_worker_started_anew_in_a_round():
    with (
        running_worker() as (port, first),
        ResidentProcess(process(), workers=[f"localhost:{port}"], heartbeat=5) as r,
    ):
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        first.kill()
        first.wait()
        second = subprocess.Popen([worker_lib.worker_binary(), f"--port={port}"])
        try:
            with pytest.warns(UserWarning, match=LOST.format("it was started anew")):
                state, _ = r.next(state, list(cohorts()[1]))
            assert_equal(r.materialize(state), plain_run()[2][0])
        finally:
            second.kill()
            second.wait()


@pytest.mark.parametrize("place", [{}, {"workers": 1}])
def test_an_error_in_a_computation_is_an_error_and_no_lost_worker(place):
    with ResidentProcess(process(), **place) as r:
        state = r.initialize()
        bad = cohorts()[0][0].map(lambda x, y: (tf.debugging.check_numerics(x / 0.0, "bad"), y))
        with pytest.raises(Exception, match="bad"):
            r.next(state, [bad])
        state, _ = r.next(state, list(cohorts()[0]))
        assert_close(r.materialize(state), plain_run()[1][0])


def test_no_worker_outlives_python(tmp_path):
    script = tmp_path / "endings.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            from tff_optim.resident.clients.in_workers.worker import LocalWorker

            def error():
                raise ValueError("an error nobody catches")

            endings = [
                lambda: sys.exit(3), error, lambda: os._exit(0),
                lambda: os.kill(os.getpid(), signal.SIGKILL),
                lambda: os.kill(os.getpid(), signal.SIGTERM),
            ]
            # One import of TFF for all: each child starts a worker and ends in its own way.
            import tensorflow_federated as tff
            tff.test.set_no_default_context()
            for end in endings:
                child = os.fork()
                if child == 0:
                    worker = LocalWorker()
                    print("worker", worker.pid, worker.directory, flush=True)
                    end()
                os.waitpid(child, 0)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    workers = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("worker")]
    assert len(workers) == 5, done.stderr
    for pid, directory in workers:
        wait_until(lambda pid=pid: not is_running(pid), 5)
        wait_until(lambda directory=directory: not os.path.exists(directory), 5)


@pytest.mark.parametrize("where", ["a local worker", "a remote worker"])
def test_after_ctrl_c_no_call_waits_for_the_round(where):
    with contextlib.ExitStack() as stack:
        workers = 1
        if where == "a remote worker":
            workers = [f"localhost:{stack.enter_context(running_worker())[0]}"]
        r = stack.enter_context(ResidentProcess(process(), workers=workers))
        # The first round builds; one of TensorFlow's destructors could swallow the Ctrl-C there.
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        worker = worker_of(r)
        # Ctrl-C in a terminal goes to every process of the terminal's group.
        assert where == "a remote worker" or os.getpgid(worker.pid) != os.getpgid(0)
        timer = after(1, lambda: os.kill(os.getpid(), signal.SIGINT))
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            r.next(state, endless()[:1])  # of which a worker of two cores runs one beside others
        timer.join()
        assert_equal(r.materialize(state), plain_run()[1][0])
        assert_equal(r.get_model_weights(state), plain_run()[1][0].global_model_weights)
        state, _ = r.next(state, list(cohorts()[1]))
        assert time.monotonic() - begin < 30  # an endless round, and a limit to end the test
        assert_equal(r.materialize(state), plain_run()[2][0])
        assert worker_of(r) is not worker
        assert where == "a remote worker" or not is_running(worker.pid)


def test_ctrl_c_in_the_python_process_ends_the_round_after_the_clients_that_it_trains():
    with ResidentProcess(process(), clients_at_once=1) as r:
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        trained = []

        def count(x):
            trained.append(1)
            if len(trained) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return x

        def mapped(x, y):
            return tf.ensure_shape(tf.numpy_function(count, [x], tf.float32), [None, 3]), y

        with pytest.raises(KeyboardInterrupt):
            r.next(state, [client.map(mapped) for client in cohorts()[1]])
        assert len(trained) == 2  # of the first client; the second one has two batches as well
        state, _ = r.next(state, list(cohorts()[1]))
        assert_close(r.materialize(state), plain_run()[2][0])


@pytest.mark.parametrize("place", [{}, {"workers": 1}])
def test_closing_ends_a_round_of_another_thread(place):
    r = ResidentProcess(process(), clients_at_once=1, heartbeat=0.5, **place)
    state, _ = r.next(r.initialize(), list(cohorts()[0]))
    outcome = []

    def play():
        try:
            r.next(state, slow(0.3) * 40)
        except RuntimeError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=play)
    thread.start()
    time.sleep(0.5)
    r.close()
    thread.join(30)
    assert not thread.is_alive()
    assert "This `ResidentProcess` was closed" in outcome[0]


def told_in_a_child(use):
    """What a forked child is told when it uses what belongs to its parent."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            use()
            os.write(writing, b"no error")
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text


def test_a_forked_child_is_refused_wherever_it_uses_its_parents_states(tmp_path):
    with ResidentProcess(process()) as r:
        state = r.restore(plain_run()[1][0])
        checkpoints = ResidentCheckpoints(r, tmp_path)
        leaf = state.global_model_weights.trainable[0]
        for use in (
            r.initialize,
            lambda: r.next(state, list(cohorts()[1])),
            lambda: r.next(plain_run()[1][0], list(cohorts()[1])),
            lambda: r.materialize(state),
            lambda: r.restore(plain_run()[1][0]),
            lambda: r.get_hparams(state),
            lambda: np.asarray(leaf),
            lambda: tf.convert_to_tensor(leaf),
            lambda: pickle.dumps(leaf),
            lambda: checkpoints.save_now(state, 1),
            checkpoints.resume,
        ):
            assert "ForkedError" in (told := told_in_a_child(use)), told
        assert told_in_a_child(r.close) == "no error"
        state, _ = r.next(state, list(cohorts()[1]))
        assert_close(r.materialize(state), plain_run()[2][0])
