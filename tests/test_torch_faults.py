"""A step of torch is taken once or raises, whatever befalls the process in which torch runs.

`torch_stand_in.py` takes torch's place, so that these tests need no environment of torch.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import contracts
import numpy as np
import psutil
import pytest
import tensorflow as tf

from tff_optim import build_torch_optimizer
from tff_optim.backends.torch import process as torch_process

STAND_IN = pathlib.Path(__file__).with_name("torch_stand_in.py")
RATE, MOMENTUM = 0.5, 0.25  # NumPy and the stand-in round alike
WEIGHTS, GRADIENTS = contracts.make_problem(steps=4)
SPECS = contracts.specs_of(WEIGHTS)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder of modules for the process of torch, the stand-in among them."""
    shutil.copy(STAND_IN, tmp_path / "torch.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def make(folder, **arguments):
    return build_torch_optimizer(
        "SGD",
        python=sys.executable,
        lr=RATE,
        momentum=MOMENTUM,
        file=str(folder / "told"),
        **arguments,
    )


def tell(folder, *what):
    (folder / "told").write_text("\n".join(what))


def truth(steps):
    weights, traces = [w.copy() for w in WEIGHTS], [np.zeros_like(w) for w in WEIGHTS]
    for row in steps:
        traces = [trace * np.float32(MOMENTUM) + g for trace, g in zip(traces, row)]
        weights = [w - np.float32(RATE) * trace for w, trace in zip(weights, traces)]
    return weights


def assert_right(weights, steps):
    contracts.assert_equal([np.asarray(w) for w in weights], truth(steps))


def children():
    """The processes of torch that this one has started."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("torch/child.py" in part for part in child.cmdline()):
                found.append(child.pid)
    return found


def kill(child):
    """Kills a process, and waits for its end without taking its exit status."""
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)


def started(folder, **arguments):
    """An optimizer after its first step: the optimizer, state and weights, and its process."""
    before = set(children())
    optimizer = make(folder, **arguments)
    first = optimizer.next(optimizer.initialize(SPECS), WEIGHTS, GRADIENTS[0])
    (child,) = set(children()) - before
    return optimizer, first, child


def test_the_stand_in_takes_the_steps_of_the_truth(modules):
    optimizer, first, _ = started(modules)
    assert_right(contracts.run(optimizer.next, *first, GRADIENTS[1:])[1], GRADIENTS)


def test_with_four_threads_and_killed_processes_each_step_is_right_or_raises(modules):
    optimizer, first, child = started(modules)
    outcomes = []

    def steps():
        for _ in range(4):
            try:
                outcomes.append(optimizer.next(*first, GRADIENTS[1])[1])
            except RuntimeError as error:
                outcomes.append(error)

    tell(modules, *["kill"] * 3)
    kill(child)
    threads = [threading.Thread(target=steps) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    errors = [str(outcome) for outcome in outcomes if isinstance(outcome, RuntimeError)]
    assert len(outcomes) == 16
    assert len(errors) == 3
    for text in errors:
        assert "before it had taken the step (killed by SIGKILL)" in text
    for outcome in outcomes:
        if not isinstance(outcome, RuntimeError):
            assert_right(outcome, GRADIENTS[:2])


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "graph"])
def test_a_stopped_process_is_ended_and_the_step_can_be_taken_again(traced, modules, monkeypatch):
    optimizer, first, child = started(modules)
    step = tf.function(optimizer.next) if traced else optimizer.next
    step(*contracts.tensors(first), contracts.tensors(GRADIENTS[1]))
    monkeypatch.setenv("TFF_OPTIM_TORCH_TIMEOUT", "0.5")
    tell(modules, "stop")
    with pytest.raises(
        (RuntimeError, tf.errors.OpError),
        match=r"not taken the step after 0\.5 seconds.*set TFF_OPTIM_TORCH_TIMEOUT to more",
    ):
        step(*contracts.tensors(first), contracts.tensors(GRADIENTS[1]))
    assert child not in children()
    monkeypatch.setenv("TFF_OPTIM_TORCH_TIMEOUT", "100")
    _, last = step(*contracts.tensors(first), contracts.tensors(GRADIENTS[1]))
    assert_right(last, GRADIENTS[:2])


def test_a_process_that_is_stopped_before_a_large_request_is_ended(modules, monkeypatch):
    before = set(children())
    recipe = make(modules).recipe
    process = torch_process.TorchProcess(sys.executable, recipe, [tf.TensorSpec([1])])
    (child,) = set(children()) - before
    os.kill(child, signal.SIGSTOP)
    monkeypatch.setenv("TFF_OPTIM_TORCH_TIMEOUT", "0.5")
    many = {f"group/{i}": 0.5 for i in range(100_000)}  # more than a socket holds
    one = np.ones(1, np.float32)
    with pytest.raises(RuntimeError, match="not taken the step"):
        process.step([one], {0: one}, [one], np.array([False]), many)
    assert child not in children()


def test_after_ctrl_c_the_next_step_gets_its_own_result(modules):
    optimizer, first, _ = started(modules)
    tell(modules, "interrupt")
    with pytest.raises(KeyboardInterrupt):
        optimizer.next(*first, GRADIENTS[1])
    assert_right(optimizer.next(*first, GRADIENTS[2])[1], [GRADIENTS[0], GRADIENTS[2]])


def test_a_fork_starts_a_process_of_its_own(modules):
    optimizer, (state, weights), child = started(modules)
    process = torch_process.TorchProcess(sys.executable, optimizer.recipe, list(SPECS))
    slots = [np.asarray(state["slots"][f"trace/{i}"]) for i in range(2)]
    weights = [np.asarray(w) for w in weights]

    def second():
        return process.step(
            weights, dict(enumerate(GRADIENTS[1])), slots, np.array([True, True]), {}
        ).weights

    ours, theirs = os.pipe()
    with torch_process._lock:  # as if another thread took a step
        fork = os.fork()
    if fork == 0:  # it lives until the pipe of the parent is closed, and with it what it inherited
        try:
            assert_right(second(), GRADIENTS[:2])
            (own,) = children()
            os.write(theirs, b"%d\n" % own)
            del process, optimizer
        except BaseException as error:
            os.write(theirs, repr(error).encode())
        finally:
            time.sleep(1000)
            os._exit(0)
    try:
        own = os.read(ours, 1000).decode()
        assert own.strip().isdigit(), own
        assert int(own) != child
        assert_right(second(), GRADIENTS[:2])
        # The end of the process does not wait for the fork, nor did the fork end it.
        assert child in children()
        kill(child)
        assert_right(second(), GRADIENTS[:2])
    finally:
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)


def test_a_process_ends_with_the_program_that_was_killed(modules):
    program = (
        "import os, signal, sys, tensorflow as tf\n"
        "from tff_optim import build_torch_optimizer\n"
        "optimizer = build_torch_optimizer('SGD', lr=0.5, python=sys.executable, file='')\n"
        "optimizer.initialize([tf.TensorSpec([2])])\n"
        "print('ready', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join([str(modules), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,  # reads until the process of torch, which has the pipes too, has ended
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout) == (-signal.SIGKILL, "ready\n")


@pytest.mark.parametrize(
    "code",
    [
        "print('Welcome!')",
        "print('{}')",
        "import os; os.system('echo Welcome!')",
        "print('no end of line', end='', flush=True)",
    ],
)
def test_what_is_printed_at_the_start_is_no_reply(code, modules):
    (modules / "sitecustomize.py").write_text(code)
    optimizer = make(modules)
    _, last = contracts.run(optimizer.next, optimizer.initialize(SPECS), WEIGHTS, GRADIENTS)
    assert_right(last, GRADIENTS)


@pytest.mark.parametrize("safe", ["", "1"])
def test_modules_are_found_where_the_search_path_says(safe, modules, monkeypatch):
    # The first folder of the path stays, and the folder of this package is not on it.
    monkeypatch.setenv("PYTHONSAFEPATH", safe)
    (modules / "own.py").write_text(
        "import sys, torch\n"
        "assert not [path for path in sys.path if path.endswith('tff_optim')], sys.path\n"
        "class Own(torch.optim.SGD): pass\n"
    )
    optimizer = build_torch_optimizer(
        "own.Own",
        python=sys.executable,
        trusted_packages=["own"],
        lr=RATE,
        momentum=MOMENTUM,
        file="",
    )
    _, last = contracts.run(optimizer.next, optimizer.initialize(SPECS), WEIGHTS, GRADIENTS)
    assert_right(last, GRADIENTS)


@pytest.mark.parametrize(
    ("count", "told", "message"),
    [
        (
            2**63,
            None,
            r"at most 64 bits; found one of 65 bits at 'group/count'\. Give it as a float",
        ),
        (10**400, None, r"at most 64 bits; found one of 1330 bits at 'group/count'"),
        (0, "overflow", r"at most 64 bits; found one of 16611 bits at 'group/count'"),
        (0, "grow", r"whole; found 1e\+300 for 'group/count' of int64. Give it as a float."),
        (
            0,
            "rate",
            r"not change its learning rate; found that a step changes it from 0\.5 to 0\.25",
        ),
    ],
    ids=["64 bits", "400 digits", "grown", "a fraction", "the rate"],
)
def test_numbers_that_do_not_fit_are_named(count, told, message, modules):
    def first_step():
        optimizer = make(modules, count=count)
        state = optimizer.initialize(SPECS)
        tell(modules, told)
        optimizer.next(state, WEIGHTS, GRADIENTS[0])

    with pytest.raises(ValueError, match=message):
        first_step()


def test_whole_numbers_of_64_bits_come_back_as_they_are(modules):
    optimizer = make(modules, largest=2**63 - 1, least=-(2**63) + 1)
    state, _ = optimizer.next(optimizer.initialize(SPECS), WEIGHTS, GRADIENTS[0])
    assert int(state["slots"]["group/largest"]) == 2**63 - 1
    assert int(state["slots"]["group/least"]) == -(2**63) + 1


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "1e7", "soon", ""])
def test_a_bad_time_limit_is_refused(limit, modules, monkeypatch):
    monkeypatch.setenv("TFF_OPTIM_TORCH_TIMEOUT", limit)
    with pytest.raises(
        ValueError, match=rf"must be a number of seconds above 0 .*; found '{limit}'\."
    ):
        make(modules).initialize(SPECS)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os._exit(3)", r"ended before it had started \(exit status 3\)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "had not started after 2 sec"),
    ],
)
def test_a_process_that_cannot_start_is_told(code, message, modules, monkeypatch):
    (modules / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("TFF_OPTIM_TORCH_TIMEOUT", "2" if "STOP" in code else "100")
    with pytest.raises(RuntimeError, match=message):
        make(modules).initialize(SPECS)
