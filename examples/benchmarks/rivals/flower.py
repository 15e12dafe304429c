"""The rounds in Flower's simulation on Ray: clients in torch, its `FedAdam` at the server."""

import importlib.metadata
import logging
import os

os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")

import torch_model
from flower_client import client_app
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg
from flwr.simulation import run_simulation
from tasks import SERVER_RATES, main

logging.getLogger("flwr").setLevel(logging.ERROR)


def simulate(task, clients, start, server, rounds, round_done):
    number = len(clients)  # their data are made where they are trained
    all_of_them = {"min_train_nodes": number, "min_available_nodes": number}
    all_of_them["fraction_evaluate"] = 0.0
    if server == "adam":
        rates = {"eta": SERVER_RATES[server], "beta_2": 0.999, "tau": 1e-8}
        strategy = FedAdam(**all_of_them, **rates)
    else:
        strategy = FedAvg(**all_of_them)
    model = torch_model.build(task, start)
    found = []
    server_app = ServerApp()

    @server_app.main()
    def run(grid, context):
        result = strategy.start(
            grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            num_rounds=rounds,
            train_config=ConfigRecord({"task": task.name}),
            evaluate_fn=lambda number, arrays: round_done() if number else None,
        )
        found.extend(result.arrays.to_numpy_ndarrays())

    run_simulation(
        server_app,
        client_app,
        num_supernodes=number,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return found


if __name__ == "__main__":
    main("Flower", importlib.metadata.version("flwr"), simulate, layout="torch")
