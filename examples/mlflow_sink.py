"""Sends what each round shows to an MLflow server, by its own interface of HTTP: no package needed.

    mlflow server &
    python examples/mlflow_sink.py [ROUNDS [URL]]

For Weights & Biases the manager is shorter: `self._run = wandb.init(name=name)` in the beginning and
`self._run.log(numbers, step=key)` in `release`.
"""

import json
import sys
import time
import urllib.request
from collections import OrderedDict

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim import simulation


class MLflow(tff.program.ReleaseManager):
    """A run of an experiment at a server."""

    def __init__(self, url, name, seed):
        self._url, now = url, int(1000 * time.time())
        run = {"experiment_id": "0", "run_name": f"{name}, seed {seed}", "start_time": now}
        self._id = self._post("runs/create", run)["run"]["info"]["run_id"]

    async def release(self, value, key):
        """Sends the numbers of a round; texts and what is not a number are left out."""
        numbers = {k: float(v) for k, v in value.items() if isinstance(v, int | float) and v == v}
        now = int(1000 * time.time())
        metrics = [
            {"key": k, "value": v, "step": key, "timestamp": now} for k, v in numbers.items()
        ]
        for first in range(0, len(metrics), 1000):  # the server takes no more at once
            self._post("runs/log-batch", {"run_id": self._id, "metrics": metrics[first:][:1000]})

    def _post(self, what, body):
        url, data = f"{self._url}/api/2.0/mlflow/{what}", json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


def main(rounds="5", url="http://127.0.0.1:5000"):
    """Trains, sends, and returns the history."""
    model = tff.learning.models.functional_model_from_keras(
        tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))]),
        tf.keras.losses.MeanSquaredError(),
        (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
        lambda: OrderedDict(error=tf.keras.metrics.MeanSquaredError()),
    )
    sgd = tff.learning.optimizers.build_sgdm(0.1)
    data = tf.data.Dataset.from_tensors(([[1.0, 2.0]], [[3.0]]))
    return simulation.run(
        {"FedAvg": tff.learning.algorithms.build_weighted_fed_avg(model, sgd)},
        {"ann": data, "bob": data, "eve": data},
        rounds=int(rounds),
        clients_per_round=2,
        seed=[0, 1],
        managers=lambda name, seed: [MLflow(url, name, seed)],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
