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

    TFF ends its worker by SIGINT, and waits for that without a limit. A job in the background of a
    script (`make test &`, `nohup`, some CI runners) ignores SIGINT, and so does every process that
    it starts: TFF's worker never ends, and with it the job. A handler, other than ignoring, is not
    handed on. This one does nothing: the process itself goes on ignoring SIGINT.

    To be called before TFF's worker is started, in the main thread. `ResidentProcess` does not need
    it for its own workers.

    Example:
      >>> let_workers_end()
    """
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored and _in_main_thread():
        signal.signal(signal.SIGINT, lambda number, frame: None)


@functools.cache
def end_worker_at_exit() -> None:
    """Has the worker of TFF's default context ended with the program; TFF would leave it running.

    TFF ends a worker when its context is collected, and fails at that where the interpreter is
    half gone already ("'NoneType' object has no attribute 'Popen'"). `simulation.run` calls this. It
    does nothing where SIGINT is ignored, for TFF would wait for such a worker without a limit; see
    `let_workers_end`.

    Example:
      >>> end_worker_at_exit()
    """
    atexit.register(_drop_context)


def _drop_context() -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        tff.test.set_no_default_context()
