"""Optimizers of torch as entries of a configuration, and back from them."""

import functools
from collections.abc import Mapping

from tff_optim.backends.common import OptimizerKind, arguments_from_json
from tff_optim.backends.torch.optimizer import TorchOptimizer, build_torch_optimizer
from tff_optim.core.entries import Described, Entry
from tff_optim.core.types import Json


def _to_json(optimizer: TorchOptimizer) -> dict[str, Json]:
    recipe = optimizer.recipe
    entry = {"optimizer": recipe["optimizer"], "arguments": {**recipe["arguments"]}}
    return entry | ({"lr_scheduler": recipe["scheduler"]} if recipe["scheduler"] else {})


def _from_json(entry: Entry, fields: Mapping[str, Entry]) -> Described:
    pair = None
    if "lr_scheduler" in fields and fields["lr_scheduler"].value is not None:
        pair = fields["lr_scheduler"].value
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], dict)):
            fields["lr_scheduler"].refuse("be like ['StepLR', {'step_size': 10}]", TypeError)
    build = functools.partial(
        build_torch_optimizer,
        fields["optimizer"].value,
        python=entry.torch_python,
        trusted_packages=entry.trusted,
        lr_scheduler=pair,
    )
    return Described(entry, build, arguments_from_json(fields, build_torch_optimizer))


KIND = OptimizerKind(
    name="torch",
    cls=TorchOptimizer,
    to_json=_to_json,
    from_json=_from_json,
    names=("optimizer", "arguments", "lr_scheduler"),
    required=("optimizer",),
)
