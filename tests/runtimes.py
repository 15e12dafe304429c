"""TFF runtimes other than the session's: sub-rounds on one worker, and two workers over gRPC."""

import contextlib
import os
import socket
import subprocess

import grpc
import tensorflow_federated as tff

_BINARY = os.path.join(os.path.dirname(tff.__file__), "data", "worker_binary")


@contextlib.contextmanager
def subrounds_context(number):
    """A context that runs cohorts in `number` pieces on one worker of their own."""
    context = tff.backends.native.create_async_local_cpp_execution_context()
    yield tff.backends.native.create_mergeable_comp_execution_context([context], number)


@contextlib.contextmanager
def two_workers_context(number=2):
    """A context that runs half of each cohort on each of two worker processes, over loopback."""
    del number  # a piece for each worker
    ports = [_free_port() for _ in range(2)]
    workers = [subprocess.Popen([_BINARY, f"--port={port}"]) for port in ports]
    channels = [grpc.insecure_channel(f"localhost:{port}", _UNLIMITED) for port in ports]
    try:
        for channel in channels:
            grpc.channel_ready_future(channel).result(timeout=30)
        contexts = [_remote_context(channel) for channel in channels]
        yield tff.backends.native.create_mergeable_comp_execution_context(contexts)
    finally:
        for channel in channels:
            channel.close()
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(timeout=30)


def _installed(make_context):
    @contextlib.contextmanager
    def install(*arguments):
        stack = tff.framework.get_context_stack()
        with make_context(*arguments) as context, stack.install(context):
            yield

    return install


subrounds = _installed(subrounds_context)
two_workers = _installed(two_workers_context)

# Those in which merges run, by name: functions of the number of pieces.
CONTEXTS = {"subrounds": subrounds_context, "two-workers": two_workers_context}
IN_PIECES = {"subrounds": subrounds, "two-workers": two_workers}

_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _remote_context(channel):
    stub = tff.framework.RemoteExecutorGrpcStub(channel)

    def executor(cardinalities):
        remote = tff.framework.RemoteExecutor(stub)
        remote.set_cardinalities({tff.CLIENTS: 0, **cardinalities})
        return remote

    return tff.framework.AsyncExecutionContext(
        executor_fn=tff.framework.ResourceManagingExecutorFactory(executor),
        compiler_fn=tff.backends.native.desugar_and_transform_to_native,
        transform_args=tff.tensorflow.transform_args,
        transform_result=tff.tensorflow.transform_result,
    )
