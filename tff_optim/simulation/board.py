"""Curves for TensorBoard."""

import os
import socket
import time
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

from tff_optim.core.types import Json, Value

_PREFIX, _SUFFIX = "events.out.tfevents.", ".rounds"


class Board:
    """Writes curves to one event file, which replaces the earlier one when a run is resumed.

    Each round is so shown once, whatever was written before a kill. Other event files in the folder are
    left alone.

    Args:
      path: The folder, created if missing.
    """

    def __init__(self, path: str):
        os.makedirs(path, exist_ok=True)
        self._path = path
        self._unfinished = os.path.join(path, "unfinished")
        self._writer = tf.io.TFRecordWriter(self._unfinished)
        self._write(file_version="brain.Event:2")
        # A running TensorBoard then drops what it has read from the earlier file.
        self._write(step=0, session_log=SessionLog(status=SessionLog.START))

    def add(self, number: int, record: Mapping[str, Json], written: float) -> None:
        """Adds a point to each curve.

        Args:
          number: The round.
          record: Numbers by name; other values are left out.
          written: The time of the round, in seconds since 1970.
        """
        summary = Summary()
        for name, value in record.items():
            if isinstance(value, int | float):
                tag = name.encode(errors="backslashreplace").decode()
                summary.MergeFrom(scalar_pb(tag, _single(value)))
        self._write(wall_time=written, step=number, summary=summary)

    def publish(self) -> None:
        """Replaces the earlier file."""
        self.flush()
        for name in os.listdir(self._path):
            if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
                os.remove(os.path.join(self._path, name))
        name = f"{_PREFIX}{int(time.time())}.{socket.gethostname()}.{os.getpid()}{_SUFFIX}"
        os.replace(self._unfinished, os.path.join(self._path, name))

    def flush(self) -> None:
        """Flushes the points to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, **fields: Value) -> None:
        self._writer.write(Event(**fields).SerializeToString())


def _single(value: float) -> np.float32:
    """The value in TensorBoard's single precision; infinite beyond its range."""
    with np.errstate(over="ignore"):
        try:
            return np.float32(value)
        except OverflowError:  # a whole number above 1e308
            return np.float32(np.inf if value > 0 else -np.inf)
