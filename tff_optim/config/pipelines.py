"""Pipelines as entries of a configuration, and back from them."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from tff_optim.config import registry
from tff_optim.core import entries
from tff_optim.core.entries import Entry
from tff_optim.core.messages import shown
from tff_optim.keras_objects import arguments as keras_arguments
from tff_optim.keras_objects import as_json as keras_objects
from tff_optim.keras_objects import classes as keras_classes
from tff_optim.pipeline import PipelineOptimizer, build_optimizer
from tff_optim.projections import Projection

# From a value, and its name for messages, to plain Python types.
Write = Callable[[Any, str], Any]
# From an entry that describes an optimizer of any kind to that optimizer.
ReadOptimizer = Callable[[Entry], Any]

_PACKAGE = __name__.partition(".")[0]


def to_json(optimizer: PipelineOptimizer, write: Write) -> dict[str, Any]:
    """The entries of a pipeline; `write` writes the arguments of its parts, optimizers among them."""
    pipeline = optimizer.pipeline
    return {
        "learning_rate": write(pipeline.learning_rate, "learning_rate"),
        "regularizers": [_part_to_json(part, write) for part in pipeline.regularizers],
        "transforms": [_part_to_json(part, write) for part in pipeline.transforms],
        "weight_decay": write(pipeline.weight_decay, "weight_decay"),
        "projection": [_projection_to_json(p, write) for p in pipeline.projection],
        "device": pipeline.device,
        "jit_compile": pipeline.jit_compile,
    }


def _part_to_json(part: Any, write: Write) -> list[Any]:
    cls = type(part)
    name = registry.name_of(cls)
    if attrs.has(cls):
        arguments = {f.alias: getattr(part, f.name) for f in attrs.fields(cls) if f.init}
    elif hasattr(part, "get_config"):
        arguments = part.get_config()
    else:
        raise ValueError(
            f"`{name}` must be an attrs class or have a `get_config` method to be written to a "
            "configuration; found neither."
        )
    return [name, {key: write(value, f"{name}.{key}") for key, value in arguments.items()}]


def _projection_to_json(projection: Projection, write: Write) -> dict[str, Any]:
    where, function = projection.where, projection.function
    if where is not None and not isinstance(where, str):
        raise ValueError(
            "`where` of `Projection` must be a regular expression or None to be written to a "
            f"configuration; found {shown(where)}."
        )
    is_keras = keras_objects.is_keras_object(function)
    written = write(function, "projection") if is_keras else _part_to_json(function, write)
    return {"function": written, "where": where}


def from_json(fields: Mapping[str, Entry], read_optimizer: ReadOptimizer) -> PipelineOptimizer:
    """The pipeline of such entries; `read_optimizer` builds the optimizers in its parts."""
    given: dict[str, Any] = {"device": entries.device(fields)}
    for name in ("learning_rate", "weight_decay"):
        if name in fields:
            given[name] = keras_objects.rate_from_json(fields[name])
    for name, known in (
        ("regularizers", registry.list_regularizers()),
        ("transforms", registry.list_transforms()),
    ):
        if name in fields:
            given[name] = [
                _part(entry, known, read_optimizer)
                for entry in fields[name].items(entries.MOST_PARTS)
            ]
    if "projection" in fields:
        given["projection"] = [
            _projection(entry, read_optimizer)
            for entry in fields["projection"].items(entries.MOST_PARTS)
        ]
    if "jit_compile" in fields:
        given["jit_compile"] = fields["jit_compile"].value
    return fields["kind"].whole.build(build_optimizer, **given)


def _part(entry: Entry, known: Mapping[str, type], read_optimizer: ReadOptimizer) -> Any:
    """A part by name: `Name` or `["Name", {arguments}]`; those of Keras in its long form too."""
    pair = isinstance(entry.value, list) and len(entry.value) == 2
    name = entry.at(0) if pair else entry
    if not isinstance(name.value, str):
        kinds = [k for k in keras_classes.KINDS if set(k.classes.values()) & set(known.values())]
        if kinds and keras_objects.is_described(entry):
            return keras_objects.from_json(entry, *kinds)
        entry.refuse("be like 'Name' or ['Name', {...}]", TypeError)
    if name.value not in known:
        name.refuse(
            f"be a name that is known here{entries.suggestion(name.value, known)}: `tff_optim.list_"
            "transforms()`, `list_regularizers()` and `list_projections()` say which. Import the "
            "package that registers it, if it is not built in"
        )
    cls: Any = known[name.value]
    if keras_arguments.of_keras(cls):
        return keras_objects.from_json(entry, keras_classes.REGULARIZER, keras_classes.CONSTRAINT)
    package = keras_arguments.package_of(cls)
    if package not in {_PACKAGE, *entry.trusted}:
        name.refuse(
            f"be of a package in `trusted_packages` {sorted(entry.trusted)}, not of {package!r}"
        )
    given = entry.at(1) if pair else attrs.evolve(entry, value={})
    return entry.build(cls, **_arguments(cls, given, read_optimizer))


def _arguments(cls: Any, entry: Entry, read_optimizer: ReadOptimizer) -> dict[str, Any]:
    if not attrs.has(cls):
        return keras_objects.arguments_from_json(cls, entry)
    fields = {f.alias: f for f in attrs.fields(cls) if f.init}
    required = [alias for alias, f in fields.items() if f.default is attrs.NOTHING]
    arguments = {}
    for name, part in entry.fields(fields, required).items():
        read = fields[name].metadata.get(entries.READER, keras_objects.value_from_json)
        is_optimizer = isinstance(part.value, dict) and "kind" in part.value
        arguments[name] = read_optimizer(part) if is_optimizer else read(part)
    return arguments


def _projection(entry: Entry, read_optimizer: ReadOptimizer) -> Projection:
    where = None
    function = entry
    if isinstance(entry.value, dict) and not keras_objects.is_described(entry):
        fields = entry.fields({"function", "where"}, {"function"})
        function = fields["function"]
        if "where" in fields and fields["where"].value is not None:
            where = fields["where"].value
    part = _part(function, registry.list_projections(), read_optimizer)
    return entry.build(Projection, part, where)
