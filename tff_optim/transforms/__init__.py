"""Gradient transforms: what a pipeline is made of."""

from tff_optim.transforms.adaptive import Adagrad, Adam, RMSProp, Yogi
from tff_optim.transforms.clipping import ClipByGlobalNorm, ClipByNorm
from tff_optim.transforms.elementwise import ElementwiseTransform
from tff_optim.transforms.interface import GradientTransform
from tff_optim.transforms.keras_transform import KerasTransform
from tff_optim.transforms.momentum import EWMA, Momentum, YogiMomentum
from tff_optim.transforms.noise import GaussianNoise
from tff_optim.transforms.optax_transform import OptaxTransform

__all__ = [
    "EWMA",
    "Adagrad",
    "Adam",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ElementwiseTransform",
    "GaussianNoise",
    "GradientTransform",
    "KerasTransform",
    "Momentum",
    "OptaxTransform",
    "RMSProp",
    "Yogi",
    "YogiMomentum",
]
