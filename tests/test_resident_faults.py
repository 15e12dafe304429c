"""Workers that end, hang, never start or are cut off; and Python ending in every way."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import tensorflow as tf
from resident_cases import (
    assert_close,
    assert_equal,
    children_of,
    cohorts,
    hosts_of,
    is_running,
    plain_run,
    process,
    wait_until,
)
from worker_faults import Proxy, after, endless, running_worker

from tff_optim import ResidentProcess
from tff_optim.resident import ResidentCheckpoints, WorkerLostError, WorkerStartError
from tff_optim.resident.clients.in_workers import worker as worker_lib


def test_a_worker_killed_in_a_round_and_a_resumed_run(tmp_path):
    with ResidentProcess(process()) as r:
        checkpoints = ResidentCheckpoints(r, tmp_path)
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        checkpoints.save_now(state, 1)
        state, _ = r.next(state, list(cohorts()[1]))
        pid = hosts_of(r)[0].worker.pid
        timer = after(0.5, lambda: os.kill(pid, signal.SIGKILL))
        begin = time.monotonic()
        with pytest.raises(
            WorkerLostError, match=r"signal SIGKILL. The server states .* are lost.*resume"
        ):
            r.next(state, endless())
        timer.join()
        assert time.monotonic() - begin < 5
        # What was lost is said each time it is asked for.
        with pytest.raises(WorkerLostError, match="are lost"):
            r.materialize(state)
        with pytest.raises(WorkerLostError, match="are lost"):
            r.next(state, list(cohorts()[1]))
        state, last = checkpoints.resume()
        assert hosts_of(r)[0].worker.pid != pid
        for i in range(last + 1, 6):
            state, _ = r.next(state, list(cohorts()[i - 1]))
        assert_equal(r.materialize(state), plain_run()[5][0])


def test_a_lost_second_worker_is_replaced_within_the_round():
    with ResidentProcess(process(), workers=2) as r:
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        pid = hosts_of(r)[1].worker.pid
        os.kill(pid, signal.SIGSTOP)  # it takes part in no round again
        timer = after(0.5, lambda: os.kill(pid, signal.SIGKILL))
        state, _ = r.next(state, list(cohorts()[1]))
        timer.join()
        assert hosts_of(r)[1].worker.pid != pid
        assert_close(r.materialize(state), plain_run()[2][0])


def test_a_hanging_worker_is_given_up():
    with ResidentProcess(process(), heartbeat=0.5) as r:
        state = r.initialize()
        pid = hosts_of(r)[0].worker.pid
        os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(WorkerLostError, match=r"did not answer within 0.5 seconds"):
            r.next(state, list(cohorts()[0]))
        assert time.monotonic() - begin < 10
        assert not is_running(pid)


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


def test_a_remote_worker_that_is_not_there():
    sock = socket.create_server(("localhost", 0))
    target = f"localhost:{sock.getsockname()[1]}"
    with ResidentProcess(process(), workers=[target], start_timeout=0.5) as r:
        # Somebody listens, but it is no worker.
        with pytest.raises(WorkerStartError, match=f"{target} cannot be used: .* 0.5 seconds"):
            r.initialize()
        sock.close()
        with pytest.raises(WorkerStartError, match=target):
            r.initialize()


def test_a_port_taken_by_another_program(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(worker_lib, "reserve_port", lambda: (port, socket.socket()))
        with (
            ResidentProcess(process(), start_timeout=5) as r,
            pytest.raises(WorkerStartError, match="exited with code 0"),
        ):
            r.initialize()


def test_a_port_shared_with_another_tff_worker(monkeypatch):
    with running_worker() as (port, _):
        # Nothing stops a second worker there, and each connection reaches one of them.
        monkeypatch.setattr(
            worker_lib.LocalWorker,
            "_start",
            lambda self, port: worker_lib._Watched(["sleep", "60"], self.directory),
        )
        monkeypatch.setattr(worker_lib, "reserve_port", lambda: (port, socket.socket()))
        with (
            ResidentProcess(process()) as r,
            pytest.raises(
                WorkerStartError, match=f"Another TFF worker answers at localhost:{port}"
            ),
        ):
            r.initialize()


def test_connections_that_are_cut_or_frozen():
    with running_worker() as (port, server):
        proxy = Proxy(port)
        with ResidentProcess(process(), workers=[proxy.target], heartbeat=1) as r:
            state, _ = r.next(r.initialize(), list(cohorts()[0]))
            # Cut in the middle of a round, and mended: the round is repeated.
            long = [client.repeat(500) for client in cohorts()[1]]
            state_of_long = r.next(state, long).state
            expected = r.materialize(state_of_long)
            before = proxy.connections
            timer = after(0.1, proxy.cut)
            again = r.next(state, long).state
            timer.join()
            assert proxy.connections > before
            assert_equal(r.materialize(again), expected)
            # Frozen: nothing is refused, but nothing arrives.
            timer = after(0.3, proxy.freeze)
            begin = time.monotonic()
            with pytest.raises(WorkerLostError, match=f"{proxy.target} is gone: it did not answer"):
                r.next(state, endless())
            timer.join()
            assert time.monotonic() - begin < 10
        proxy.close()

        # Cut for good.
        proxy = Proxy(port)
        with ResidentProcess(process(), workers=[proxy.target], heartbeat=1) as r:
            state = r.initialize()
            proxy.refuse = True
            proxy.cut()
            begin = time.monotonic()
            with pytest.raises(WorkerLostError, match="did not answer within 1 seconds"):
                r.next(state, list(cohorts()[0]))
            assert time.monotonic() - begin < 10
        proxy.close()
        # Closing a process leaves a worker that is not its own alone.
        assert server.poll() is None


def test_a_remote_worker_started_anew_has_lost_the_state():
    with (
        running_worker() as (port, first),
        ResidentProcess(process(), workers=[f"localhost:{port}"], heartbeat=5) as r,
    ):
        state = r.initialize()
        first.kill()
        first.wait()
        second = subprocess.Popen([worker_lib.worker_binary(), f"--port={port}"])
        try:
            with pytest.raises(WorkerLostError, match="it was started anew"):
                r.next(state, list(cohorts()[0]))
            state, _ = r.next(r.initialize(), list(cohorts()[0]))
            assert_equal(r.materialize(state), plain_run()[1][0])
        finally:
            second.kill()
            second.wait()


def test_an_error_in_a_computation_is_no_lost_worker():
    with ResidentProcess(process()) as r:
        state = r.initialize()
        bad = cohorts()[0][0].map(lambda x, y: (tf.debugging.check_numerics(x / 0.0, "bad"), y))
        with pytest.raises(Exception, match="bad"):
            r.next(state, [bad])
        state, _ = r.next(state, list(cohorts()[0]))
        assert_equal(r.materialize(state), plain_run()[1][0])


def test_ctrl_c_stops_the_round_and_keeps_the_state():
    with ResidentProcess(process()) as r:
        # The first round builds; one of TensorFlow's destructors could swallow the Ctrl-C there.
        state, _ = r.next(r.initialize(), list(cohorts()[0]))
        long = [client.repeat(1000) for client in cohorts()[1]]
        timer = after(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            r.next(state, long)
        timer.join()
        assert time.monotonic() - begin < 5
        # The worker ends what it had begun, and goes on from the state before.
        state, _ = r.next(state, list(cohorts()[1]))
        assert_equal(r.materialize(state), plain_run()[2][0])
        # Ctrl-C in a terminal goes to every process of the terminal's group.
        assert os.getpgid(hosts_of(r)[0].worker.pid) != os.getpgid(0)


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


def interrupted(resident, state, clients):
    """Breaks a round off with Ctrl-C; returns the worker that it ran in."""
    host = hosts_of(resident)[0]
    timer = after(1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        resident.next(state, clients)
    timer.join()
    return host


def slow(seconds):
    """A cohort that takes its time."""

    def wait(x, y):
        end = tf.timestamp() + seconds
        (waited,) = tf.while_loop(
            lambda i: tf.timestamp() < end, lambda i: [i + 1], [tf.cast(end, tf.int64)]
        )
        with tf.control_dependencies([waited]):
            return tf.identity(x), y

    return [client.take(1).map(wait) for client in cohorts()[0]]


def test_after_ctrl_c_every_state_goes_on_in_a_fresh_worker():
    with ResidentProcess(process()) as r:
        first = r.restore(plain_run()[1][0])
        state, _ = r.next(first, list(cohorts()[1]))
        host = interrupted(r, state, slow(2))
        state, _ = r.next(state, list(cohorts()[2]))
        assert hosts_of(r)[0] is not host
        assert not is_running(host.worker.pid)
        assert_equal(r.materialize(state), plain_run()[3][0])
        assert_equal(r.materialize(first), plain_run()[1][0])
        again, _ = r.next(first, list(cohorts()[1]))
        assert_equal(r.materialize(again), plain_run()[2][0])


def test_after_ctrl_c_a_worker_that_stays_busy_is_left_and_its_states_are_lost():
    with ResidentProcess(process(), heartbeat=1.0) as r:
        state, _ = r.next(plain_run()[0][0], list(cohorts()[0]))
        host = interrupted(r, state, endless())
        begin = time.monotonic()
        with pytest.raises(WorkerLostError, match=r"a round in it was broken off, and it stayed"):
            r.next(state, list(cohorts()[1]))
        state, _ = r.next(plain_run()[1][0], list(cohorts()[1]))
        assert time.monotonic() - begin < 10
        assert not is_running(host.worker.pid)
        assert_equal(r.materialize(state), plain_run()[2][0])


def test_after_ctrl_c_nothing_is_lost_where_the_server_is_elsewhere():
    with ResidentProcess(process(), server_device="CPU:0", heartbeat=1.0) as r:
        state = r.restore(plain_run()[1][0])
        host = interrupted(r, state, endless())
        begin = time.monotonic()
        state, _ = r.next(state, list(cohorts()[1]))
        assert time.monotonic() - begin < 10
        assert not is_running(host.worker.pid)
        assert_close(r.materialize(state), plain_run()[2][0])
