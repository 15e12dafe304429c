"""SCAFFOLD, FedDyn, FedProx and FedAvg on digits whose clients differ much, over several seeds.

Each client has few digits (Dirichlet 0.1), trains for long, and seldom takes part: what drags plain
averaging away from the optimum. Draws the test accuracy of each, the mean over seeds with the
range that they span, and prints the accuracy late in training.

    python examples/drifting_clients.py --rounds 60 --output output/drifting_clients.png
"""

import contextlib

import digits
import matplotlib

matplotlib.use("Agg")  # draws into a file, with or without a screen

import numpy as np
import tensorflow_federated as tff

import tff_optim
from aggregators import ClientStates, build_fed_avg, build_scaffold, rules
from tff_optim import ResidentProcess, simulation

OPTIONS = [
    ("seeds", 5, 1, "runs of each algorithm, each with a split and cohorts of its own"),
    ("rounds", 60, 1, "rounds of training"),
    ("clients", 20, 1, "clients that share the data"),
    ("clients-per-round", 5, 1, "clients in each round"),
    ("random-labels", 0, 0, "clients with random labels"),
    ("concentration", 0.1, 0.001, "of the split: the smaller, the fewer digits a client has"),
    ("epochs", 5, 1, "passes over a client's data in a round"),
    ("rate", 0.1, 1e-9, "learning rate of clients"),
]


def build_processes(options) -> dict[str, tff.learning.templates.LearningProcess]:
    """The four algorithms, each built once for all seeds."""
    uniform = {"client_weighting": tff.learning.ClientWeighting.UNIFORM}
    sgd = tff.learning.optimizers.build_sgdm(options.rate)
    pull = tff_optim.regularizers.FedProx(0.1)
    prox = tff_optim.build_optimizer(options.rate, regularizers=[pull])
    dyn = rules.fed_dyn(options.clients, 0.1)
    return {
        "FedAvg": build_fed_avg(digits.build_model(), sgd, **uniform),
        "FedProx": build_fed_avg(digits.build_model(), prox, **uniform),
        "SCAFFOLD": build_scaffold(digits.build_model(), sgd, num_clients=options.clients),
        "FedDyn": build_fed_avg(digits.build_model(), sgd, rule=dyn, **uniform),
    }


def main(arguments: list[str] | None = None) -> None:
    """Trains all, prints a line for each, and draws the picture."""
    options = digits.parse_arguments(__doc__, OPTIONS, "output/drifting_clients.png", arguments)
    with contextlib.ExitStack() as stack:
        history = simulation.run(
            {
                name: stack.enter_context(ResidentProcess(process, device="CPU:0"))
                for name, process in build_processes(options).items()
            },
            lambda seed: digits.make_clients(options, seed),
            rounds=options.rounds,
            clients_per_round=options.clients_per_round,
            seed=range(options.seeds),
            evaluate=digits.evaluate,
            client_states=ClientStates,  # of SCAFFOLD and FedDyn, by client id
        )
    late = max(options.rounds // 4, 1)
    print(f"Test accuracy over the last {late} rounds, over seeds:")
    print("| algorithm | mean | least | most |\n|---|---|---|---|")
    for name in dict.fromkeys(process for process, _ in history.ended):
        runs = [history.only(name, seed).rounds for seed in range(options.seeds)]
        ends = [run["evaluation/accuracy"][-late:].mean() for run in runs]
        print(f"| {name} | {np.mean(ends):.3f} | {min(ends):.3f} | {max(ends):.3f} |")
    digits.save(simulation.plots.learning_curves(history, "evaluation/accuracy"), options)


if __name__ == "__main__":
    try:
        main()
    finally:
        tff.test.set_no_default_context()  # ends TFF's worker
