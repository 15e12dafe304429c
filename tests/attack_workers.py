"""Attacks on workers: cut and refused connections, ends of Python, threads, forks, full memory."""

import contextlib
import copy
import functools
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings

import numpy as np
from attack_checkpoints import equal, small_file_system, use_up_inodes
from attacks import Attack, within
from resident_cases import cohorts, connections_of, is_running, plain_run, process
from worker_faults import Proxy, after, directories_of, running_worker

from tff_optim import ResidentProcess
from tff_optim.resident import ResidentCheckpoints, WorkerLostError, WorkerStartError
from tff_optim.resident.clients.in_workers import handover
from tff_optim.resident.clients.in_workers import worker as worker_lib

# ------------------------------------------------------------------------------------- connections


def connections(count, seed, disturb=("cut", "refuse")):
    """Cuts or refuses connections to a remote worker, for a while, around a round."""
    rng = random.Random(seed)
    heartbeat = 1.0
    with running_worker() as (port, _), contextlib.ExitStack() as stack:
        proxy = Proxy(port)
        stack.callback(proxy.close)
        resident = stack.enter_context(
            ResidentProcess(
                process(), workers=[proxy.target], heartbeat=heartbeat, start_timeout=5.0
            )
        )
        state = resident.restore(plain_run()[1][0])
        for _ in range(count):
            way, begin, duration = rng.choice(disturb), rng.random() * 0.1, rng.random() * 2.5

            def start(way=way, duration=duration):
                proxy.refuse = way == "refuse"
                proxy.cut()
                after(duration, proxy.mend)

            timer = after(begin, start)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a lost worker has cost time
                verdict = _judge_round(resident, state, seconds=20 * heartbeat)
                timer.join()
                proxy.mend()
                # States are where they were, and the next round is right.
                if verdict == "right" and not equal(resident.materialize(state), plain_run()[1][0]):
                    verdict = "lost: a state"
                if verdict == "right":
                    verdict = _judge_round(resident, state, seconds=20 * heartbeat, must=True)
            yield f"{way} for {duration:.1f} s", verdict


def _judge_round(resident, state, seconds, must=False):
    new, error, in_time = within(seconds, lambda: resident.next(state, list(cohorts()[1])).state)
    if not in_time:
        return "hung"
    if error is None:
        same = equal(resident.materialize(new), plain_run()[2][0])
        return "right" if same else "lost: other numbers"
    if isinstance(error, WorkerLostError | WorkerStartError) and not must:
        return "right"
    return f"unclean: {error!r}"


# -------------------------------------------------------------------------------- ends of a Python

_ENDING = """
import os, signal, sys, threading, time
import tensorflow_federated as tff
from tff_optim.resident.clients.in_workers.worker import LocalWorker, RemoteWorker
tff.test.set_no_default_context()

def error():
    raise ValueError("an error nobody catches")

ENDS = {
    "returns": lambda: None,
    "exits": lambda: sys.exit(3),
    "raises": error,
    "aborts": os.abort,
    "_exit": lambda: os._exit(0),
    **{
        name: lambda name=name: (os.kill(os.getpid(), getattr(signal, name)), time.sleep(30))
        for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGSEGV")
    },
}

def run(kind, end, forked, ignoring):
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignoring else signal.default_int_handler)
    worker = LocalWorker() if kind == "local" else RemoteWorker(sys.argv[1])
    pid = worker.pid if kind == "local" else 0
    child = 0
    if forked:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            time.sleep(60)
            os._exit(0)
    print("worker", pid, worker.directory, child, os.getpid(), flush=True)
    ENDS[end]()
    worker.close()
    sys.exit(0)

# One import for all: each case ends in a child of its own.
for line in sys.stdin:
    kind, end, forked, ignoring = line.split()
    case = os.fork()
    if case == 0:
        sys.stderr = open(os.devnull, "w")
        run(kind, end, forked == "1", ignoring == "1")
        os._exit(0)
    os.waitpid(case, 0)
    print("ended", flush=True)
"""

ENDS = (
    *("returns", "exits", "raises", "aborts", "_exit"),
    *("SIGKILL", "SIGTERM", "SIGHUP", "SIGSEGV", "SIGINT"),
)


