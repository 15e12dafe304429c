"""Pipelines as entries of a configuration, and back from them."""

from collections.abc import Callable, Mapping

import attrs

from tff_optim import hyperparameters
from tff_optim.config import registry
from tff_optim.core import entries
from tff_optim.core.entries import Described, Entry
from tff_optim.core.messages import shown
from tff_optim.core.types import Json, Value
from tff_optim.keras_objects import arguments as keras_arguments
from tff_optim.keras_objects import as_json as keras_objects
from tff_optim.keras_objects import classes as keras_classes
from tff_optim.pipeline import Pipeline, PipelineOptimizer, build_optimizer
from tff_optim.projections import Projection

# From a value, and its name for messages, to plain Python types.
Write = Callable[[object, str], Json]
# From an entry that describes an optimizer of any kind to what is described.
ReadOptimizer = Callable[[Entry], Described]

NAMES = tuple(field.name for field in attrs.fields(Pipeline))


def to_json(optimizer: PipelineOptimizer, write: Write) -> dict[str, Json]:
    """The entries of a pipeline; `write` writes the arguments of its parts, optimizers among them."""
    writers: dict[str, Callable[[Value], Json]] = {
        "regularizers": lambda parts: [_part_to_json(part, write) for part in parts],
        "transforms": lambda parts: [_part_to_json(part, write) for part in parts],
        "projection": lambda parts: [_projection_to_json(part, write) for part in parts],
    }
    values = {name: getattr(optimizer.pipeline, name) for name in NAMES}
    return {
        name: writers[name](value) if name in writers else write(value, name)
        for name, value in values.items()
    }


def _part_to_json(part: Value, write: Write) -> Json:
    if isinstance(part, Pipeline):
        return write(PipelineOptimizer(part), "transforms")
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


def _projection_to_json(projection: Projection, write: Write) -> dict[str, Json]:
    where, function = projection.where, projection.function
    if callable(where):
        raise ValueError(
            "`where` of `Projection` must be a regular expression, a rank or None to be written to a "
            f"configuration; found {shown(where)}."
        )
    is_keras = keras_objects.is_keras_object(function)
    written = write(function, "projection") if is_keras else _part_to_json(function, write)
    return {"function": written, "where": where}


def from_json(
    entry: Entry, fields: Mapping[str, Entry], read_optimizer: ReadOptimizer
) -> Described:
    """The pipeline of such entries; `read_optimizer` reads the optimizers in its parts."""

    def parts(part: Entry, read: Callable[..., Described], *known: Mapping[str, type]) -> list:
        return [read(item, *known, read_optimizer) for item in part.items(entries.MOST_PARTS)]

    readers: dict[str, Callable[[Entry], Value]] = {
        "learning_rate": keras_objects.rate_from_json,
        "weight_decay": keras_objects.rate_from_json,
        "regularizers": lambda part: parts(part, _part, registry.list_regularizers()),
        "transforms": lambda part: parts(part, _part, registry.list_transforms()),
        "projection": lambda part: parts(part, _projection),
        "exclude_from_weight_decay": lambda part: part.value,
        "weight_names": lambda part: None if part.value is None else part.strings(),
        "jit_compile": lambda part: part.value,
    }
    given = {name: read(fields[name]) for name, read in readers.items() if name in fields}
    return Described(entry, build_optimizer, given | {"device": entries.device(fields)})


def _part(entry: Entry, known: Mapping[str, type], read_optimizer: ReadOptimizer) -> Described:
    """A part: `Name`, `["Name", {arguments}]`, Keras' long form, or a pipeline's own entries."""
    if isinstance(entry.value, dict) and entry.value.get("kind") == "pipeline":
        return read_optimizer(entry)
    pair = isinstance(entry.value, list) and len(entry.value) == 2
    name = entry.at(0) if pair else entry
    if not isinstance(name.value, str):
        kinds = [k for k in keras_classes.KINDS if set(k.classes.values()) & set(known.values())]
        if kinds and keras_objects.is_described(entry):
            return keras_objects.from_json(entry, *kinds)
        entry.refuse("be like 'Name' or ['Name', {...}]", TypeError)
    if name.value not in known:
        name.refuse(
            f"be the name of a part{entries.suggestion(name.value, known)}",
            advice="`tff_optim.list_transforms()`, `list_regularizers()` and `list_projections()` list "
            "them. Import the package that registers it, if it is not built in.",
        )
    cls: Value = known[name.value]
    if keras_arguments.of_keras(cls):
        return keras_objects.from_json(entry, keras_classes.REGULARIZER, keras_classes.CONSTRAINT)
    name.check_trusted(keras_arguments.package_of(cls))
    given = entry.at(1) if pair else attrs.evolve(entry, value={})
    return Described(entry, cls, _arguments(cls, given, read_optimizer))


def _arguments(
    cls: Value, entry: Entry, read_optimizer: ReadOptimizer
) -> dict[str, Json | Described]:
    if not attrs.has(cls):
        return keras_objects.arguments_from_json(cls, entry)
    fields = {f.alias: f for f in attrs.fields(cls) if f.init}
    required = [alias for alias, f in fields.items() if f.default is attrs.NOTHING]
    arguments = {}
    for name, part in entry.fields(fields, required).items():
        of_field = keras_objects.rate_from_json if hyperparameters.is_field(fields[name]) else None
        read = of_field or fields[name].metadata.get(entries.READER, keras_objects.value_from_json)
        is_optimizer = isinstance(part.value, dict) and "kind" in part.value
        arguments[name] = read_optimizer(part) if is_optimizer else read(part)
    return arguments


def _projection(entry: Entry, read_optimizer: ReadOptimizer) -> Described:
    where = None
    function = entry
    if isinstance(entry.value, dict) and not keras_objects.is_described(entry):
        fields = entry.fields({"function", "where"}, {"function"})
        function = fields["function"]
        if "where" in fields and fields["where"].value is not None:
            where = fields["where"].value
    part = _part(function, registry.list_projections(), read_optimizer)
    return Described(entry, Projection, {"function": part, "where": where})
