"""Event loops and threads for runs, one or several at once."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence
from typing import TypeVar

import tensorflow_federated as tff

from tff_optim.core.types import Value
from tff_optim.interrupts import Interrupt

_T = TypeVar("_T")


def wait(coroutine: Value) -> Value:
    """Runs a coroutine on this thread's loop until it ends."""
    return asyncio.get_event_loop().run_until_complete(coroutine)


def on_a_loop(function: Callable[[], _T]) -> _T:
    """Calls a function with a free event loop, as TFF's training loop needs one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _with_new_loop(function)
    # A notebook's thread is inside its own event loop: TFF's runs in another one.
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        return pool.submit(_with_context_of_here(function)).result()
    finally:
        pool.shutdown(wait=False)


def side_by_side(
    lanes: Sequence[Callable[[], list[_T]]], at_once: int, interrupt: Interrupt
) -> list[list[_T]]:
    """Calls functions in threads, some at once; if one fails, the others end after their rounds.

    Args:
      lanes: The functions.
      at_once: The number of threads.
      interrupt: Requested when one has failed.

    Returns:
      The functions' results, in order.
    """
    pool = concurrent.futures.ThreadPoolExecutor(at_once, thread_name_prefix="run")
    try:
        futures = [pool.submit(_with_context_of_here(lane)) for lane in lanes]
        concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        failed = [future for future in futures if future.done() and future.exception()]
        interrupt.requested = interrupt.requested or bool(failed)
        concurrent.futures.wait(futures)
        ended = sorted(futures, key=lambda future: future not in failed)  # the first to fail
        errors = [error for future in ended if (error := future.exception())]
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"Another run has failed too: {other!r}")
            raise errors[0]
        return [future.result() for future in futures]
    finally:
        # After a second Ctrl-C the threads end after their rounds, without anyone waiting for them.
        pool.shutdown(wait=False, cancel_futures=True)


def _with_context_of_here(function: Callable[[], _T]) -> Callable[[], _T]:
    """The function for another thread, which has no TFF context of its own."""
    context = tff.framework.get_context_stack().current

    def elsewhere() -> _T:
        with tff.framework.get_context_stack().install(context):
            return _with_new_loop(function)

    return elsewhere


def _with_new_loop(function: Callable[[], _T]) -> _T:
    try:
        before = asyncio.get_event_loop_policy().get_event_loop()
    except RuntimeError:  # this thread has none
        before = None
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return function()
    finally:
        asyncio.set_event_loop(before)
        loop.close()
