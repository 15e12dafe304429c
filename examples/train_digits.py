"""Trains a classifier of handwritten digits on clients that differ, some of them with random labels.

Plain federated averaging weighs clients by their number of examples. KL weighting trusts clients
whose layers moved little. The redescending mean shrinks updates that are much too long. The jury mean
goes from there towards the mean of clients with a low training loss, as far as clients' votes on it
say. Which one helps depends on the data: try --concentration, --random-labels and --seeds.
"""

import digits
import matplotlib

matplotlib.use("Agg")  # draws into a file, with or without a screen

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import tff_optim
from aggregators import build_fed_avg, build_fed_kl, rules
from tff_optim import simulation
from tff_optim.interrupts import let_workers_end

OPTIONS = [
    ("clients", 20, 1, "clients that share the data"),
    ("clients-per-round", 10, 1, "clients in each round"),
    ("random-labels", 8, 0, "clients with random labels"),
    ("concentration", 1.0, 0.001, "of the split: the smaller, the fewer digits a client has"),
    ("rounds", 40, 1, "rounds of training"),
    ("epochs", 2, 1, "passes over a client's data in a round"),
    ("client-rate", 0.1, 1e-9, "learning rate of SGD"),
    ("server-rate", 0.01, 1e-9, "learning rate of Adam"),
    ("temperature", 1.0, 1e-9, "of KL weighting: the smaller, the more weights differ"),
    ("target", 0.85, 0.0, "test accuracy to reach"),
    ("seeds", 1, 1, "runs of each rule, each with a split, labels and cohorts of its own"),
]


def build_processes(options) -> dict[str, tff.learning.templates.LearningProcess]:
    """Federated averaging by four rules, with Keras optimizers on both sides."""
    client = tff_optim.build_keras_optimizer(tf.keras.optimizers.SGD(options.client_rate))
    server = tff_optim.build_keras_optimizer(tf.keras.optimizers.Adam(options.server_rate))
    both, build = (client, server), digits.build_model
    # TFF's default, a reduction of the dataset, takes twice as long for a model as small as this.
    loop = tff.learning.LoopImplementation.DATASET_ITERATOR
    return {
        "FedAvg": tff.learning.algorithms.build_weighted_fed_avg(
            build(), *both, loop_implementation=loop
        ),
        "KL, near": build_fed_kl(build(), *both, temperature=options.temperature),
        "redescending": build_fed_avg(build(), *both, rule=rules.redescending_mean()),
        "jury": build_fed_avg(build(), *both, rule=rules.jury_mean()),
    }


def print_table(history: simulation.History, options) -> None:
    """A line for each rule: of the mean over seeds, which is what is drawn, too."""
    print(f"rule          test accuracy  rounds to {options.target:.0%}  seconds per round")
    for name in dict.fromkeys(process for process, _ in history.ended):
        runs = [history.only(name, seed).rounds for seed in range(options.seeds)]
        curve = np.mean([run["evaluation/accuracy"][1:] for run in runs], axis=0)
        reached = (
            (np.argmax(curve >= options.target) + 1) if max(curve) >= options.target else "never"
        )
        seconds = np.median([run["training_time_in_seconds"][1:] for run in runs])
        print(f"{name:12}  {np.mean(curve[-5:]):13.3f}  {reached:>13}  {seconds:17.2f}")
    print("Test accuracy is the mean of the last five rounds.")


def main(arguments: list[str] | None = None) -> None:
    """Trains with every rule, prints the table and draws the curves."""
    options = digits.parse_arguments(__doc__, OPTIONS, "output/digits.png", arguments)
    history = simulation.run(
        build_processes(options),
        lambda seed: digits.make_clients(options, seed),
        rounds=options.rounds,
        clients_per_round=options.clients_per_round,
        seed=range(options.seeds),
        evaluate=digits.evaluate,
        runs_at_once=1,  # rounds are timed
    )
    print_table(history, options)
    metric = "evaluation/accuracy"
    digits.save(simulation.plots.learning_curves(history, metric, target=options.target), options)


if __name__ == "__main__":
    let_workers_end()  # also in the background of a script
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        main()
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
