"""TFF's way of ending its worker: where Ctrl-C is ignored, and where the program ends."""

import atexit
import functools
import signal
import threading

import tensorflow_federated as tff


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
