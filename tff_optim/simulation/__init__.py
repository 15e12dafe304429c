"""Training loop, history and pictures for simulations in TensorFlow Federated."""

from tff_optim.simulation import plots, splits
from tff_optim.simulation.client_arrays import ClientArrays
from tff_optim.simulation.cohorts import poisson
from tff_optim.simulation.history import History, Table
from tff_optim.simulation.loop import run
from tff_optim.simulation.metrics import client_records, flatten
from tff_optim.simulation.per_client import PerClient
from tff_optim.simulation.stops import no_better, reached

__all__ = [
    "ClientArrays",
    "History",
    "PerClient",
    "Table",
    "client_records",
    "flatten",
    "no_better",
    "plots",
    "poisson",
    "reached",
    "run",
    "splits",
]
