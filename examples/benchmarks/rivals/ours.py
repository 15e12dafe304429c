"""The same rounds here: `python ours.py plain|device|arrays|side_by_side|both|worker`."""

import importlib.metadata
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import resident_places
import tensorflow as tf
import tensorflow_federated as tff
from tasks import SERVER_RATES, main

from tff_optim import ResidentProcess

PLACES = {
    "plain": "plain TFF",
    "device": "`ResidentProcess`, on the CPU",
    "arrays": "`ResidentProcess`, on the CPU, `ClientArrays`",
    "side_by_side": "`ResidentProcess`, on the CPU, `vectorize=True`",
    "both": "`ResidentProcess`, on the CPU, `ClientArrays`, `vectorize=True`",
    "worker": "`ResidentProcess`, `workers=1`",
}
PLACE = sys.argv.pop(1) if len(sys.argv) > 1 else ""


def simulate(task, clients, start, server, rounds, round_done):
    del clients  # the same numbers, in data sets
    clients = resident_places.cohort(resident_places.TASKS[task.name])
    loop = None
    if PLACE in ("arrays", "both"):
        clients = resident_places.in_arrays(resident_places.TASKS[task.name])
    if PLACE == "worker":  # as in `resident_places.py`
        loop = tff.learning.LoopImplementation.DATASET_ITERATOR
        clients = [client.with_options(resident_places.as_they_are()) for client in clients]
    optimizer = {
        "adam": tff.learning.optimizers.build_adam,
        "sgd": tff.learning.optimizers.build_sgdm,
    }[server](SERVER_RATES[server])
    process = resident_places.fed_avg(resident_places.TASKS[task.name], loop, optimizer)
    if PLACE == "plain":
        tff.backends.native.set_sync_local_cpp_execution_context()
    else:
        workers, vectorize = 1 if PLACE == "worker" else None, PLACE in ("side_by_side", "both")
        process = ResidentProcess(process, device="CPU:0", workers=workers, vectorize=vectorize)
    try:
        weights = tff.learning.models.ModelWeights(start, ())
        state = process.set_model_weights(process.initialize(), weights)
        for _ in range(rounds):
            state = process.next(state, clients).state
            round_done()
        found = process.get_model_weights(state).trainable
        return [tf.convert_to_tensor(weight).numpy() for weight in found]
    finally:
        if PLACE != "plain":
            process.close()
        tff.test.set_no_default_context()


if __name__ == "__main__":
    if PLACE not in PLACES:
        sys.exit(f"{__doc__}\nFound {PLACE!r}.")
    package = "tensorflow-federated" if PLACE == "plain" else "tff-optim"
    tasks = "ACLK" if PLACE in ("side_by_side", "both") else "ABCLK"  # no convolutions
    main(PLACES[PLACE], importlib.metadata.version(package), simulate, tasks=tasks)
