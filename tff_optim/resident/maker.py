"""What made a state: the step that the server takes, and the versions that it was built with."""

import importlib.metadata
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident import leaves, parts
from tff_optim.resident.graphs import fingerprints


def fingerprint(next_computation: Any) -> str | None:
    """Returns a text that is equal for processes whose server takes the same kind of step.

    It is made of the operations that the new state is computed with. Constants do not count:
    another learning rate is the same optimizer; nor do clients and metrics. States of Adam and of
    Yogi, equal in all names and shapes, differ in it. None for a process without a MapReduce form,
    whose server's half cannot be told from the clients'.
    """
    try:
        update = parts.cut(next_computation).update
    except parts.NoMapReduceFormError:
        return None
    count = len(leaves.leaves_of(update.type_signature.result[0]))
    return fingerprints.of_results(update, range(count), constants=False)


def versions() -> dict[str, str]:
    """The versions that decide which operations a process is made of, by package."""
    try:
        mine = importlib.metadata.version("tff-optim")
    except importlib.metadata.PackageNotFoundError:  # run from a folder
        mine = "not installed"
    return {
        "tensorflow": tf.__version__,
        "tensorflow_federated": tff.__version__,
        "tff_optim": mine,
    }
