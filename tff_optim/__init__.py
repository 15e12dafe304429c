"""Keras optimizers, and pipelines around them, as pure TFF optimizers."""

from tff_optim._requirements import check_tff

check_tff()  # before the imports below, which would fail less readably

from tff_optim import hyperparameters, projections, regularizers, schedules, simulation, transforms
from tff_optim.backends.keras.optimizer import build_keras_optimizer
from tff_optim.backends.optax.optimizer import build_optax_optimizer
from tff_optim.backends.torch.optimizer import build_torch_optimizer
from tff_optim.computations import build_optimizer_computations
from tff_optim.config.optimizers import from_config, get_config
from tff_optim.config.registry import (
    list_projections,
    list_regularizers,
    list_transforms,
    register_transform,
)
from tff_optim.core.devices import DevicePolicy, get_device_policy, select_device, set_device_policy
from tff_optim.pipeline import build_optimizer
from tff_optim.resident import ResidentProcess

__all__ = [
    "DevicePolicy",
    "ResidentProcess",
    "build_keras_optimizer",
    "build_optax_optimizer",
    "build_optimizer",
    "build_optimizer_computations",
    "build_torch_optimizer",
    "from_config",
    "get_config",
    "get_device_policy",
    "hyperparameters",
    "list_projections",
    "list_regularizers",
    "list_transforms",
    "projections",
    "register_transform",
    "regularizers",
    "schedules",
    "select_device",
    "set_device_policy",
    "simulation",
    "transforms",
]
