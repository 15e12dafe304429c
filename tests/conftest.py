"""One TFF runtime for the whole session, ended before the interpreter is."""

import asyncio
import gc
import os
import random

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
import tensorflow as tf
import tensorflow_federated as tff
from processor_time import ProcessorTime

from tff_optim.interrupts import let_workers_end

# The context that `import tensorflow_federated` sets would complain at exit.
tff.test.set_no_default_context()

# Two logical devices stand in for a host and an accelerator wherever placement is tested.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration(), tf.config.LogicalDeviceConfiguration()],
)


# `make test &` in a script: TFF would wait for ever for its worker to end.
let_workers_end()


def pytest_addoption(parser):
    # `-o durations_json=FILE`. Before it has read this file, pytest would take the value of an option
    # of ours for a path of tests: one that exists elsewhere would move the root directory there.
    parser.addini("durations_json", "where to write each test's processor seconds")
    parser.addoption(
        "--strict-durations",
        action="store_true",
        help="fail where a test without the mark `slow` takes too many processor seconds",
    )


def pytest_collection_finish():
    # Half a million objects of the libraries, which stay: not to be looked through again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_configure(config):
    config.pluginmanager.register(ProcessorTime(config))


@pytest.fixture(scope="session", autouse=True)
def tff_runtime():
    """TFF's own local runtime; dropping the context ends its worker process."""
    tff.backends.native.set_sync_local_cpp_execution_context()
    yield
    tff.test.set_no_default_context()


@pytest.fixture(autouse=True)
def initial_weights():
    """The same in each run: Keras draws the seeds of its initializers from Python's `random`."""
    random.seed(0)


@pytest.fixture(autouse=True)
def event_loop():
    """A loop for `tff.simulation`, which asks for the thread's; `asyncio.run` takes it away."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    loop.close()
