"""Ctrl-C where it is ignored, and TFF's way of ending its worker by it."""

import signal
import threading


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
    if ignored and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda number, frame: None)
