"""Values on their way between executors, Python and files.

Where a worker sees this machine's files, tensors cross in TensorFlow's checkpoint format
through a directory in memory: one write and one read, several times faster than gRPC, and
without gRPC's limit of 2 GB a message. Elsewhere they cross in gRPC messages.
"""

import contextlib
import os
import shutil
import uuid
import warnings
from typing import Any

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_optim.resident import host as host_lib
from tff_optim.resident import leaves
from tff_optim.resident import worker as worker_lib
from tff_optim.resident.host import CohortExecutor, Host

# Below, a gRPC message is as fast as a file.
FILES_FROM_BYTES = 1 << 20
# A checkpoint must hold a tensor, and a state may have none. It also marks files as ours.
MARK = "tff_optim_resident_format"
_FORMAT = 1


def compile_native(computation: Any) -> Any:
    """Compiles a computation for TFF's worker."""
    return tff.backends.native.desugar_and_transform_to_native(computation)


def lift(computation: Any, num_arguments: int = 1) -> Any:
    """Turns an unplaced computation into one at the server, compiled.

    `(T -> U)` becomes `(T@SERVER -> U@SERVER)`. With two arguments, `(<T, U> -> V)` becomes
    `(<T@SERVER, U@SERVER> -> V@SERVER)`, so that its arguments may come from anywhere.
    """
    parameter = computation.type_signature.parameter
    if num_arguments == 1:

        @tff.federated_computation(tff.FederatedType(parameter, tff.SERVER))
        def lifted(arg: Any) -> Any:
            return tff.federated_map(computation, arg)
    else:

        @tff.federated_computation([tff.FederatedType(t, tff.SERVER) for t in parameter])
        def lifted(args: Any) -> Any:
            return tff.federated_map(computation, tff.federated_zip(args))

    return compile_native(lifted)


def save_op(prefix: Any, names: list[str], tensors: list[Any]) -> Any:
    """Writes named tensors, and the mark, as the checkpoint `prefix`."""
    return tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=[*names, MARK],
        shape_and_slices=[""] * (len(names) + 1),
        tensors=[*tensors, tf.constant(_FORMAT, tf.int32)],
    )


@attrs.frozen(eq=False)
class Carrier:
    """The compiled computations that move values of one type.

    Attributes:
        type: The unplaced type.
        leaves: Its leaves.
        fence: `T@SERVER -> int32@SERVER`, whose result is there once the value is.
        save: `<T@SERVER, str@SERVER> -> int32@SERVER`; None where checkpoints cannot hold `T`.
        load: `str@SERVER -> T@SERVER`; likewise.
    """

    type: tff.Type
    leaves: list[leaves.Leaf]
    fence: Any
    save: Any
    load: Any

    @property
    def placed_type(self) -> tff.Type:
        """`T@SERVER`."""
        return tff.FederatedType(self.type, tff.SERVER)


def build_carrier(type_spec: tff.Type) -> Carrier:
    """Builds what moves values of an unplaced type."""
    parts = leaves.leaves_of(type_spec)

    @tff.tensorflow.computation(tff.to_type([type_spec]))
    def fence(args: Any) -> Any:
        # A sequence has no value to wait for.
        tensors = [x for x in leaves.flatten(args[0], type_spec) if not _is_dataset(x)]
        with tf.control_dependencies([tf.shape(x) for x in tensors]):
            return tf.constant(0, tf.int32)

    @tff.federated_computation(tff.FederatedType(type_spec, tff.SERVER))
    def fence_at_server(value: Any) -> Any:
        return tff.federated_map(fence, tff.federated_zip([value]))

    compiled_fence = compile_native(fence_at_server)
    if not all(leaf.is_tensor for leaf in parts):
        return Carrier(type_spec, parts, compiled_fence, None, None)
    names = [leaf.name for leaf in parts]

    @tff.tensorflow.computation(tff.to_type([type_spec, np.str_]))
    def save(args: Any) -> Any:
        written = save_op(args[1], names, leaves.flatten(args[0], type_spec))
        with tf.control_dependencies([written]):
            return tf.constant(0, tf.int32)

    @tff.federated_computation(
        tff.FederatedType(type_spec, tff.SERVER), tff.FederatedType(np.str_, tff.SERVER)
    )
    def save_at_server(value: Any, path: Any) -> Any:
        return tff.federated_map(save, tff.federated_zip([value, path]))

    @tff.tensorflow.computation(np.str_)
    def load(path: Any) -> Any:
        tensors = tf.raw_ops.RestoreV2(
            prefix=path,
            tensor_names=[*names, MARK],
            shape_and_slices=[""] * (len(names) + 1),
            dtypes=[*(leaf.dtype for leaf in parts), tf.int32],
        )
        shaped = [tf.ensure_shape(t, leaf.shape) for t, leaf in zip(tensors, parts, strict=False)]
        return leaves.pack(shaped, type_spec)

    @tff.federated_computation(tff.FederatedType(np.str_, tff.SERVER))
    def load_at_server(path: Any) -> Any:
        return tff.federated_map(load, path)

    return Carrier(
        type_spec,
        parts,
        compiled_fence,
        compile_native(save_at_server),
        compile_native(load_at_server),
    )


