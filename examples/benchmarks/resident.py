"""ResidentProcess against the plain process: time, memory, checkpoints, in one run.

    python examples/benchmarks/resident.py [--scale 1.0] [--only NAME ...]

prints one table. `--scale 0.01` tries it out in seconds with models a hundred times smaller.
"""

import argparse
import asyncio
import collections
import os
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from timing import time_side_by_side

from tff_optim import ResidentProcess
from tff_optim.interrupts import let_workers_end
from tff_optim.resident import ResidentCheckpoints

ADAM = tff.learning.optimizers.build_adam(1e-3)


class Table:
    """A Markdown table, printed row by row."""

    def __init__(self):
        print("| what | compared with | resident | ratio |\n|---|---|---|---|", flush=True)

    def row(self, what, plain, resident, unit="s"):
        """Prints a row; the ratio says how many times less the resident process takes."""
        print(
            f"| {what} | {plain:.3g} {unit} | {resident:.3g} {unit} | {plain / resident:.1f} |",
            flush=True,
        )


def median_rounds(processes, data, repeats=5):
    """Median seconds of rounds of each process on its data, in turn, each from its own last."""
    states = [process.initialize() for process in processes]
    seconds = [[] for _ in processes]
    for repeat in range(1 + repeats):
        for i, process in enumerate(processes):
            begin = time.perf_counter()
            states[i] = process.next(states[i], data[i]).state
            if repeat:  # the first time compiles, connects, warms up
                seconds[i].append(time.perf_counter() - begin)
    return [statistics.median(s) for s in seconds]


def start_plain():
    tff.test.set_no_default_context()
    before = set(workers())
    let_workers_end()  # also in the background of a script
    tff.backends.native.set_sync_local_cpp_execution_context()
    return before


