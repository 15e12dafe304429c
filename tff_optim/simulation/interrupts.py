"""Ctrl-C that lets a round end."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


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

    Only the main thread receives signals: elsewhere, and where SIGINT is ignored or handled by
    other code than Python's, nothing is changed.
    """
    interrupt = Interrupt()
    before = signal.getsignal(signal.SIGINT)
    mine = threading.current_thread() is threading.main_thread()
    if not mine or before is not signal.default_int_handler:
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
