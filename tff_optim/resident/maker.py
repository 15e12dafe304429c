"""Where a state comes from: the server's step, and the package versions that it was built with."""

import importlib.metadata
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident import leaves, parts
from tff_optim.resident.graphs import fingerprints


def fingerprint(next_computation: Any) -> str:
    """Returns a text that is equal for processes whose server takes the same kind of step.

    It is a hash of the operations that compute the new state, without clients and metrics. Constants do
    not count, since another learning rate is the same optimizer. Adam and Yogi, whose states have equal
    names and shapes, have different fingerprints.
    """
    update = parts.cut(next_computation).update
    count = len(leaves.leaves_of(update.type_signature.result[0]))
    return fingerprints.of_results(update, range(count), constants=False)


def versions() -> dict[str, str]:
    """The versions of the packages that decide which operations a process has, by package."""
    try:
        mine = importlib.metadata.version("tff-optim")
    except importlib.metadata.PackageNotFoundError:  # run from a folder
        mine = "not installed"
    return {
        "tensorflow": tf.__version__,
        "tensorflow_federated": tff.__version__,
        "tff_optim": mine,
    }
