"""One worker seen from Python: its executors, and calls that end when the worker does.

TFF's executor classes block in gRPC without a time limit. Here every call runs in a thread of
its own, and the caller watches it: an ended or unreachable worker becomes a
`WorkerLostError`, and Ctrl-C gets through.
"""

import asyncio
import collections
import contextlib
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import grpc  # type: ignore[import-untyped]
import tensorflow_federated as tff

from tff_optim.resident import forks
from tff_optim.resident.clients.in_workers import worker as worker_lib
from tff_optim.resident.errors import WorkerLostError

_T = TypeVar("_T")

# As many executors, one per cohort size, as TFF's own factory keeps.
_NUM_EXECUTORS = 10


def is_cut(error: Exception) -> bool:
    """Whether a call failed because of the connection rather than of what was computed."""
    return isinstance(error, grpc.Call) and error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
    )


class ConnectionCutError(RuntimeError):
    """A call was cut off, but the worker still answers: the call may be tried again."""


def through_cuts(attempt: Callable[[], _T], patience: float) -> _T:
    """Repeats what a cut connection has broken off.

    Raises:
      WorkerLostError: It was cut off again and again for `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return attempt()
        except ConnectionCutError as error:
            if time.monotonic() > deadline:
                raise WorkerLostError(
                    f"{error} It was cut again each time the call was repeated, for {patience:g} "
                    "seconds. States in the worker may still be there: try again once the network "
                    "is back."
                ) from error
            time.sleep(0.2)


class _AbandonedError(RuntimeError):
    """Nobody waits for this call any more."""


class _Silent:
    """A channel that is not watched: gRPC's watching thread may fail when a channel closes."""

    def __init__(self, channel: grpc.Channel):
        self.unary_unary = channel.unary_unary

    def subscribe(self, *unused: Any, **also_unused: Any) -> None:
        pass


class _Stub(tff.framework.RemoteExecutorStub):
    """TFF's stub, with values thrown away in a thread of their own.

    Values are thrown away when Python collects them, at any point of the program: that must
    neither wait for the network nor raise.
    """

    def __init__(self, channel: grpc.Channel):
        self.use(channel)
        self._garbage: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_throw_away, args=(self._garbage,), daemon=True).start()

    def use(self, channel: grpc.Channel) -> None:
        """Sends what follows through another connection: values outlive the one they came by."""
        self._stub = tff.framework.RemoteExecutorGrpcStub(_Silent(channel))

    def _ask(self, method: Callable[[Any], Any], request: Any) -> Any:
        if getattr(threading.current_thread(), "abandoned", False):
            raise _AbandonedError
        return method(request)

    def get_executor(self, request: Any) -> Any:
        return self._ask(self._stub.get_executor, request)

    def create_value(self, request: Any) -> Any:
        return self._ask(self._stub.create_value, request)

    def create_call(self, request: Any) -> Any:
        return self._ask(self._stub.create_call, request)

    def create_struct(self, request: Any) -> Any:
        return self._ask(self._stub.create_struct, request)

    def create_selection(self, request: Any) -> Any:
        return self._ask(self._stub.create_selection, request)

    def compute(self, request: Any) -> Any:
        return self._ask(self._stub.compute, request)

    def dispose(self, request: Any) -> None:
        self._garbage.put(lambda: self._stub.dispose(request))

    def dispose_executor(self, request: Any) -> None:
        self._garbage.put(lambda: self._stub.dispose_executor(request))

    def close(self) -> None:
        self._garbage.put(None)


def _throw_away(garbage: "queue.SimpleQueue[Callable[[], Any] | None]") -> None:
    while (request := garbage.get()) is not None:
        # The worker may be gone or the channel closed, and the value with it.
        with contextlib.suppress(grpc.RpcError, tff.framework.RetryableError, ValueError):
            request()


class Executor:
    """A part of a worker that computes, for one number of clients, and holds what it computed."""

    def __init__(self, host: "Host", num_clients: int, stub: _Stub):
        self.host = host
        # Every dropped state is given back at once: the default keeps the last 20.
        self._executor = tff.framework.RemoteExecutor(stub, dispose_batch_size=1)
        self._executor.set_cardinalities({tff.CLIENTS: num_clients})
        self._functions: dict[int, tuple[Any, Any]] = {}
        weakref.finalize(self, self._executor.close).atexit = False

    async def create(self, value: object, type_spec: tff.Type) -> Any:
        """Puts a Python value of the given type into the worker."""
        return await self._executor.create_value(value, type_spec)

    async def function(self, computation: Any) -> Any:
        """Puts a compiled computation into the worker, once, to be called or passed on."""
        known = self._functions.get(id(computation))
        if known is None:
            function = await self._executor.create_value(computation, computation.type_signature)
            # The computation is kept as well, so that its id is not given to another one.
            known = self._functions[id(computation)] = (computation, function)
        return known[1]

    async def call(self, computation: Any, *args: Any) -> Any:
        """Calls a compiled computation on values of this executor."""
        function = await self.function(computation)
        if not args:
            return await self._executor.create_call(function)
        if len(args) == 1:
            return await self._executor.create_call(function, args[0])
        return await self._executor.create_call(function, await self.struct(*args))

    async def struct(self, *elements: Any) -> Any:
        """Makes an unnamed structure of values of this executor."""
        return await self._executor.create_struct(list(elements))

    async def select(self, value: Any, index: int) -> Any:
        """Selects one element of a structure."""
        return await self._executor.create_selection(value, index)


