"""A process on a device of the Python process, wholly or its server alone, against plain TFF."""

import asyncio
import copy
import gc
import pickle

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from resident_cases import (
    assert_close,
    assert_equal,
    cohort,
    cohorts,
    hosts_of,
    model_fn,
    plain_run,
    process,
)

from tff_optim import DevicePolicy, ResidentProcess
from tff_optim.resident import ResidentCheckpoints

# Where a process may run; the first is the truth of the others.
PLACES = {
    "worker": {},
    "device": {"device": "CPU:1", "clients_per_step": 2},
    "server": {"server_device": "CPU:1", "clients_per_step": 2},
}
ON_DEVICES = ["device", "server"]


@pytest.fixture(scope="module")
def places():
    made = {name: ResidentProcess(process(), **PLACES[name]) for name in PLACES}
    yield made
    for resident in made.values():
        resident.close()


@pytest.fixture(params=ON_DEVICES)
def on_device(request, places):
    return places[request.param]


def test_rounds_give_the_numbers_and_metrics_of_the_plain_process(on_device):
    state = on_device.initialize()
    assert_equal(on_device.materialize(state), plain_run()[0][0])
    for clients, (plain_state, plain_metrics) in zip(cohorts(), plain_run()[1:], strict=True):
        output = on_device.next(state, list(clients))
        assert isinstance(output, tff.learning.templates.LearningProcessOutput)
        state, metrics = output
        assert_close(metrics, plain_metrics)
        assert_close(on_device.materialize(state), plain_state)
    assert_close(on_device.get_model_weights(state), plain_run()[-1][0].global_model_weights)


def test_the_state_is_on_the_device(on_device):
    state, _ = on_device.next(on_device.initialize(), list(cohorts()[0]))
    variables = tf.nest.flatten(state)[0].held.variables
    assert len(variables) == len(tf.nest.flatten(state))
    assert {v.device.rpartition(":")[2] for v in variables} == {"1"}
    assert "CPU:1" in repr(tf.nest.flatten(state)[0])
    assert "CPU:1" in repr(on_device)
