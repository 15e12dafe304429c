"""AutoGraph for users' functions, which may branch and loop on tensors in Python."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_autograph = tf.__internal__.autograph
# The context at import allows conversion; the context in which users' code is called may forbid it.
_CONTEXT = _autograph.control_status_ctx()


def with_autograph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Converts the control flow of a function, and of all that it calls, to operations.

    The calling code stays unconverted: converting it takes seconds when a process is first built.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return _autograph.tf_convert(call, _CONTEXT)
