"""What adaptive aggregation costs, against TFF's own mean.

Three comparisons, all in TFF's worker and with all large values made and kept there:

* one aggregation: `tff.aggregators.MeanFactory` against the adaptive mean, with scores that came
  with the update, with L2 scores taken in the aggregation, and with KL scores against the server's
  model;
* whole rounds: `tff.learning.algorithms.build_weighted_fed_avg` against `build_fed_kl`, with the
  time to build the process and to run its first round;
* later rounds of `build_fed_avg` by rules that need more of their clients, against the plain mean,
  and against it with two models scored before training.

    python examples/benchmarks/aggregation.py --clients 10 100 --parameters 100000 1000000
"""

import argparse
import functools
import os
from collections import OrderedDict
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from timing import time_side_by_side

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


def compare_aggregations(clients: list[int], parameters: list[int], repeats: int) -> None:
    print("One aggregation: seconds, and times tff.aggregators.MeanFactory")
    print(f"{'clients':>8} {'parameters':>11} {'mean':>8} {'scored':>15} {'l2':>15} {'kl':>15}")
    for size in parameters:
        runs = {kind: aggregation(kind, shapes_of(size)) for kind in ("mean", "scored", "l2", "kl")}
        for number in clients:
            seeds = [1.0 + k for k in range(number)]
            calls = {kind: functools.partial(run, seeds) for kind, run in runs.items()}
            found = time_side_by_side(calls, rounds=repeats, warm_up=1)
            row = "".join(
                f"{found[kind]:>9.3f} {found[kind] / found['mean']:>4.2f}x"
                for kind in ("scored", "l2", "kl")
            )
            print(f"{number:>8} {size:>11} {found['mean']:>8.3f} {row}", flush=True)


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


def compare_rounds(number: int, repeats: int) -> None:
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
    print(f"\nWhole rounds: {number} clients, 10 batches of 32, 397510 parameters; seconds")
    print(f"{'loop':>16} {'':>24} {'build + first round':>24} {'later round':>20}")
    for loop, build in builders:
        mine, reference = (loop, build), (loop, plain)
        print(
            f"{loop.name:>16} {build.__name__:>24} "
            f"{first[mine]:>16.2f} {first[mine] / first[reference]:>6.2f}x "
            f"{later[mine]:>12.3f} {later[mine] / later[reference]:>6.2f}x"
        )


def with_two_models_scored() -> aggregators.Rule:
    """The plain mean of clients that score two models before they train."""
    plain = rules.plain_mean()
    # Two different ones: of two passes over one model TensorFlow makes one.
    scored = aggregators.Candidates(lambda weights, state: [weights, [0.5 * w for w in weights]], 2)
    return attrs.evolve(plain, needs=aggregators.Needs(layers="model", candidates=scored))


def compare_rules(number: int, repeats: int) -> None:
    """Later rounds with the same loop, by rule."""
    data = make_data(number)
    sgd = tff.learning.optimizers.build_sgdm(0.05)
    chosen = {
        "plain_mean": rules.plain_mean(),
        "redescending_mean": rules.redescending_mean(),
        "jury_mean, direction": rules.jury_mean(votes="direction"),
        "plain_mean, two models scored": with_two_models_scored(),
        "jury_mean": rules.jury_mean(),
    }
    processes = {}
    for name, rule in chosen.items():
        process = aggregators.build_fed_avg(make_model(), sgd, rule=rule)
        processes[name] = process, process.next(process.initialize(), data).state

    def later_round(name: str) -> None:
        process, state = processes[name]
        process.next(state, data)

    calls = {name: functools.partial(later_round, name) for name in chosen}
    later = time_side_by_side(calls, rounds=4 * repeats, warm_up=1)
    print(f"\nRules: {number} clients, as above; seconds, and times plain_mean")
    for name in chosen:
        print(f"{name:>32} {later[name]:>8.3f} {later[name] / later['plain_mean']:>6.2f}x")


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
        compare_aggregations(arguments.clients, arguments.parameters, arguments.repeats)
        compare_rounds(arguments.round_clients, arguments.repeats)
        compare_rules(arguments.round_clients, arguments.repeats)
    finally:
        tff.test.set_no_default_context()  # ends the worker


if __name__ == "__main__":
    main()
