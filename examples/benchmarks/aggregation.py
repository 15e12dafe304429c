"""What adaptive aggregation costs, against TFF's own mean.

Two comparisons, both in TFF's worker and with all large values made and kept there:

* one aggregation: `tff.aggregators.MeanFactory` against the adaptive mean, with scores that came
  with the update, with L2 scores taken in the aggregation, and with KL scores against the server's
  model;
* whole rounds: `tff.learning.algorithms.build_weighted_fed_avg` against `build_fed_kl`, with the
  time to build the process and to run its first round.

`rules.py` compares rounds by all rules.

    python examples/benchmarks/aggregation.py --clients 10 100 --parameters 100000 1000000
"""

import argparse
import functools
import os
from collections import OrderedDict
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from timing import table, time_side_by_side

import aggregators
from aggregators import rules, scores, weighting
from tff_optim.interrupts import let_workers_end

FLOAT = tff.to_type(np.float32)


def shapes_of(parameters: int) -> list[tuple[int, ...]]:
    """Three kernels and three biases that make up about as many parameters."""
    width = max(int((parameters / 3) ** 0.5), 2)
    return [(width, width), (width,)] * 3


def make_update(shapes: list[tuple[int, ...]], seed: Any) -> list[tf.Tensor]:
    """Tensors that differ by a thousandth from one seed to the next, as models of one round do."""
    return [
        tf.reshape(tf.range(np.prod(shape), dtype=tf.float32), shape) * (1e-7 + 1e-10 * seed)
        for shape in shapes
    ]


def _factory(score: scores.Score) -> aggregators.RuleFactory:
    return aggregators.RuleFactory(rules.adaptive_mean(score, weighting.softmax()))


def aggregation(kind: str, shapes: list[tuple[int, ...]]) -> Any:
    """A computation from clients' seeds to one number that depends on the whole mean."""
    update_type = tff.to_type([(np.float32, shape) for shape in shapes])
    seeds_type = tff.FederatedType(np.float32, tff.CLIENTS)

    @tff.tensorflow.computation(update_type)
    def digest(mean: Any) -> Any:
        return tf.add_n([tf.reduce_sum(tensor) for tensor in mean])

    @tff.tensorflow.computation
    def server_model() -> Any:
        return make_update(shapes, 1.0)

    @tff.tensorflow.computation(FLOAT)
    def client(seed: Any) -> Any:
        update = make_update(shapes, seed)
        if kind != "scored":
            return update
        measured = OrderedDict(kl_divergence=tf.fill([len(shapes)], seed))
        return aggregators.MeasuredUpdate(update, measured, non_finite=tf.constant(False))

    if kind == "kl":
        rule = rules.adaptive_mean(scores.kl_divergence, weighting.softmax(scale=1e-3))
        start = aggregators.rule_state(rule, update_type)

        @tff.federated_computation(seeds_type)
        def run_kl(seeds: Any) -> Any:
            found = aggregators.federated_rule(
                rule,
                tff.federated_map(client, seeds),
                tff.federated_eval(start, tff.SERVER),
                server_model=tff.federated_eval(server_model, tff.SERVER),
                weight=seeds,
            )
            return tff.federated_map(digest, found.result)

        return run_kl

    factory = {
        "mean": tff.aggregators.MeanFactory,
        "scored": lambda: _factory(scores.kl_divergence),
        "l2": lambda: _factory(scores.l2_distance),
    }[kind]()
    process = factory.create(client.type_signature.result, FLOAT)

    @tff.federated_computation(seeds_type)
    def run(seeds: Any) -> Any:
        output = process.next(process.initialize(), tff.federated_map(client, seeds), seeds)
        return tff.federated_map(digest, output.result)

    return run


def compare_aggregations(clients: list[int], parameters: list[int], repeats: int) -> str:
    """One aggregation: seconds, in brackets divided by `MeanFactory`."""
    kinds = {"scored": "scored by the clients", "l2": "L2 in the stream", "kl": "KL in the stream"}
    rows = []
    for size in parameters:
        runs = {kind: aggregation(kind, shapes_of(size)) for kind in ("mean", *kinds)}
        for number in clients:
            seeds = [1.0 + k for k in range(number)]
            calls = {kind: functools.partial(run, seeds) for kind, run in runs.items()}
            found = time_side_by_side(calls, rounds=repeats, warm_up=1)
            ratios = [f"{found[kind]:.3f} ({found[kind] / found['mean']:.2f})" for kind in kinds]
            rows.append([f"{number}", f"{size:.0e}", f"{found['mean']:.3f}", *ratios])
    return table(["clients", "parameters", "`MeanFactory`", *kinds.values()], rows)


def make_model() -> tff.learning.models.FunctionalModel:
    def keras_model() -> tf.keras.Model:
        return tf.keras.Sequential(
            [
                tf.keras.layers.Dense(500, activation="relu", input_shape=(784,)),
                tf.keras.layers.Dense(10),
            ]
        )

    return tff.learning.models.functional_model_from_keras(
        keras_model,
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        (tf.TensorSpec([None, 784]), tf.TensorSpec([None], tf.int32)),
    )


def make_data(number: int) -> list[tf.data.Dataset]:
    """Clients with 10 batches of 32."""
    rng = np.random.default_rng(0)
    return [
        tf.data.Dataset.from_tensor_slices(
            (np.float32(rng.normal(size=(320, 784))), np.int32(rng.integers(0, 10, 320)))
        ).batch(32)
        for _ in range(number)
    ]


def compare_rounds(number: int, repeats: int) -> str:
    """Whole rounds: seconds, in brackets divided by plain averaging with the same loop."""
    data = make_data(number)
    sgd = tff.learning.optimizers.build_sgdm(0.05)
    plain = tff.learning.algorithms.build_weighted_fed_avg
    builders = {
        (loop, build): functools.partial(build, loop_implementation=loop)
        for loop in tff.learning.LoopImplementation
        for build in (plain, aggregators.build_fed_kl)
    }
    processes = {}

    def first_round(name: Any) -> None:
        process = builders[name](make_model(), sgd)
        processes[name] = process, process.next(process.initialize(), data).state

    def later_round(name: Any) -> None:
        process, state = processes[name]
        process.next(state, data)

    # Not counted: the first build of each, which pays for TensorFlow's own first steps too.
    first, later = (
        time_side_by_side(
            {name: functools.partial(call, name) for name in builders}, rounds=rounds, warm_up=1
        )
        for call, rounds in ((first_round, 2 * repeats), (later_round, 4 * repeats))
    )
    rows = []
    for loop, build in builders:
        mine, reference = (loop, build), (loop, plain)
        ratios = [f"{s[mine]:.3g} ({s[mine] / s[reference]:.2f})" for s in (first, later)]
        rows.append([f"`{loop.name}`", f"`{build.__name__}`", *ratios])
    return table(["loop", "process", "building and first round", "later round"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--parameters", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--round-clients", type=int, default=10)
    arguments = parser.parse_args()
    let_workers_end()  # also in the background of a script
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        print(compare_aggregations(arguments.clients, arguments.parameters, arguments.repeats))
        print()
        print(compare_rounds(arguments.round_clients, arguments.repeats))
    finally:
        tff.test.set_no_default_context()  # ends the worker


if __name__ == "__main__":
    main()
