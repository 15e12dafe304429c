"""Workers end in bounded time where SIGINT is ignored, as in the background of a script."""

import os
import subprocess
import sys

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
