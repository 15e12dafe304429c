"""A small study, for the first version of the packages (commit 7c45486) as for those of today.

    python tests/old_runs/study.py DIRECTORY

The folders beside this file are what the first version had written when round 6 of 8 began, in the
Python process and in plain TFF, and `undisturbed.csv` is what the same runs had shown in the end.
"""

import contextlib
import pathlib
import shutil
import sys

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
import tff_optim
from tff_optim import simulation


def model_fn(units=2):
    layers = [
        tf.keras.layers.Dense(n, kernel_initializer=tf.keras.initializers.GlorotUniform(seed=n))
        for n in (units, 1)
    ]
    return tff.learning.models.from_keras_model(
        tf.keras.Sequential([tf.keras.layers.InputLayer(input_shape=(3,)), *layers]),
        loss=tf.keras.losses.MeanSquaredError(),
        input_spec=(tf.TensorSpec([None, 3]), tf.TensorSpec([None, 1])),
    )


def clients(count=6):
    rng, found = np.random.default_rng(0), {}
    for k in range(count):
        x = np.float32(rng.normal(size=(12, 3)))
        y = x @ np.float32([[1], [-2], [0.5]]) * (-1 if k == 0 else 1)
        found[f"client {k}"] = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    return found


def process(units=2):
    return aggregators.build_fed_avg(
        lambda: model_fn(units),
        tff_optim.build_keras_optimizer(tf.keras.optimizers.SGD(0.05)),
        tff_optim.build_keras_optimizer(tf.keras.optimizers.Adam(0.05)),
        rule=aggregators.rules.loss_gated(),
    )


def evaluate(weights):
    return {"norm": float(tf.linalg.global_norm(weights.trainable))}


def run(made, directory, **changed):
    arguments = {
        "rounds": 8,
        "clients_per_round": 3,
        "seed": 1,
        "evaluate": evaluate,
        "rounds_per_evaluation": 3,
        "rounds_per_checkpoint": 2,
        "progress": False,
    }
    arguments.update({"clients": clients(), **changed})
    return simulation.run(made, arguments.pop("clients"), directory=str(directory), **arguments)


class AsItIs(tff.program.ReleaseManager):
    """Copies a folder once a round has ended: what a kill would leave."""

    def __init__(self, number, source, target):
        self._number, self._source, self._target = number, source, target

    async def release(self, value, key=None):
        if key == self._number:
            ignored = shutil.ignore_patterns("tensorboard", ".lock")
            shutil.copytree(self._source, self._target, ignore=ignored)


def main(directory):
    tff.backends.native.set_sync_local_cpp_execution_context()
    root = pathlib.Path(directory)
    try:
        with tff_optim.ResidentProcess(process(), device="CPU:0") as resident:
            for name, made in (("resident", resident), ("plain", process())):
                copied = AsItIs(5, root / f"{name} whole", root / name)
                run(made, root / f"{name} whole", managers=[copied])
    finally:
        tff.test.set_no_default_context()
    shutil.copy(root / "resident whole" / "rounds.csv", root / "undisturbed.csv")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
