"""Every task of `tff.simulation.baselines`, with synthetic data; one line switches to the real ones.

    python examples/baselines.py [TASK [ROUNDS]]

Without a name all tasks run, one after the other. The network of `landmark` is MobileNetV2: to build it
and to run its first round takes a minute of CPU, even with three synthetic images. TFF downloads real
data (up to tens of gigabytes) into `~/.keras`, or into the `cache_dir` that you give to a task.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
import tensorflow_federated as tff

import aggregators
from tff_optim import ResidentProcess, build_keras_optimizer, simulation

SYNTHETIC = True  # False: the real data

baselines = tff.simulation.baselines
TASKS = {
    "cifar100": baselines.cifar100.create_image_classification_task,
    "emnist": baselines.emnist.create_character_recognition_task,
    "emnist_autoencoder": baselines.emnist.create_autoencoder_task,
    "landmark": baselines.landmark.create_landmark_classification_task,
    "shakespeare": baselines.shakespeare.create_character_prediction_task,
    "stackoverflow_tags": baselines.stackoverflow.create_tag_prediction_task,
    "stackoverflow_words": baselines.stackoverflow.create_word_prediction_task,
}


def main(name: str = "", rounds: str = "3"):
    """Trains on one task, or on all; returns the histories by task."""
    histories = {}
    for task_name in [name] if name else TASKS:
        clients = baselines.ClientSpec(num_epochs=1, batch_size=10, max_elements=100)
        task = TASKS[task_name](clients, use_synthetic_data=SYNTHETIC)
        data = task.datasets.train_data.preprocess(task.datasets.train_preprocess_fn)
        process = aggregators.build_fed_avg(
            task.model_fn,
            build_keras_optimizer(tf.keras.optimizers.SGD(0.01)),
            build_keras_optimizer(tf.keras.optimizers.Adam(0.001)),
            rule=aggregators.rules.redescending_mean(),
        )
        with ResidentProcess(process) as resident:
            histories[task_name] = simulation.run(
                resident,
                data,
                rounds=int(rounds),
                clients_per_round=min(10, len(data.client_ids)),
            )
        loss = histories[task_name].rounds["client_work/train/loss"]
        print(f"{task_name}: loss {loss[0]:.3f} to {loss[-1]:.3f}")
    return histories


if __name__ == "__main__":
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main(*sys.argv[1:])
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