def workers():
    """Process ids of this process's workers."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as f:
                parent = int(f.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{entry}/comm") as f:
                if parent == os.getpid() and f.read().startswith("worker_binary"):
                    found.append(int(entry))
        except FileNotFoundError:
            continue
    return found


def peak_gigabytes(pid):
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1e6


def weights_of(size):
    @tff.tensorflow.computation
    def initial_weights():
        return tff.learning.models.ModelWeights([tf.ones([size])], [])

    return initial_weights


def server_step_process(size):
    """A process of which a round is one Adam step on the server, and nothing else."""
    initial_weights = weights_of(size)
    weights_type = initial_weights.type_signature.result
    finalizer = tff.learning.templates.build_apply_optimizer_finalizer(ADAM, weights_type)

    @tff.federated_computation
    def initialize():
        return tff.federated_zip(
            collections.OrderedDict(
                weights=tff.federated_eval(initial_weights, tff.SERVER),
                finalizer=finalizer.initialize(),
            )
        )

    state_type = initialize.type_signature.result
    data_type = tff.FederatedType(tff.SequenceType(np.float32), tff.CLIENTS)
    total = tff.tensorflow.computation(
        lambda d: d.reduce(0.0, lambda a, b: a + b), data_type.member
    )
    spread = tff.tensorflow.computation(lambda x: [tf.fill([size], x)], np.float32)

    @tff.federated_computation(state_type, data_type)
    def next_fn(state, data):
        loss = tff.federated_sum(tff.federated_map(total, data))
        output = finalizer.next(state.finalizer, state.weights, tff.federated_map(spread, loss))
        new_state = tff.federated_zip(
            collections.OrderedDict(weights=output.result, finalizer=output.state)
        )
        return tff.learning.templates.LearningProcessOutput(new_state, loss)

    member = state_type.member
    return tff.learning.templates.LearningProcess(
        initialize,
        next_fn,
        tff.tensorflow.computation(lambda s: s["weights"], member),
        tff.tensorflow.computation(
            lambda s, w: collections.OrderedDict(weights=w, finalizer=s["finalizer"]),
            member,
            weights_type,
        ),
    )


def function_step(size):
    """The same step, its check for finite numbers included, in one `tf.function`."""
    weights = [tf.ones([size])]
    state = ADAM.initialize([tf.TensorSpec([size])])

    @tf.function
    def step(state, weights, x):
        update = [tf.fill([size], x)]
        new_state, new_weights = ADAM.next(state, weights, update)
        if not tf.reduce_all(tf.math.is_finite(update[0])):
            return state, weights
        return new_state, new_weights

    current = [state, weights]

    def run():
        current[:] = step(*current, tf.constant(0.5))

    return run


def server_step(table, scale):
    for name, size in (("1e6", 1e6), ("1e7", 1e7)):
        size = int(size * scale)
        process = server_step_process(size)
        data = [tf.data.Dataset.from_tensor_slices([0.25, 0.25])]
        start_plain()
        with ResidentProcess(process) as resident:
            plain, seconds = median_rounds([process, resident], [data] * 2)
            table.row(f"server step, Adam, {name} parameters", plain, seconds)
            state = [resident.initialize()]

            def round_(resident=resident, state=state, data=data):
                state[:] = [resident.next(state[0], data).state]

            times = time_side_by_side({"function": function_step(size), "round": round_}, rounds=15)
        table.row(
            f"server step, against the same in a `tf.function`, {name}",
            times["function"],
            times["round"],
        )


def dense_model(inputs, outputs):
    spec = (tf.TensorSpec([None, inputs]), tf.TensorSpec([None, outputs]))

    def model_fn():
        layers = [
            tf.keras.layers.InputLayer(input_shape=(inputs,)),
            tf.keras.layers.Dense(outputs, use_bias=False, kernel_initializer="zeros"),
        ]
        return tff.learning.models.from_keras_model(
            tf.keras.Sequential(layers), loss=tf.keras.losses.MeanSquaredError(), input_spec=spec
        )

    def client(batches, rows=4):
        x = np.ones([rows, inputs], np.float32)
        y = np.ones([rows, outputs], np.float32)
        return tf.data.Dataset.from_tensors((x, y)).repeat(batches)

    return model_fn, client


def client_work_alone(model_fn):
    """A process that broadcasts and trains, and adds up one number per client."""
    initial_weights = tff.tensorflow.computation(
        lambda: tff.learning.models.ModelWeights.from_model(model_fn())
    )
    weights_type = initial_weights.type_signature.result
    work = tff.learning.templates.build_model_delta_client_work(
        model_fn,
        optimizer=tff.learning.optimizers.build_sgdm(0.01),
        client_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES,
    )

    @tff.federated_computation
    def initialize():
        return tff.federated_eval(initial_weights, tff.SERVER)

    update_type = work.next.type_signature.result.result.member.update
    first = tff.tensorflow.computation(lambda u: tf.reshape(u[0], [-1])[0], update_type)

    @tff.federated_computation(
        initialize.type_signature.result, work.next.type_signature.parameter[2]
    )
    def next_fn(weights, data):
        output = work.next(work.initialize(), tff.federated_broadcast(weights), data)
        total = tff.federated_sum(tff.federated_map(first, output.result.update))
        return tff.learning.templates.LearningProcessOutput(weights, total)

    return tff.learning.templates.LearningProcess(
        initialize,
        next_fn,
        tff.tensorflow.computation(lambda w: w, weights_type),
        tff.tensorflow.computation(lambda w, v: v, weights_type, weights_type),
    )


def fed_avg(model_fn, **options):
    return tff.learning.algorithms.build_weighted_fed_avg(
        model_fn,
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(0.01),
        server_optimizer_fn=ADAM,
        **options,
    )


def fed_avg_round(table, scale):
    model_fn, client = dense_model(int(2500 * scale) or 1, 3000)
    process, work_alone = fed_avg(model_fn), client_work_alone(model_fn)
    data = [client(20) for _ in range(4)]
    start_plain()
    with ResidentProcess(process) as resident, ResidentProcess(work_alone) as resident_work:
        plain, seconds, work = median_rounds([process, resident, resident_work], [data] * 3)
    table.row("FedAvg round, 7.5e6 parameters, 4 clients", plain, seconds)
    table.row("FedAvg round, against the clients' work alone", work, seconds)


def small_rounds(table, scale):
    del scale  # it is small
    model_fn, client = dense_model(64, 10)
    as_it_comes = fed_avg(model_fn)
    iterating = fed_avg(
        model_fn, loop_implementation=tff.learning.LoopImplementation.DATASET_ITERATOR
    )
    as_they_are = tf.data.Options()
    as_they_are.autotune.enabled = False
    as_they_are.experimental_optimization.apply_default_optimizations = False
    for clients in (10, 100):
        data = [client(10)] * clients
        small = [client(10).with_options(as_they_are)] * clients
        start_plain()
        with ResidentProcess(iterating) as resident:
            cases = [(as_it_comes, data), (iterating, small), (resident, small)]
            plain, tuned, seconds = median_rounds(*zip(*cases, strict=True), repeats=9)
        what = f"FedAvg round, 640 parameters, {clients} clients of 10 batches"
        table.row(f"{what}, tuned as above against TFF's defaults", plain, seconds)
        table.row(f"{what}, both tuned", tuned, seconds)


def memory(table, scale):
    model_fn, client = dense_model(1000, int(2000 * scale) or 1)
    process = fed_avg(model_fn)
    data = [client(1, rows=1) for _ in range(400)]
    before = start_plain()
    state = process.initialize()
    begin = time.perf_counter()
    process.next(state, data[:200])
    plain_seconds = time.perf_counter() - begin
    plain = peak_gigabytes((set(workers()) - before).pop())
    tff.test.set_no_default_context()
    for clients in (200, 400):
        before = set(workers())
        with ResidentProcess(process, workers=1, clients_at_once=10) as resident:
            state = resident.initialize()
            begin = time.perf_counter()
            resident.next(state, data[:clients])
            seconds = time.perf_counter() - begin
            peak = peak_gigabytes((set(workers()) - before).pop())
        table.row(
            f"peak memory of a worker, 2e6 parameters, 200 / {clients} clients", plain, peak, "GB"
        )
        if clients == 200:
            table.row("time of that first round, 200 clients", plain_seconds, seconds)


def device_step(table, scale):
    """Adam's step on a device: by XLA and without, against Keras on variables."""
    size = int(1e7 * scale)
    process = server_step_process(size)
    data = [tf.data.Dataset.from_tensor_slices([0.25, 0.25])]

    def in_keras(optimizer):
        weights = tf.Variable(tf.ones([size]))

        @tf.function
        def step(x):
            optimizer.apply_gradients([(tf.fill([size], x), weights)])

        return lambda: step(tf.constant(0.5))

    def in_place(**options):
        resident = ResidentProcess(process, device="CPU:0", **options)
        state = [resident.initialize()]

        def run():
            state[:] = [resident.next(state[0], data).state]

        return run

    times = time_side_by_side(
        {
            "legacy Keras, fused": in_keras(tf.keras.optimizers.legacy.Adam(1e-3)),
            "Keras": in_keras(tf.keras.optimizers.Adam(1e-3)),
            "a `tf.function`": function_step(size),
            "by XLA": in_place(),
            "without XLA": in_place(compile_step=False),
        },
        rounds=15,
    )
    for name in list(times)[:3]:
        table.row(
            f"server step on a device, Adam, 1e7, against {name}", times[name], times["by XLA"]
        )
    table.row("the same, without XLA and with it", times["without XLA"], times["by XLA"])


