"""What it takes to read clients' data: data sets, arrays, and clients side by side.

A round of 100 clients of 10 batches of 20, a network of 2,410 numbers, in TensorFlow of the Python
process. Figures are processor milliseconds of all threads, medians over rounds in which all ways take
turns.

    python examples/benchmarks/reading.py [--rounds 15]

With `--hidden 32 133 333 667 1333 2667`, the same clients in arrays, one by one and side by side, for
networks of hidden layers of these sizes.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf
import tensorflow_federated as tff
from resident_places import TASKS, arrays, fed_avg, in_arrays, keras_model, rounds_of
from timing import table, time_side_by_side

from tff_optim import ResidentProcess

TASK = TASKS["A"]


def data_sets(*, known=True, mapped=""):
    """The clients' data sets, of a known number of elements or not, with a `map` or without."""
    made = []
    for one in arrays(TASK):
        data = tf.data.Dataset.from_tensor_slices(one)
        if mapped == "before":
            data = data.map(lambda x, y: (x * 1.0, y))
        data = data.batch(TASK.rows)
        if mapped == "behind":
            data = data.map(lambda x, y: (x * 1.0, y))
        made.append(data if known else data.filter(lambda x, y: True))
    return made


def layers_of(hidden):
    return lambda: [tf.keras.layers.Dense(hidden, "relu"), tf.keras.layers.Dense(10)]


def by_size(hidden, rounds):
    """A row for each size of the hidden layer: one by one, side by side, and their quotient."""
    for size in hidden:
        task = TASK._replace(layers=layers_of(size))
        clients, process = in_arrays(task), fed_avg(task)
        places = [ResidentProcess(process, device="CPU:0", vectorize=v) for v in (False, True)]
        runs = {i: rounds_of(place, clients) for i, place in enumerate(places)}
        one, side = time_side_by_side(runs, rounds=rounds, clock=time.process_time).values()
        for place in places:
            place.close()
        numbers = sum(w.size for w in keras_model(task).get_weights())
        yield [f"{numbers:,}", f"{1e3 * one:.0f}", f"{1e3 * side:.0f}", f"{side / one:.2f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, nargs="+")
    options = parser.parse_args()
    if options.hidden:
        headers = ["numbers", "ms one by one", "ms side by side", "divided by one by one"]
        print(table(headers, list(by_size(options.hidden, options.rounds))))
        tff.test.set_no_default_context()  # ends the worker, if there is one
        return
    one_by_one, side_by_side = (
        ResidentProcess(fed_avg(TASK), device="CPU:0", vectorize=vectorize)
        for vectorize in (False, True)
    )
    with one_by_one, side_by_side:
        ways = {
            "read one batch after another": data_sets(known=False),
            "in one go, with a `map` in front of `batch`": data_sets(mapped="before"),
            "in one go, with a `map` behind it": data_sets(mapped="behind"),
            "rows of tensors": data_sets(),
            "`ClientArrays`": in_arrays(TASK),
        }
        runs = {name: rounds_of(one_by_one, clients) for name, clients in ways.items()}
        for name in list(ways)[-3:]:
            runs[f"side by side, {name}"] = rounds_of(side_by_side, ways[name])
        found = time_side_by_side(runs, rounds=options.rounds, warm_up=2, clock=time.process_time)
    tff.test.set_no_default_context()  # ends the worker, if there is one
    yardstick = found["read one batch after another"]
    rows = [[name, f"{1e3 * s:.0f}", f"{s / yardstick:.2f}"] for name, s in found.items()]
    print(table(["clients' data", "ms of a round", "divided by the first"], rows))


if __name__ == "__main__":
    main()
