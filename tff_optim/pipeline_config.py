"""Pipelines as entries of a configuration, and back from them."""

from collections.abc import Mapping
from typing import Any

import attrs

from tff_optim import config, entries, keras_arguments, keras_objects, patterns, registry
from tff_optim.entries import Entry
from tff_optim.pipeline import PipelineOptimizer, build_optimizer
from tff_optim.projections import Projection

_PACKAGE = __name__.partition(".")[0]


def to_json(optimizer: PipelineOptimizer) -> dict[str, Any]:
    """The entries of a pipeline."""
    pipeline = optimizer.pipeline
    return {
        "learning_rate": _value_to_json(pipeline.learning_rate, "learning_rate"),
        "regularizers": [_part_to_json(part) for part in pipeline.regularizers],
        "transforms": [_part_to_json(part) for part in pipeline.transforms],
        "weight_decay": _value_to_json(pipeline.weight_decay, "weight_decay"),
        "projection": [_projection_to_json(p) for p in pipeline.projection],
        "device": pipeline.device,
        "jit_compile": pipeline.jit_compile,
    }


def _part_to_json(part: Any) -> list[Any]:
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
    return [name, {key: _value_to_json(value, f"{name}.{key}") for key, value in arguments.items()}]


def _value_to_json(value: Any, name: str) -> Any:
    if isinstance(value, tuple(kind.cls for kind in config.KINDS)):
        return config.get_config(value)
    return keras_objects.to_json(value, name)


def _projection_to_json(projection: Projection) -> dict[str, Any]:
    where, function = projection.where, projection.function
    if where is not None and not isinstance(where, str):
        raise ValueError(
            "`where` of `Projection` must be a regular expression or None to be written to a "
            f"configuration; found {where!r}."
        )
    if where is not None:
        patterns.check(where)
    is_keras = keras_objects.is_keras_object(function)
    written = keras_objects.object_to_json(function) if is_keras else _part_to_json(function)
    return {"function": written, "where": where}


def from_json(fields: Mapping[str, Entry]) -> PipelineOptimizer:
    """The pipeline of such entries."""
    given: dict[str, Any] = {"device": entries.device(fields)}
    for name in ("learning_rate", "weight_decay"):
        if name in fields:
            given[name] = keras_objects.rate_from_json(fields[name])
    for name, known in (
        ("regularizers", registry.list_regularizers()),
        ("transforms", registry.list_transforms()),
    ):
        if name in fields:
            given[name] = [_part(entry, known) for entry in fields[name].items()]
    if "projection" in fields:
        given["projection"] = [_projection(entry) for entry in fields["projection"].items()]
    if "jit_compile" in fields:
        given["jit_compile"] = fields["jit_compile"].value
    return fields["kind"].whole.build(build_optimizer, **given)


def _part(entry: Entry, known: Mapping[str, type]) -> Any:
    """A part by name: `Name` or `["Name", {arguments}]`; those of Keras in its long form too."""
    pair = isinstance(entry.value, list) and len(entry.value) == 2
    name = entry.at(0) if pair else entry
    if not isinstance(name.value, str):
        kinds = [k for k in keras_objects.KINDS if set(k.classes.values()) & set(known.values())]
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
        return keras_objects.from_json(entry, keras_objects.REGULARIZER, keras_objects.CONSTRAINT)
    package = keras_arguments.package_of(cls)
    if package not in {_PACKAGE, *entry.trusted}:
        name.refuse(
            f"be of a package in `trusted_packages` {sorted(entry.trusted)}, not of {package!r}"
        )
    return entry.build(
        cls, **_arguments(cls, entry.at(1) if pair else attrs.evolve(entry, value={}))
    )


def _arguments(cls: Any, entry: Entry) -> dict[str, Any]:
    if not attrs.has(cls):
        return keras_objects.arguments_from_json(cls, entry)
    fields = {f.alias: f for f in attrs.fields(cls) if f.init}
    required = [alias for alias, f in fields.items() if f.default is attrs.NOTHING]
    arguments = {}
    for name, part in entry.fields(fields, required).items():
        read = fields[name].metadata.get(entries.READER, keras_objects.value_from_json)
        is_optimizer = isinstance(part.value, dict) and "kind" in part.value
        arguments[name] = config.from_entry(part) if is_optimizer else read(part)
    return arguments


def _projection(entry: Entry) -> Projection:
    where = None
    function = entry
    if isinstance(entry.value, dict) and not keras_objects.is_described(entry):
        fields = entry.fields({"function", "where"}, {"function"})
        function = fields["function"]
        if "where" in fields and fields["where"].value is not None:
            where = fields["where"].value
            if not isinstance(where, str):
                fields["where"].refuse("be a regular expression or None", TypeError)
            fields["where"].build(patterns.check, where)
    return entry.build(Projection, _part(function, registry.list_projections()), where)
