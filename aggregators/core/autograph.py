"""AutoGraph for functions that users wrote, which may have control flow of tensors in Python."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_autograph = tf.__internal__.autograph
# Where this module is imported nothing forbids the conversion; in what surrounds the code it is off.
_CONTEXT = _autograph.control_status_ctx()


def with_autograph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Converts the control flow of a function, and of all that it calls.

    The code around it stays as it is: converting that takes seconds when a process is first built.

    Args:
      function: A function of a model, an optimizer or a rule.

    Returns:
      A function of the same arguments, in which `if tensor:` is an operation.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return _autograph.tf_convert(call, _CONTEXT)
