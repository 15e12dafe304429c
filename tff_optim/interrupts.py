"""Ctrl-C: that ends TFF's workers, and that lets a round end first."""

import atexit
import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import tensorflow_federated as tff


class Interrupt:
    """Whether rounds are asked to end.

    Attributes:
      requested: By the user, or because another run has failed.
      pressed: By the user, whose Ctrl-C may have ended a worker too.
    """

    requested = False
    pressed = False


@contextlib.contextmanager
def let_rounds_end() -> Iterator[Interrupt]:
    """Turns the first Ctrl-C into a request; the second one interrupts as usual.

    Only the main thread receives signals. In other threads, and where SIGINT is ignored or has another
    handler than Python's, nothing changes.

    Example:
      >>> with let_rounds_end() as interrupt:
      ...     for round_number in range(3):
      ...         if interrupt.requested:
      ...             break
    """
    interrupt = Interrupt()
    before = signal.getsignal(signal.SIGINT)
    if not _in_main_thread() or before is not signal.default_int_handler:
        yield interrupt
        return

    def request(number: int, frame: FrameType | None) -> None:
        del number, frame
        interrupt.requested = interrupt.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("Stopping after this round; Ctrl-C again stops at once.", file=sys.stderr)

    signal.signal(signal.SIGINT, request)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def let_workers_end() -> None:
    """Lets TFF end the workers that it starts, in a process that ignores SIGINT too.

    TFF sends its worker SIGINT and then waits for it without a limit. A background job of a script
    (`make test &`, `nohup`, some CI runners) ignores SIGINT, and every process that it starts inherits
    that: TFF's worker never ends, and neither does the job. Children do not inherit a handler, so this
    installs one that does nothing, and the process itself still ignores SIGINT.

    Call it in the main thread before TFF's worker starts. The workers of `ResidentProcess` end without
    it.

    Example:
      >>> let_workers_end()
    """
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored and _in_main_thread():
        signal.signal(signal.SIGINT, lambda number, frame: None)


@functools.cache
def end_worker_at_exit() -> None:
    """Ends the worker of TFF's default context when the program ends; TFF would leave it running.

    TFF ends a worker when its context is collected, and fails if the interpreter is already shutting
    down ("'NoneType' object has no attribute 'Popen'"). `simulation.run` calls this. Where SIGINT is
    ignored, it does nothing, since TFF would wait for the worker without a limit (see
    `let_workers_end`).

    Example:
      >>> end_worker_at_exit()
    """
    atexit.register(_drop_context)


def _drop_context() -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        tff.test.set_no_default_context()