def endings(count, seed):
    """Ends Python in every way, with local and remote workers, forks and an ignored SIGINT."""
    rng = random.Random(seed)
    cases = [
        (kind, end, forked, ignoring)
        for kind in ("local", "remote")
        for end in ENDS
        for forked in (0, 1)
        for ignoring in (0, 1)
        if not (end == "SIGINT" and ignoring)
    ]
    rng.shuffle(cases)
    with running_worker() as (port, _):
        runner = subprocess.Popen(
            [sys.executable, "-c", _ENDING, f"localhost:{port}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            for number in range(count):
                case = cases[number % len(cases)]
                print(*case, file=runner.stdin, flush=True)
                answer, error, in_time = within(150, runner.stdout.readline)
                if not in_time or not answer or not answer.startswith("worker"):
                    yield f"{case}", f"hung: {answer!r} {error!r}"
                    break
                pid, directory, child, _ = answer.split()[1:]
                _, _, in_time = within(120, runner.stdout.readline)
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline and (
                    os.path.exists(directory) or (int(pid) and is_running(int(pid)))
                ):
                    time.sleep(0.02)
                left = [directory] if os.path.exists(directory) else []
                left += [f"worker {pid}"] if int(pid) and is_running(int(pid)) else []
                if int(child):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(child), signal.SIGKILL)
                label = "{} worker, {}, forked {}, SIGINT ignored {}".format(*case)
                yield label, "hung" if not in_time else f"left behind: {left}" if left else "right"
        finally:
            runner.kill()
            runner.wait()


# --------------------------------------------------------------------------------- threads, forks


def _in_child(function):
    """Runs a function in a forked child; returns what it printed and its way of ending."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            with open(writing, "w") as pipe:
                print(function(), file=pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading) as pipe:
        text, _, in_time = within(90, pipe.read)
    if not in_time:
        os.kill(child, signal.SIGKILL)
        text = "hung"
    os.waitpid(child, 0)
    return text


def _told(function):
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return "no error"


def rounds_from_threads(rng):
    with ResidentProcess(process(), workers=1) as resident:
        state, results, barrier = plain_run()[1][0], [], threading.Barrier(4)

        def play():
            barrier.wait()
            results.append(resident.materialize(resident.next(state, list(cohorts()[1])).state))

        threads = [threading.Thread(target=play, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        if len(results) != 4:
            return "hung"
        number = len(directories_of(os.getpid()))
        if number != 1:
            return f"left behind: {number} workers for one"
        return "right" if all(equal(r, plain_run()[2][0]) for r in results) else "lost"


def close_in_a_round(rng):
    resident = ResidentProcess(process(), workers=1, heartbeat=1)
    state = resident.initialize()
    timer = after(rng.random(), resident.close)
    _, error, in_time = within(
        30, lambda: resident.next(state, [client.repeat() for client in cohorts()[0]])
    )
    timer.join()
    if not in_time:
        return "hung"
    return "right" if "closed" in str(error) else f"unclean: {error!r}"


def close_while_starting(rng):
    resident = ResidentProcess(process(), workers=1, heartbeat=1)
    timer = after(rng.random() * 0.5, resident.close)
    _, error, in_time = within(
        60, lambda: [resident.next(plain_run()[1][0], list(cohorts()[1])) for _ in range(100)]
    )
    timer.join()
    if not in_time:
        return "hung"
    return "right" if "closed" in str(error) else f"unclean: {error!r}"


def a_child_that_exits(rng):
    with ResidentProcess(process(), workers=1) as resident:
        state = resident.next(plain_run()[0][0], list(cohorts()[0])).state
        child = os.fork()
        if child == 0:
            # It ends as a script would, with what runs at the exit.
            with contextlib.suppress(BaseException):
                resident.close()
                import atexit

                atexit._run_exitfuncs()
            os._exit(0)
        _, _, in_time = within(20, lambda: os.waitpid(child, 0))
        if not in_time:
            os.kill(child, signal.SIGKILL)
            return "hung"
        if not directories_of(os.getpid()):
            return "lost: the directory"
        new = resident.next(state, list(cohorts()[1])).state
        return "right" if equal(resident.materialize(new), plain_run()[2][0]) else "lost"


def a_child_that_uses_it(rng):
    with ResidentProcess(process(), workers=1) as resident:
        state = resident.restore(plain_run()[1][0])
        checkpoints = ResidentCheckpoints(resident, tempfile.mkdtemp())
        use = rng.choice(
            (
                lambda: resident.next(state, list(cohorts()[1])),
                lambda: resident.materialize(state),
                lambda: resident.initialize(),
                lambda: np.asarray(state.global_model_weights.trainable[0]),
                lambda: checkpoints.save_now(state, 1),
                lambda: checkpoints.resume(),
            )
        )
        text = _in_child(lambda: _told(use))
        if "hung" in text:
            return "hung"
        if "belongs to process" not in text:
            return f"unclean: {text}"
        new = resident.next(state, list(cohorts()[1])).state
        return "right" if equal(resident.materialize(new), plain_run()[2][0]) else "lost"


def copies(rng):
    with ResidentProcess(process()) as resident:
        for copying in (copy.copy, copy.deepcopy, pickle.dumps):
            try:
                copying(resident)
                return f"unclean: {copying} gave a copy"
            except TypeError as error:
                if "cannot be copied" not in str(error):
                    return f"unclean: {error!r}"
    return "right"


def concurrency(count, seed):
    """Threads, forks and copies."""
    rng = random.Random(seed)
    plain_run()  # TFF's context belongs to this thread
    cases = (
        *(rounds_from_threads, close_in_a_round, close_while_starting),
        *(a_child_that_exits, a_child_that_uses_it, copies),
    )
    for number in range(count):
        case = cases[number % len(cases)]
        verdict, error, in_time = within(180, functools.partial(case, rng))
        if error is not None:
            verdict = f"unclean: {error!r}"
        elif not in_time:
            verdict = "hung"
        deadline = time.monotonic() + 20
        while directories_of(os.getpid()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if verdict == "right" and directories_of(os.getpid()):
            verdict = f"left behind: {directories_of(os.getpid())}"
        yield case.__name__, verdict


# ----------------------------------------------------------------------------------- shared memory


@contextlib.contextmanager
def small_shared_memory(options):
    """`/dev/shm` of a size of its own, for workers that are started in the block."""
    with small_file_system(options) as path:
        if path is None:
            yield None
            return
        before = worker_lib.SHARED_MEMORY
        worker_lib.SHARED_MEMORY = path
        try:
            yield path
        finally:
            worker_lib.SHARED_MEMORY = before


def shared_memory(count, seed):
    """Shared memory that is full, without inodes, vanishes or runs full in the middle."""
    rng = random.Random(seed)
    before_limit = handover.FILES_FROM_BYTES
    handover.FILES_FROM_BYTES = 1
    try:
        for _ in range(count):
            way = rng.choice(("full at start", "no inodes", "full in the middle", "removed"))
            options = "size=1m,nr_inodes=8" if way == "no inodes" else "size=4m"
            with small_shared_memory(options) as path:
                if path is None:
                    continue
                yield way, _judge_memory(way, path)
    finally:
        handover.FILES_FROM_BYTES = before_limit


def _judge_memory(way, path):
    import shutil

    plain = plain_run()[1][0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if way == "full at start":
            _fill(f"{path}/filler")
        elif way == "no inodes":
            use_up_inodes(f"{path}/filler")
        with ResidentProcess(process(), workers=1) as resident:
            state = resident.restore(plain)
            connections_of(resident)
            if way == "full in the middle":
                _fill(f"{path}/filler")
            elif way == "removed":
                for directory in os.listdir(path):
                    shutil.rmtree(f"{path}/{directory}")
            new, error, in_time = within(60, lambda: resident.next(state, list(cohorts()[1])).state)
            if not in_time:
                return "hung"
            if error is not None:
                return f"unclean: {error!r}"
            found = resident.materialize(new)
        if not equal(found, plain_run()[2][0]):
            return "lost: other numbers"
    # A directory that was removed is made again by whoever writes first.
    if way != "removed" and not any("room" in str(w.message) for w in said):
        return "unclean: nothing was said"
    left = [e for e in os.listdir(path) if e != "filler"] + directories_of(os.getpid())
    return f"left behind: {left}" if left else "right"


def _fill(path):
    with open(path, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(b"x" * 256)


ATTACKS = [
    Attack("cut connections", functools.partial(connections, disturb=("cut",)), 100, 8),
    Attack("refused connections", functools.partial(connections, disturb=("refuse",)), 100, 4),
    Attack("ends of Python", endings, count=76, in_tests=10),
    Attack("threads, forks, copies", concurrency, count=36, in_tests=6),
    Attack("shared memory", shared_memory, count=24, in_tests=4),
]