class Host:
    """A worker, the executors in it, and the state of the connection to it.

    Args:
      worker: The worker.
      heartbeat: Seconds between two looks at the worker while a call runs, and the time it
        has to answer.
    """

    def __init__(self, worker: worker_lib.Worker, heartbeat: float):
        self.worker = worker
        self._heartbeat = heartbeat
        self._stub = _Stub(worker.channel)
        # A worker has one executor for each number of clients, shared by all who connect to it,
        # where one's call waits for another's to end. What has no placement can run under any
        # number: one that nobody else will take.
        self._own_number = random.SystemRandom().randrange(1 << 20, 1 << 31)
        self._own: Executor | None = None
        self._executors: collections.OrderedDict[int, Executor] = collections.OrderedDict()
        # Of two executors for one number, the end of one would be that of the other.
        self._making = threading.Lock()
        self.lost: WorkerLostError | None = None
        self._closed = False
        # The values in this worker that somebody still refers to.
        self.residents: weakref.WeakSet[Any] = weakref.WeakSet()
        # Filled in by `handover`: whether the worker sees this process's files.
        self.shares_files: bool | None = None

    def own_executor(self) -> Executor:
        """Returns the executor for values without placement; to be called inside `start`."""
        with self._making:
            if self._own is None:
                self._own = Executor(self, self._own_number, self._stub)
            return self._own

    def executor(self, num_clients: int) -> Executor:
        """Returns the executor for a number of clients; to be called inside `start`."""
        with self._making:
            executor = self._executors.pop(num_clients, None)
            if executor is None:
                executor = Executor(self, num_clients, self._stub)
            self._executors[num_clients] = executor
            while len(self._executors) > _NUM_EXECUTORS:
                # It ends once the last state that lives in it is dropped.
                self._executors.popitem(last=False)
            return executor

    def start(self, work: Callable[[], Awaitable[_T]]) -> "Call[_T]":
        """Starts work on this worker in a thread of its own."""
        self.check()
        call = Call(work)
        call.start()
        return call

    def finish(self, call: "Call[_T]") -> _T:
        """Waits for work that `start` began.

        Raises:
          WorkerLostError: The worker ended or does not answer any more.
          ConnectionCutError: The connection was cut, but the worker is still there.
        """
        try:
            while not call.done.wait(self._heartbeat):
                self._look()
        except BaseException:
            call.abandoned = True
            raise
        if call.error is None:
            return call.result
        if isinstance(call.error, (grpc.RpcError, tff.framework.RetryableError)):
            self._explain(call.error)
        raise call.error

    def run(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Runs work on this worker and waits for it; repeats it where the connection was cut.

        Raises:
          WorkerLostError: The worker ended or does not answer any more.
        """
        return through_cuts(lambda: self.finish(self.start(work)), self._heartbeat)

    def check(self) -> None:
        """Raises if the worker was closed or lost, or belongs to the parent of this process."""
        forks.check_owner(f"The {self.worker.name}", self.worker.owner)
        if self.lost is not None:
            raise self.lost
        if self._closed:
            raise RuntimeError("This `ResidentProcess` was closed.")

    def _look(self) -> None:
        reason = self.worker.lost_reason(self._heartbeat)
        if reason is not None:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        self.lost = worker_lib.lost(self.worker, reason)
        self.close()
        raise self.lost

    def _explain(self, error: Exception) -> None:
        if is_cut(error):
            self.check()
            self._look()
            # A channel that once failed waits, up to minutes, before it tries again.
            self.worker.channel = worker_lib.open_channel(self.worker.target)
            self._stub.use(self.worker.channel)
            raise ConnectionCutError(
                f"The connection to the {self.worker.name} was cut in the middle of a call."
            ) from error
        if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            self._lose(f"it was started anew ({error.details()})")

    def close(self) -> None:
        """Ends a local worker; closes the connection to a remote one."""
        if not self._closed and os.getpid() == self.worker.owner:
            self._closed = True
            self._own = None
            self._executors.clear()
            self._stub.close()
            self.worker.close()


class Call(threading.Thread, Generic[_T]):
    """Work in a daemon thread: it never keeps Python from ending."""

    def __init__(self, work: Callable[[], Awaitable[_T]]):
        super().__init__(daemon=True)
        self._work: Callable[[], Awaitable[_T]] | None = work
        self.abandoned = False
        self.done = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Runs the work and keeps its result or error."""
        assert self._work is not None
        try:
            self.result = asyncio.run(_await(self._work))
        except Exception as error:
            self.error = error
        finally:
            self._work = None  # or the values it used would live on with the call
            self.done.set()


async def _await(work: Callable[[], Awaitable[_T]]) -> _T:
    return await work()
