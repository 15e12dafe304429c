"""Workers end in bounded time where SIGINT is ignored, as in the background of a script."""

import os
import subprocess
import sys

import psutil
import pytest

_SCRIPT = """
import os, signal
import numpy as np
import tensorflow_federated as tff
from tff_optim.interrupts import let_workers_end

assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
let_workers_end()
tff.backends.native.set_sync_local_cpp_execution_context()
identity = tff.tensorflow.computation(lambda x: x, tff.TensorType(np.int32))
print("computed", identity(3), flush=True)
tff.test.set_no_default_context()
print("the worker ended", flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("SIGINT is ignored as before", flush=True)
"""


def ignoring_interrupts(*command, timeout):
    return subprocess.run(
        ["/bin/sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a worker that stayed would keep a pipe open
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_tffs_worker_ends():
    done = ignoring_interrupts(sys.executable, "-c", _SCRIPT, timeout=120)
    assert done.stdout.splitlines() == [
        "computed 3",
        "the worker ended",
        "SIGINT is ignored as before",
    ]
    assert done.returncode == 0


@pytest.mark.slow
def test_the_tests_end(tmp_path):
    """A run of pytest with this directory's conftest, which starts TFF's runtime."""
    here = os.path.dirname(__file__)
    test = tmp_path / "test_one.py"
    test.write_text(
        "import tensorflow_federated as tff\n"
        "def test_one():\n"
        "    assert tff.tensorflow.computation(lambda: 3)() == 3\n"
    )
    done = ignoring_interrupts(
        *(sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider"),
        *("--rootdir", str(tmp_path), "-o", f"pythonpath={here}", str(test)),
        timeout=120,
    )
    assert "1 passed" in done.stdout, done.stdout


_LEFT = """
import sys
import psutil
import tensorflow as tf
import tensorflow_federated as tff
from tff_optim import simulation

model = tff.learning.models.functional_model_from_keras(
    tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))]),
    tf.keras.losses.MeanSquaredError(),
    (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
)
process = tff.learning.algorithms.build_weighted_fed_avg(
    model, tff.learning.optimizers.build_sgdm(0.1)
)
data = tf.data.Dataset.from_tensors(([[1.0, 2.0]], [[3.0]]))
simulation.run(process, [data], rounds=1, clients_per_round=1)
print(*[child.pid for child in psutil.Process().children(recursive=True)])
"""


@pytest.mark.slow
def test_the_worker_of_a_loop_ends_with_the_program(tmp_path):
    (tmp_path / "program.py").write_text(_LEFT)
    with open(tmp_path / "stderr", "w+") as stderr:
        done = subprocess.run(
            [sys.executable, str(tmp_path / "program.py")],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        stderr.seek(0)
        said = stderr.read()
    workers = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == 0, said
    assert workers
    # The shell that watches a worker sees the program end, and ends a moment after it.
    left = [psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)]
    assert psutil.wait_procs(left, timeout=30)[1] == []
    assert "Exception ignored" not in said