def memory_on_a_device(table, scale):
    """The peak of a process of its own, for cohorts of two sizes."""
    peaks = {}
    for clients in (200, 400):
        arguments = ["--peak-of", str(clients), "--scale", str(scale)]
        found = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
        )
        peaks[clients] = float(found.stdout.split()[-1])
    table.row("peak memory on a device, 2e6, 200 / 400 clients", peaks[200], peaks[400], "GB")


def one_round_on_a_device(clients, scale):
    model_fn, client = dense_model(1000, int(2000 * scale) or 1)
    with ResidentProcess(fed_avg(model_fn), device="CPU:0") as resident:
        resident.next(resident.initialize(), [client(1, rows=1) for _ in range(clients)])
    print(peak_gigabytes("self"))


def clients_in_a_worker(table, scale):
    size = int(1e7 * scale)
    initial_weights = weights_of(size)
    weights_type = initial_weights.type_signature.result
    data_type = tff.SequenceType(np.float32)

    @tff.tensorflow.computation(weights_type, data_type)
    def train(weights, data):
        del weights  # the clients' part is as small as it can be
        update = [tf.fill([size], data.reduce(0.0, lambda a, b: a + b))]
        return tff.learning.templates.ClientResult(update, tf.constant(1.0))

    @tff.federated_computation
    def nothing():
        return tff.federated_value((), tff.SERVER)

    @tff.federated_computation(
        nothing.type_signature.result,
        tff.FederatedType(weights_type, tff.CLIENTS),
        tff.FederatedType(data_type, tff.CLIENTS),
    )
    def work(state, weights, data):
        result = tff.federated_map(train, (weights, data))
        return tff.templates.MeasuredProcessOutput(state, result, nothing())

    parts = (
        initial_weights,
        tff.learning.templates.build_broadcast_process(weights_type),
        tff.learning.templates.ClientWorkProcess(nothing, work),
        tff.aggregators.MeanFactory().create(weights_type.trainable, tff.TensorType(np.float32)),
    )
    process = tff.learning.templates.compose_learning_process(
        *parts, tff.learning.templates.build_apply_optimizer_finalizer(ADAM, weights_type)
    )
    data = [tf.data.Dataset.from_tensor_slices([0.25, 0.25])]
    start_plain()
    device = "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"
    with (
        ResidentProcess(process, device=device, workers=1) as with_worker,
        ResidentProcess(process, device=device) as whole,
    ):
        # Not in turn: while plain TFF takes its seconds, a virtual machine may give back the shared
        # memory's pages to its host, and get them again slowly.
        plain, worker_seconds, seconds = (
            median_rounds([p], [data], 9)[0] for p in (process, with_worker, whole)
        )
    table.row(f"round of 1e7 parameters, clients in a worker, {device}", plain, worker_seconds)
    table.row(f"all of that round on {device}", plain, seconds)


