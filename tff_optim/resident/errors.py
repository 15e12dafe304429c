"""Errors of workers and checkpoints."""


class WorkerStartError(RuntimeError):
    """A worker did not start, or could not be reached, within its time limit."""


class WorkerLostError(RuntimeError):
    """Workers ended, or connections to them were cut, again and again in one round."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; earlier ones are untouched."""
