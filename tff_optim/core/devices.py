"""The devices of an optimizer's state and step: the only file that uses `tf.device`.

TFF's worker process is built without GPU support. A device scope inside a TFF computation is kept
in its graph, but the worker places GPU operations on its CPU. A GPU is used by TensorFlow code that
runs in the Python process: an optimizer called directly, in a `tf.function`, or on the device of a
resident process.
"""

import contextlib

import attrs
import tensorflow as tf

from tff_optim.core.checks import check_flag, check_whole
from tff_optim.core.messages import refusal, shown


@attrs.frozen
class DevicePolicy:
    """The kind of device to use, and its number among that kind.

    Attributes:
      gpu: True for a GPU, False for a CPU, None to leave the placement to TensorFlow.
      index: The number of the device among those of its kind; None for the first.

    Example:
      >>> DevicePolicy(gpu=False, index=0)
      DevicePolicy(gpu=False, index=0)
    """

    gpu: bool | None = None
    index: int | None = None

    def __attrs_post_init__(self) -> None:
        check_flag("gpu", self.gpu, optional=True)
        check_whole("index", self.index, 0, optional=True)
        if self.gpu is None and self.index is not None:
            raise refusal(
                "index", "be None where `gpu` is", self.index, "Give `gpu` True or False."
            )


_policy = DevicePolicy()


def set_device_policy(gpu: bool | None, index: int | None = None) -> None:
    """Sets the policy of all optimizers that are later built without `device`.

    Args:
      gpu: True for a GPU, False for a CPU, None to leave the placement to TensorFlow.
      index: The number of the device among those of its kind; None for the first.

    Raises:
      ValueError: If an argument is malformed or there is no such device.

    Example:
      >>> import tff_optim
      >>> tff_optim.set_device_policy(gpu=False)
      >>> tff_optim.select_device()
      '/CPU:0'
      >>> tff_optim.set_device_policy(gpu=None)
    """
    policy = DevicePolicy(gpu, index)
    select_device(policy)  # raises if there is no such device
    global _policy
    _policy = policy


def get_device_policy() -> DevicePolicy:
    """Returns the policy of optimizers that are built without `device`.

    Example:
      >>> get_device_policy()
      DevicePolicy(gpu=None, index=None)
    """
    return _policy


def select_device(device: str | DevicePolicy | None = None) -> str | None:
    """Returns the requested device, after checking that it exists.

    Args:
      device: A device's name such as `"/GPU:0"` or `"CPU:1"`; a `DevicePolicy`; or None for the
        policy in force.

    Returns:
      `"/KIND:INDEX"`, or None if the placement is left to TensorFlow.

    Raises:
      TypeError: If `device` is of another type.
      ValueError: If TensorFlow in this process sees no such device.

    Example:
      >>> select_device("cpu:0")
      '/CPU:0'
    """
    if device is None:
        device = get_device_policy()
    if isinstance(device, DevicePolicy):
        if device.gpu is None:
            return None
        kind, index = ("GPU" if device.gpu else "CPU"), device.index or 0
    elif isinstance(device, str):
        try:
            spec = tf.DeviceSpec.from_string(device if device.startswith("/") else f"/{device}")
        except ValueError as error:
            raise refusal("device", 'be like "/GPU:0"', shown(device)) from error
        elsewhere = spec.job not in (None, "localhost") or spec.task or spec.replica
        if spec.device_type is None or elsewhere:
            raise refusal("device", 'be like "/GPU:0"', shown(device))
        kind, index = spec.device_type, spec.device_index or 0
    else:
        raise TypeError(
            f"`device` must be None, a string or a `DevicePolicy`; found {type(device).__name__}."
        )
    there = tf.config.list_logical_devices(kind)
    if not 0 <= index < len(there):
        names = ", ".join(d.name for d in tf.config.list_logical_devices())
        raise ValueError(
            f"`device` must be one that TensorFlow sees in this process, {names}; found "
            f"/{kind}:{index}. Choose one of those, or leave `device` out."
        )
    return f"/{kind}:{index}"


def device_scope(device: str | None) -> contextlib.AbstractContextManager:
    """A `tf.device` scope, or none if the placement is left to TensorFlow."""
    return contextlib.nullcontext() if device is None else tf.device(device)
