"""A learning process whose server state stays in the Python process."""

from tff_optim.resident.checkpoints import ResidentCheckpoints
from tff_optim.resident.clients.in_workers.worker import worker_binary
from tff_optim.resident.errors import CheckpointError, WorkerLostError, WorkerStartError
from tff_optim.resident.process import ResidentProcess

__all__ = [
    "CheckpointError",
    "ResidentCheckpoints",
    "ResidentProcess",
    "WorkerLostError",
    "WorkerStartError",
    "worker_binary",
]
