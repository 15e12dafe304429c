"""What fingerprints are taken of: every algorithm, as two programs build it."""

import test_resident_algorithms
from problems import model_fn
from test_resident_algorithms import OF_TFF, OURS

import aggregators
from tff_optim.resident.graphs import fingerprints

ALGORITHMS = [*OF_TFF, *OURS, "build_scaffold"]


def build(name):
    if name == "build_scaffold":
        sgd = test_resident_algorithms.SGD
        return aggregators.build_scaffold(model_fn, sgd, num_clients=3)
    return test_resident_algorithms.build(name)


def of_process(process):
    return {
        name: fingerprints.of_computation(
            getattr(process, name), without=process.get_model_weights.type_signature.result
        )
        for name in ("initialize", "next", "get_model_weights", "get_hparams", "set_hparams")
    }


def found_of(name):
    return of_process(build(name))
