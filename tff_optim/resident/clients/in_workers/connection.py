"""The connection to a worker: values in it, and calls that end when the worker does.

TFF's executor classes block in gRPC without a time limit. Here each call runs in a thread of its own,
and the caller watches it: an ended or unreachable worker raises a `WorkerLostError`, and Ctrl-C gets
through.
"""

import asyncio
import contextlib
import os
import queue
import random
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import grpc  # type: ignore[import-untyped]
import tensorflow_federated as tff

from tff_optim.resident.clients.in_workers import worker as worker_lib
from tff_optim.resident.errors import WorkerLostError

_T = TypeVar("_T")


def is_cut(error: Exception) -> bool:
    """Whether a call failed because of the connection rather than of the computation."""
    return isinstance(error, grpc.Call) and error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
    )


class ConnectionCutError(RuntimeError):
    """A call was cut off, but the worker still answers: the call may be tried again."""


class _AbandonedError(RuntimeError):
    """Nobody waits for this call any more."""


class _Channel:
    """The connection to a worker as TFF's stub uses it.

    Values are thrown away when Python collects them, at any point of the program: that must neither
    wait for the network nor raise, so a thread does it. Values outlive the connection that they came by.
    """

    def __init__(self, channel: grpc.Channel):
        self.channel = channel
        self._garbage: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_throw_away, args=(self._garbage,), daemon=True).start()

    def subscribe(self, *unused: Any, **also_unused: Any) -> None:
        """Watches nothing: gRPC's watching thread may fail when a channel closes."""

    def unary_unary(self, method: str, *codecs: Any, **named: Any) -> Callable[[Any], Any]:
        """What makes a call of a method."""

        def call(request: Any) -> Any:
            if getattr(threading.current_thread(), "abandoned", False):
                raise _AbandonedError
            return self.channel.unary_unary(method, *codecs, **named)(request)

        def call_later(request: Any) -> None:
            self._garbage.put(lambda: call(request))

        return call_later if "/Dispose" in method else call

    def close(self) -> None:
        """Ends the thread once it has thrown away what it was told of."""
        self._garbage.put(None)


def _throw_away(garbage: "queue.SimpleQueue[Callable[[], Any] | None]") -> None:
    while (request := garbage.get()) is not None:
        with contextlib.suppress(Exception):  # the worker may be gone, and the value with it
            request()


class Connection:
    """A worker, the values in it, and the state of the connection to it.

    Args:
      worker: The worker.
      heartbeat: Seconds between two checks of the worker while a call runs, and the time in which it
        must answer.
    """

    def __init__(self, worker: worker_lib.Worker, heartbeat: float):
        self.worker = worker
        self._heartbeat = heartbeat
        self._channel = _Channel(worker.channel)
        self._executor: Any = None
        self._functions: dict[int, tuple[Any, Any]] = {}
        self._closed = False
        self.lost = False
        # Whether the worker sees this process's files; `handover` sets it.
        self.shares_files = False

    # The work that `start` runs calls the following methods.

    async def create(self, value: object, type_spec: tff.Type) -> Any:
        """Puts a Python value of the given type into the worker; returns its handle."""
        return await self._values().create_value(value, type_spec)

    async def function(self, computation: Any) -> Any:
        """Puts a compiled computation into the worker, once; returns its handle."""
        known = self._functions.get(id(computation))
        if known is None:
            function = await self.create(computation, computation.type_signature)
            # The computation is kept too, so that no other can have its id.
            known = self._functions[id(computation)] = (computation, function)
        return known[1]

    async def call(self, computation: Any, *args: Any) -> Any:
        """Calls a compiled computation on handles."""
        function = await self.function(computation)
        if not args:
            return await self._values().create_call(function)
        argument = args[0] if len(args) == 1 else await self._values().create_struct(list(args))
        return await self._values().create_call(function, argument)

    def _values(self) -> Any:
        if self._executor is None:
            # A worker has one executor for each number of clients. All connections with that number
            # share it, and wait for each other's calls. Computations without placements can run under
            # any number, so this takes one that nobody else will use.
            number = random.SystemRandom().randrange(1 << 20, 1 << 31)
            # Each dropped value is disposed of at once; by default the last 20 are kept.
            self._executor = tff.framework.RemoteExecutor(
                tff.framework.RemoteExecutorGrpcStub(self._channel), dispose_batch_size=1
            )
            self._executor.set_cardinalities({tff.CLIENTS: number})
            weakref.finalize(self, self._executor.close).atexit = False
        return self._executor

    def start(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> "Call[_T]":
        """Starts work on this worker in a thread of its own."""
        self._check()
        call = Call(work)
        call.start()
        return call

    def finish(self, call: "Call[_T]") -> _T:
        """Waits for work that `start` began.

        Raises:
          WorkerLostError: If the worker ended or no longer answers.
          ConnectionCutError: If the connection was cut, but the worker is still running.
        """
        try:
            while not call.done.wait(self._heartbeat):
                self._look()
        except BaseException:
            call.abandoned = True
            raise
        if call.error is None:
            return call.result
        if isinstance(call.error, grpc.RpcError | tff.framework.RetryableError):
            self._explain(call.error)
        raise call.error

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("This `ResidentProcess` was closed.")

    def _look(self) -> None:
        self._check()
        reason = self.worker.lost_reason(self._heartbeat)
        if reason is not None:
            self._check()  # it may have been closed meanwhile
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        self.lost = True
        self.close()
        raise WorkerLostError(f"The {self.worker.name} is gone: {reason}.")

    def _explain(self, error: Exception) -> None:
        if is_cut(error):
            self._look()
            # A channel that failed waits up to minutes before it tries again.
            self.worker.channel.close()
            self.worker.channel = worker_lib.open_channel(self.worker.target)
            self._channel.channel = self.worker.channel
            raise ConnectionCutError(
                f"The connection to the {self.worker.name} was cut in the middle of a call."
            ) from error
        if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            self._lose(f"it was started anew ({error.details()})")

    def close(self) -> None:
        """Ends a local worker; closes the connection to a remote one."""
        if not self._closed and os.getpid() == self.worker.owner:
            self._closed = True
            self._executor = None
            self._functions.clear()
            self._channel.close()
            self.worker.close()


class Call(threading.Thread, Generic[_T]):
    """Work in a daemon thread, which never keeps Python from ending."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, _T]]):
        super().__init__(daemon=True)
        self._work: Callable[[], Coroutine[Any, Any, _T]] | None = work
        self.abandoned = False
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Runs the work and keeps its result or error."""
        assert self._work is not None
        try:
            self.result = asyncio.run(self._work())
        except BaseException as error:
            self.error = error
        finally:
            self._work = None  # else its values would live as long as the call
            self.done.set()