def checkpoints(table, scale):
    process = server_step_process(int(1e7 * scale))
    with ResidentProcess(process) as resident, tempfile.TemporaryDirectory(dir=".") as directory:
        state, _ = resident.next(
            resident.initialize(), [tf.data.Dataset.from_tensor_slices([0.25, 0.25])]
        )
        plain_state = resident.materialize(state)
        ours = ResidentCheckpoints(resident, os.path.join(directory, "resident"))
        theirs = tff.program.FileProgramStateManager(os.path.join(directory, "plain"))
        versions = iter(range(1000))

        def load_theirs():
            last = asyncio.run(theirs.get_versions())[-1]
            return asyncio.run(theirs.load(last, plain_state))

        steps = {
            "theirs, save": lambda: asyncio.run(theirs.save(state, next(versions))),
            "ours, save": lambda: ours.save_now(state, next(versions)),
            "theirs, restore": lambda: resident.restore(load_theirs()),
            "ours, restore": lambda: ours.load_now(ours.versions()[-1]),
            "python, save": lambda: asyncio.run(theirs.save(plain_state, next(versions))),
            "python, restore": load_theirs,
        }
        times = time_side_by_side(steps, rounds=5, warm_up=1)
    rows = [
        (
            f"{what} a checkpoint, 1e7 parameters with Adam",
            times[f"theirs, {verb}"],
            times[f"ours, {verb}"],
        )
        for what, verb in (("saving", "save"), ("restoring", "restore"))
    ]
    python_only = times["python, save"] + times["python, restore"]
    for what, plain, seconds in rows:
        table.row(what, plain, seconds)
    both = sum(row[2] for row in rows)
    table.row("both", sum(row[1] for row in rows), both)
    table.row("both, against a plain state that is in Python already", python_only, both)


def start_up(table, scale):
    del scale
    process = server_step_process(100)
    seconds = []
    for _ in range(2):  # the first time compiles for both
        begin = time.perf_counter()
        start_plain()
        process.initialize()
        plain = time.perf_counter() - begin
        begin = time.perf_counter()
        with ResidentProcess(process) as resident:
            resident.initialize()
            seconds.append(time.perf_counter() - begin)
    table.row("start-up to the first state", plain, seconds[-1])


BENCHMARKS = (
    server_step,
    fed_avg_round,
    small_rounds,
    memory,
    device_step,
    memory_on_a_device,
    clients_in_a_worker,
    checkpoints,
    start_up,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the models' sizes")
    names = [benchmark.__name__ for benchmark in BENCHMARKS]
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tff.test.set_no_default_context()
    if arguments.peak_of:
        one_round_on_a_device(arguments.peak_of, arguments.scale)
        return
    table = Table()
    try:
        for benchmark in BENCHMARKS:
            if benchmark.__name__ in arguments.only:
                benchmark(table, arguments.scale)
    finally:
        tff.test.set_no_default_context()


if __name__ == "__main__":
    main()