def _is_dataset(value: object) -> bool:
    return isinstance(value, tf.data.Dataset)


_PATH_TYPE = tff.FederatedType(np.str_, tff.SERVER)


async def wait(carrier: Carrier, executor: CohortExecutor, value: Any) -> None:
    """Waits until a value has been computed; errors of its computation are raised here."""
    await (await executor.call(carrier.fence, value)).compute()


async def save_in_worker(
    carrier: Carrier, executor: CohortExecutor, value: Any, prefix: str
) -> None:
    """Lets the worker write a value as the checkpoint `prefix`."""
    path = await executor.create(prefix, _PATH_TYPE)
    await (await executor.call(carrier.save, value, path)).compute()


async def load_in_worker(carrier: Carrier, executor: CohortExecutor, prefix: str) -> Any:
    """Lets the worker read a value from the checkpoint `prefix`."""
    value = await executor.call(carrier.load, await executor.create(prefix, _PATH_TYPE))
    await wait(carrier, executor, value)  # or the file might be gone before it is read
    return value


def load_in_python(carrier: Carrier, prefix: str) -> list[tf.Tensor]:
    """Reads the leaves of a value from the checkpoint `prefix`."""
    names = [leaf.name for leaf in carrier.leaves]
    tensors = tf.raw_ops.RestoreV2(
        prefix=prefix,
        tensor_names=[*names, MARK],
        shape_and_slices=[""] * (len(names) + 1),
        dtypes=[*(leaf.dtype for leaf in carrier.leaves), tf.int32],
    )
    return list(tensors[:-1])


class Exchange:
    """A file of its own in a worker's directory, removed when the block ends."""

    def __init__(self, host: Host):
        self.prefix = os.path.join(host.worker.directory, uuid.uuid4().hex)

    def __enter__(self) -> str:
        return self.prefix

    def __exit__(self, *unused: object) -> None:
        for suffix in (".index", ".data-00000-of-00001"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.prefix + suffix)


async def _read_file(executor: CohortExecutor, path: str) -> object:
    value = await executor.call(_reader(), await executor.create(path, _PATH_TYPE))
    return await value.compute()


_READER: list[Any] = []


def _reader() -> Any:
    if not _READER:

        @tff.tensorflow.computation(np.str_)
        def read(path: Any) -> Any:
            return tf.io.read_file(path)

        _READER.append(lift(read))
    return _READER[0]


async def look_for_files(executor: CohortExecutor) -> None:
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
    except Exception as e:
        if host_lib.is_cut(e):
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
    free = shutil.disk_usage(host.worker.directory).free
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
    carrier: Carrier, executor: CohortExecutor, value: Any, files: bool | None = None
) -> list[Any]:
    """Brings a value to Python, as the list of its leaves.

    Args:
        carrier: What moves values of its type.
        executor: Where it is.
        value: Its handle.
        files: Whether it crosses in a file or in a message; None to choose by its size.
    """
    if by_file(carrier, executor.host) if files is None else files:
        with Exchange(executor.host) as prefix:
            await save_in_worker(carrier, executor, value, prefix)
            return [_plain(t) for t in load_in_python(carrier, prefix)]
    result = tff.tensorflow.transform_result(await value.compute())
    return leaves.flatten(result, carrier.type)


def _plain(tensor: tf.Tensor) -> Any:
    value = tensor.numpy()
    return value[()] if isinstance(value, np.ndarray) else value


async def put(
    carrier: Carrier, executor: CohortExecutor, arrays: list[Any], files: bool | None = None
) -> Any:
    """Takes the leaves of a value from Python into the worker; `files` is as for `fetch`."""
    if by_file(carrier, executor.host) if files is None else files:
        with Exchange(executor.host) as prefix:
            save_op(prefix, [leaf.name for leaf in carrier.leaves], arrays)
            return await load_in_worker(carrier, executor, prefix)
    return await executor.create(leaves.pack(arrays, carrier.type), carrier.placed_type)


async def move(carrier: Carrier, source: CohortExecutor, value: Any, target: CohortExecutor) -> Any:
    """Moves a value between two executors of one worker."""
    if source is target:
        return value
    assert source.host is target.host
    if carrier.save is not None and has_room(source.host, leaves.num_bytes(carrier.type)):
        with Exchange(source.host) as prefix:
            await save_in_worker(carrier, source, value, prefix)
            return await load_in_worker(carrier, target, prefix)
    return await put(carrier, target, await fetch(carrier, source, value))
