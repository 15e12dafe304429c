"""Values on their way between executors, Python and files.

Where a worker sees this machine's files, tensors cross in TensorFlow's checkpoint format
through a directory in memory: one write and one read, several times faster than gRPC, and
without gRPC's limit of 2 GB a message. Elsewhere they cross in gRPC messages.
"""

import contextlib
import errno
import glob
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident import leaves
from tff_optim.resident.clients.in_workers import connection as host_lib
from tff_optim.resident.clients.in_workers import worker as worker_lib
from tff_optim.resident.clients.in_workers.connection import Executor, Host

# Below, a gRPC message is as fast as a file.
FILES_FROM_BYTES = 1 << 20


def compile_native(computation: Any) -> Any:
    """Compiles a computation without aggregations for TFF's worker."""
    return tff.backends.native.transform_to_native_form(computation, grappler_config=_grappler())


def compile_whole(computation: Any) -> Any:
    """Compiles any computation for TFF's worker, as plain TFF does."""
    return tff.backends.native.desugar_and_transform_to_native(computation)


def _grappler() -> tf.compat.v1.ConfigProto:
    """What plain TFF lets Grappler do, but for saving memory.

    The worker optimises nothing by itself. Grappler's way of saving memory, to compute values
    twice, aborts the Python process on graphs with a ResNet's gradient.
    """
    config = tf.compat.v1.ConfigProto()
    options = config.graph_options.rewrite_options
    options.memory_optimization = options.NO_MEM_OPT
    options.constant_folding = options.AGGRESSIVE
    options.arithmetic_optimization = options.AGGRESSIVE
    options.loop_optimization = options.AGGRESSIVE
    options.function_optimization = options.AGGRESSIVE
    return config


@attrs.frozen(eq=False)
class Carrier:
    """The compiled computations that move values of one type.

    Attributes:
      type: `T`, the type without its placement.
      leaves: Its leaves.
      placed: Whether its values are placed at the server: `T@SERVER` instead of `T`, and so on.
      fence: `T -> int32`, whose result is there once the value is.
      save: `<T, str> -> int32`; None where checkpoints cannot hold `T`.
      load: `str -> T`; likewise.
    """

    type: tff.Type
    leaves: list[leaves.Leaf]
    placed: bool
    fence: Any
    save: Any
    load: Any

    def place(self, type_spec: tff.Type) -> tff.Type:
        """The type with this carrier's placement."""
        return tff.FederatedType(type_spec, tff.SERVER) if self.placed else type_spec


def build_carrier(type_spec: tff.Type, placed: bool = False) -> Carrier:
    """Builds what moves values of a type, given without its placement."""
    parts = leaves.leaves_of(type_spec)

    def traced(function: Any, *types: Any) -> Any:
        # One structure of arguments: TFF would take a single argument's structure apart.
        computation = tff.tensorflow.computation(function, tff.to_type(list(types)))
        return _at_server(computation) if placed else computation

    def with_one(computation: Any) -> Any:
        """Calls `<T> -> U` with a `T`."""
        (only,) = computation.type_signature.parameter
        return tff.federated_computation(lambda value: computation([value]), only)

    def fence(args: Any) -> Any:
        # A sequence has no value to wait for.
        tensors = [x for x in leaves.flatten(args[0], type_spec) if not _is_dataset(x)]
        with tf.control_dependencies([tf.shape(x) for x in tensors]):
            return tf.constant(0, tf.int32)

    def save(args: Any) -> Any:
        written = leaves.write_checkpoint(args[1], parts, leaves.flatten(args[0], type_spec))
        with tf.control_dependencies([written]):
            return tf.constant(0, tf.int32)

    def load(args: Any) -> Any:
        return leaves.pack(leaves.read_checkpoint(args[0], parts), type_spec)

    in_files = all(leaf.is_tensor for leaf in parts)
    return Carrier(
        type=type_spec,
        leaves=parts,
        placed=placed,
        fence=compile_native(with_one(traced(fence, type_spec))),
        save=compile_native(traced(save, type_spec, np.str_)) if in_files else None,
        load=compile_native(with_one(traced(load, np.str_))) if in_files else None,
    )


def _at_server(computation: Any) -> Any:
    """Turns `<T, U, ...> -> V` into `<T@SERVER, U@SERVER, ...> -> V@SERVER`."""

    @tff.federated_computation(
        [tff.FederatedType(t, tff.SERVER) for t in computation.type_signature.parameter]
    )
    def lifted(args: Any) -> Any:
        return tff.federated_map(computation, tff.federated_zip(args))

    return lifted


def _is_dataset(value: object) -> bool:
    return isinstance(value, tf.data.Dataset)


_PATH_TYPE = tff.TensorType(np.str_)


async def wait(carrier: Carrier, executor: Executor, value: Any) -> None:
    """Waits until a value has been computed; errors of its computation are raised here."""
    await (await executor.call(carrier.fence, value)).compute()


async def save_in_worker(carrier: Carrier, executor: Executor, value: Any, prefix: str) -> None:
    """Lets the worker write a value as the checkpoint `prefix`."""
    path = await executor.create(prefix, carrier.place(_PATH_TYPE))
    await (await executor.call(carrier.save, value, path)).compute()


async def load_in_worker(carrier: Carrier, executor: Executor, prefix: str) -> Any:
    """Lets the worker read a value from the checkpoint `prefix`."""
    path = await executor.create(prefix, carrier.place(_PATH_TYPE))
    value = await executor.call(carrier.load, path)
    await wait(carrier, executor, value)  # or the file might be gone before it is read
    return value


