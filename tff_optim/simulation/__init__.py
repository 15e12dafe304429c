"""Training loop, history and pictures for simulations in TensorFlow Federated."""

from tff_optim.simulation import plots
from tff_optim.simulation.history import History, Table
from tff_optim.simulation.loop import run
from tff_optim.simulation.metrics import client_records, flatten
from tff_optim.simulation.stops import no_better

__all__ = ["History", "Table", "client_records", "flatten", "no_better", "plots", "run"]
