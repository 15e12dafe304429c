"""Transfers of values between Python and a worker.

If a worker sees this machine's files, large values are written and read as TensorFlow checkpoints in a
directory in memory. This is several times faster than gRPC, and has no limit of 2 GB per message. Other
values are sent in gRPC messages.
"""

import contextlib
import errno
import functools
import glob
import os
import uuid
import warnings
from typing import Any

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident import leaves
from tff_optim.resident.clients.in_workers import connection as connection_lib
from tff_optim.resident.clients.in_workers import worker as worker_lib
from tff_optim.resident.clients.in_workers.connection import Connection
from tff_optim.resident.parts import compile_native

# For smaller values a gRPC message is as fast as a file.
FILES_FROM_BYTES = 1 << 20
_PATH_TYPE = tff.TensorType(np.str_)


@attrs.frozen(eq=False)
class Transfer:
    """The compiled computations that transfer values of one type.

    Attributes:
      type: `T`, of tensors alone.
      leaves: Its leaves.
      fence: `T -> int32`, which is computed once the value is.
      save: `<T, str> -> int32`, which writes a checkpoint.
      load: `str -> T`, which reads one.
    """

    type: tff.Type
    leaves: list[leaves.Leaf]
    fence: Any
    save: Any
    load: Any


def build_transfer(type_spec: tff.Type) -> Transfer:
    """Builds the computations that transfer values of a type."""
    parts = leaves.leaves_of(type_spec)

    def traced(function: Any, *types: Any) -> Any:
        # One structure of arguments: TFF would take a single argument's structure apart.
        return tff.tensorflow.computation(function, tff.to_type(list(types)))

    def with_one(computation: Any) -> Any:
        """Calls `<T> -> U` with a `T`."""
        (only,) = computation.type_signature.parameter
        return tff.federated_computation(lambda value: computation([value]), only)

    def done_after(operations: Any) -> Any:
        with tf.control_dependencies(operations):
            return tf.constant(0, tf.int32)

    def fence(args: Any) -> Any:
        return done_after([tf.shape(x) for x in leaves.flatten(args[0], type_spec)])

    def save(args: Any) -> Any:
        tensors = leaves.flatten(args[0], type_spec)
        return done_after([leaves.write_checkpoint(args[1], parts, tensors)])

    def load(args: Any) -> Any:
        return leaves.pack(leaves.read_checkpoint(args[0], parts), type_spec)

    return Transfer(
        type=type_spec,
        leaves=parts,
        fence=compile_native(with_one(traced(fence, type_spec))),
        save=compile_native(traced(save, type_spec, np.str_)),
        load=compile_native(with_one(traced(load, np.str_))),
    )


async def wait(transfer: Transfer, connection: Connection, value: Any) -> None:
    """Waits until a value has been computed, and raises errors of its computation."""
    await (await connection.call(transfer.fence, value)).compute()


async def fetch(transfer: Transfer, connection: Connection, value: Any) -> list[tf.Tensor]:
    """Brings a value to Python, as the tensors of its leaves."""
    if _by_file(transfer, connection):
        try:
            with _Exchange(connection) as prefix:
                await save_in_worker(transfer, connection, value, prefix)
                return leaves.read_checkpoint(prefix, transfer.leaves)
        except Exception as error:
            _warn_if_full(connection, error)
    result = tff.tensorflow.transform_result(await value.compute())
    return [
        tf.convert_to_tensor(x, leaf.dtype)
        for x, leaf in zip(leaves.flatten(result, transfer.type), transfer.leaves, strict=True)
    ]


async def put(transfer: Transfer, connection: Connection, tensors: list[tf.Tensor]) -> Any:
    """Takes the leaves of a value from Python into the worker; returns its handle there."""
    if _by_file(transfer, connection):
        try:
            with _Exchange(connection) as prefix:
                leaves.write_checkpoint(prefix, transfer.leaves, tensors)
                path = await connection.create(prefix, _PATH_TYPE)
                value = await connection.call(transfer.load, path)
                await wait(transfer, connection, value)  # the file must not be removed earlier
                return value
        except Exception as error:
            _warn_if_full(connection, error)
    arrays = [tensor.numpy() for tensor in tensors]
    return await connection.create(leaves.pack(arrays, transfer.type), transfer.type)


async def save_in_worker(
    transfer: Transfer, connection: Connection, value: Any, prefix: str
) -> None:
    """Lets the worker write a value as the checkpoint `prefix`."""
    path = await connection.create(prefix, _PATH_TYPE)
    await (await connection.call(transfer.save, value, path)).compute()


def _by_file(transfer: Transfer, connection: Connection) -> bool:
    return connection.shares_files and leaves.num_bytes(transfer.type) >= FILES_FROM_BYTES


class _Exchange:
    """A file of its own in a worker's directory, removed when the block ends."""

    def __init__(self, connection: Connection):
        self._prefix = os.path.join(connection.worker.directory, uuid.uuid4().hex)

    def __enter__(self) -> str:
        return self._prefix

    def __exit__(self, *unused: object) -> None:
        # An interrupted write leaves files under other names.
        for path in glob.glob(f"{self._prefix}*"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


# TensorFlow's messages, here and in the worker, end with the system's.
_NO_ROOM = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


def _warn_if_full(connection: Connection, error: Exception) -> None:
    """Warns if an error says that there is no room for a file; raises any other error again."""
    directory = connection.worker.directory
    gone = not os.path.isdir(directory)
    if not gone and not any(text in str(error) for text in _NO_ROOM):
        raise error
    reason = "was removed" if gone else "ran out of room or inodes while a value was written"
    warnings.warn(
        f"{directory} {reason}: the value crosses in gRPC messages, which is slower. Give the "
        "shared memory more room (`docker run --shm-size`).",
        stacklevel=2,
    )


@functools.cache
def _reader() -> Any:
    @tff.tensorflow.computation(np.str_)
    def read(path: Any) -> Any:
        return tf.io.read_file(path)

    return compile_native(read)


async def look_for_files(connection: Connection) -> None:
    """Finds out whether a worker sees this machine's files, and is the one we started.

    Raises:
      WorkerStartError: If another worker answers at the local worker's port.
    """
    worker = connection.worker
    with open(os.path.join(worker.directory, worker_lib.TOKEN_FILE), "rb") as f:
        token = f.read()
    is_local = isinstance(worker, worker_lib.LocalWorker)
    # A local worker runs in its directory: a relative path tells it from any other.
    path = os.path.join("" if is_local else worker.directory, worker_lib.TOKEN_FILE)
    try:
        found = await connection.call(_reader(), await connection.create(path, _PATH_TYPE))
        connection.shares_files = await found.compute() == token
    except Exception as error:
        if connection_lib.is_cut(error):
            raise
        connection.shares_files = False  # TensorFlow found no such file there
    if is_local and not connection.shares_files:
        raise worker_lib.WorkerStartError(
            f"Another TFF worker answers at {worker.target}, the port of the {worker.name}. End it, "
            "or give the other one a port below the ephemeral range."
        )