class Exchange:
    """A file of its own in a worker's directory, removed when the block ends."""

    def __init__(self, host: Host):
        self.prefix = os.path.join(host.worker.directory, uuid.uuid4().hex)

    def __enter__(self) -> str:
        return self.prefix

    def __exit__(self, *unused: object) -> None:
        # Under other names too, where writing was broken off.
        for path in glob.glob(f"{self.prefix}*"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


@contextlib.contextmanager
def unless_full(host: Host) -> Iterator[None]:
    """Ends the block with a warning where there is no room for a file, to go on with messages."""
    try:
        yield
    except Exception as error:
        gone = not os.path.isdir(host.worker.directory)
        if not gone and not any(text in str(error) for text in _NO_ROOM):
            raise
        reason = "was removed" if gone else "ran out of room or inodes while a value was written"
        warnings.warn(
            f"{host.worker.directory} {reason}: the value crosses in gRPC messages, which is "
            "slower. Give the shared memory more room (`docker run --shm-size`).",
            stacklevel=2,
        )


# TensorFlow's messages, here and in the worker, end with the system's.
_NO_ROOM = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


async def _read_file(executor: Executor, path: str) -> object:
    value = await executor.call(_reader(), await executor.create(path, _PATH_TYPE))
    return await value.compute()


_READER: list[Any] = []


def _reader() -> Any:
    if not _READER:

        @tff.tensorflow.computation(np.str_)
        def read(path: Any) -> Any:
            return tf.io.read_file(path)

        _READER.append(compile_native(read))
    return _READER[0]


async def look_for_files(executor: Executor) -> None:
    """Finds out whether a worker sees this machine's files, and is the one we started.

    Raises:
      WorkerStartError: Another worker answers at the local worker's port.
    """
    host = executor.host
    if host.shares_files is not None:
        return
    directory = host.worker.directory
    with open(os.path.join(directory, worker_lib.TOKEN_FILE), "rb") as f:
        token = f.read()
    is_local = isinstance(host.worker, worker_lib.LocalWorker)
    try:
        # A local worker runs in its directory: a relative path tells it from any other.
        path = worker_lib.TOKEN_FILE if is_local else os.path.join(directory, worker_lib.TOKEN_FILE)
        host.shares_files = await _read_file(executor, path) == token
    except Exception as error:
        if host_lib.is_cut(error):
            raise
        host.shares_files = False  # TensorFlow found no such file there
    if is_local and not host.shares_files:
        raise worker_lib.WorkerStartError(
            f"Another TFF worker answers at {host.worker.target}, the port of the "
            f"{host.worker.name}. End it, or give the other one a port below the ephemeral range."
        )


def by_file(carrier: Carrier, host: Host) -> bool:
    """Whether a value should, and can, cross in a file."""
    size = leaves.num_bytes(carrier.type)
    return carrier.save is not None and size >= FILES_FROM_BYTES and has_room(host, size)


def has_room(host: Host, size: int) -> bool:
    """Whether the worker shares a directory with this process that can take `size` bytes."""
    if not host.shares_files:
        return False
    # Docker gives /dev/shm 64 MB: a value that does not fit crosses in messages.
    try:
        free = shutil.disk_usage(host.worker.directory).free
    except OSError:  # somebody removed it
        free = 0
    if free > size + (1 << 20):
        return True
    warnings.warn(
        f"{host.worker.directory} has {free} bytes left, and handing over a value needs {size}: "
        "it crosses in gRPC messages, which is slower. Give the shared memory more room "
        "(`docker run --shm-size`).",
        stacklevel=2,
    )
    return False


async def fetch(
    carrier: Carrier, executor: Executor, value: Any, files: bool | None = None
) -> list[Any]:
    """Brings a value to Python, as the list of its leaves.

    Args:
      carrier: What moves values of its type.
      executor: Where it is.
      value: Its handle.
      files: Whether it crosses in a file or in a message; None to choose by its size.
    """
    if by_file(carrier, executor.host) if files is None else files:
        with unless_full(executor.host), Exchange(executor.host) as prefix:
            await save_in_worker(carrier, executor, value, prefix)
            return [_plain(t) for t in leaves.read_checkpoint(prefix, carrier.leaves)]
    result = tff.tensorflow.transform_result(await value.compute())
    return leaves.flatten(result, carrier.type)


def _plain(tensor: tf.Tensor) -> Any:
    value = tensor.numpy()
    return value[()] if isinstance(value, np.ndarray) else value


async def put(
    carrier: Carrier, executor: Executor, arrays: list[Any], files: bool | None = None
) -> Any:
    """Takes the leaves of a value from Python into the worker; `files` is as for `fetch`."""
    if by_file(carrier, executor.host) if files is None else files:
        with unless_full(executor.host), Exchange(executor.host) as prefix:
            leaves.write_checkpoint(prefix, carrier.leaves, arrays)
            return await load_in_worker(carrier, executor, prefix)
    return await executor.create(leaves.pack(arrays, carrier.type), carrier.place(carrier.type))


async def move(
    source_carrier: Carrier,
    source: Executor,
    value: Any,
    target_carrier: Carrier,
    target: Executor,
) -> Any:
    """Moves a value between two executors, or two placements, of one worker."""
    assert source.host is target.host
    if by_file(source_carrier, source.host):
        with unless_full(source.host), Exchange(source.host) as prefix:
            await save_in_worker(source_carrier, source, value, prefix)
            return await load_in_worker(target_carrier, target, prefix)
    arrays = await fetch(source_carrier, source, value, files=False)
    return await put(target_carrier, target, arrays, files=False)
