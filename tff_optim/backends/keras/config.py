"""Keras optimizers as entries of a configuration, and back from them."""

from collections.abc import Mapping, Sequence

from tff_optim.backends.common import OptimizerKind, names_and_device, names_and_device_to_json
from tff_optim.backends.keras import copies
from tff_optim.backends.keras.copies import Keras
from tff_optim.backends.keras.optimizer import KerasOptimizer, build_keras_optimizer
from tff_optim.core import entries
from tff_optim.core.entries import Described, Entry
from tff_optim.core.types import Json, Value
from tff_optim.keras_objects import as_json as keras_objects


def _to_json(optimizer: KerasOptimizer) -> dict[str, Json]:
    keras = optimizer.keras_optimizer
    # Raises for a tensor of a computation.
    keras_objects.to_json(optimizer.learning_rate, "learning_rate")
    return {
        "optimizer": keras_objects.object_to_json(keras),
        # A method sets these, and Keras' own configuration lacks them.
        "exclude_from_weight_decay": copies.excluded_patterns(keras),
        **names_and_device_to_json(optimizer),
    }


def _from_json(entry: Entry, fields: Mapping[str, Entry]) -> Described:
    del entry  # messages name the entry of the Keras optimizer
    excluded = fields.get("exclude_from_weight_decay")
    arguments = {
        "optimizer": keras_objects.optimizer_from_json(fields["optimizer"]),
        "excluded": () if excluded is None else excluded.strings(entries.MOST_PARTS),
        **names_and_device(fields),
    }
    return Described(fields["optimizer"], _build, arguments)


def _build(optimizer: Keras, excluded: Sequence[str], **place: Value) -> KerasOptimizer:
    if excluded:
        optimizer.exclude_from_weight_decay(var_names=list(excluded))
    return build_keras_optimizer(optimizer, **place)


KIND = OptimizerKind(
    name="keras",
    cls=KerasOptimizer,
    to_json=_to_json,
    from_json=_from_json,
    names=("optimizer", "exclude_from_weight_decay", "weight_names", "device"),
    required=("optimizer",),
)
