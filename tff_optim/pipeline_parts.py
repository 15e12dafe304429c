"""What a pipeline is made of: its arguments, checked, and its parts, named."""

from typing import Any

import attrs
import tensorflow as tf

from tff_optim import hyperparameters, projections
from tff_optim.core.messages import shown
from tff_optim.regularizers import Penalty
from tff_optim.transforms.interface import GradientTransform


def as_parts(name: str, given: Any) -> tuple[GradientTransform, ...]:
    """Reads the argument `name`, a sequence of transforms; Keras regularizers are wrapped.

    Raises:
      TypeError: If it is something else.
    """
    if not isinstance(given, list | tuple):
        raise TypeError(
            f"`{name}` must be a list or tuple; found {shown(given)}. Put it in a list."
        )
    parts = []
    for part in given:
        if name == "regularizers" and isinstance(part, tf.keras.regularizers.Regularizer):
            part = Penalty(part)
        if not isinstance(part, GradientTransform):
            also = ", tf.keras.regularizers.Regularizer" if name == "regularizers" else ""
            raise TypeError(
                f"`{name}` must hold instances of tff_optim.transforms.GradientTransform{also}; "
                f"found {shown(part)}. `tff_optim.from_config` reads names and configurations; "
                "`tff_optim.transforms.KerasTransform` wraps a Keras optimizer."
            )
        parts.append(part)
    return tuple(parts)


@attrs.frozen
class Pipeline:
    """What a pipeline is made of; the arguments of `build_optimizer`, checked."""

    learning_rate: Any = hyperparameters.non_negative(traceable=True)
    regularizers: tuple[GradientTransform, ...] = ()
    transforms: tuple[GradientTransform, ...] = ()
    weight_decay: Any = hyperparameters.non_negative(0.0, traceable=True)
    projection: tuple[projections.Projection, ...] = ()
    device: str | None = None
    jit_compile: bool = hyperparameters.flag(False)

    @property
    def decays(self) -> bool:
        """Whether there is a decay term: none if it is exactly 0, rather than one times 0."""
        # A tensor or a schedule may come to another value than 0.
        return not (isinstance(self.weight_decay, float) and self.weight_decay == 0.0)

    @property
    def rate_names(self) -> list[str]:
        """Those of learning rate and weight decay that are numbers in the state."""
        names = list(hyperparameters.intervals(self))
        return names if self.decays else [name for name in names if name != "weight_decay"]

    @property
    def parts(self) -> dict[str, GradientTransform]:
        """All parts in order, by class, numbered from its second use on: `Adam`, `Adam_2`."""
        parts: dict[str, GradientTransform] = {}
        last: dict[str, int] = {}
        for part in (*self.regularizers, *self.transforms):
            name = cls = type(part).__name__
            while name in parts:  # also by a class that is called `Adam_2`
                last[cls] = last.get(cls, 1) + 1
                name = f"{cls}_{last[cls]}"
            parts[name] = part
        return parts
