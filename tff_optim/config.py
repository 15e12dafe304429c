"""Optimizers as JSON, and back from it."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs

from tff_optim import (
    declearn_configs,
    devices,
    entries,
    keras_arguments,
    keras_objects,
    keras_step,
    patterns,
    registry,
)
from tff_optim.entries import Entry
from tff_optim.keras_optimizer import KerasOptimizer, build_keras_optimizer
from tff_optim.pipeline import PipelineOptimizer, build_optimizer
from tff_optim.projections import Projection

_PACKAGE = __name__.partition(".")[0]


@attrs.frozen
class OptimizerKind:
    """A kind of optimizer, and how a configuration holds it.

    Attributes:
      name: The value of `kind` in a configuration.
      cls: The class of such optimizers.
      to_json: From an optimizer to its entries, in plain Python types.
      from_json: From entries by name to an optimizer.
      names: The names of the entries.
      required: Those that may not be left out.
    """

    name: str
    cls: type
    to_json: Callable[[Any], dict[str, Any]]
    from_json: Callable[[Mapping[str, Entry]], Any]
    names: tuple[str, ...]
    required: tuple[str, ...]


def get_config(optimizer: Any) -> dict[str, Any]:
    """Describes an optimizer in JSON.

    Args:
      optimizer: What `tff_optim.build_optimizer` or `tff_optim.build_keras_optimizer` returned.

    Returns:
      A dictionary of plain Python types, from which `from_config` builds an equal optimizer. Each
      regularizer and transform is an entry `[name, arguments]`.

    Raises:
      TypeError: If `optimizer` is not of this package.
      ValueError: If it holds something that cannot be named or written, such as a function.

    Example:
      >>> import tff_optim
      >>> momentum = tff_optim.transforms.Momentum(0.5)
      >>> config = get_config(build_optimizer(0.1, transforms=[momentum]))
      >>> config["transforms"]
      [['Momentum', {'beta': 0.5, 'nesterov': False}]]
    """
    for kind in KINDS:
        if isinstance(optimizer, kind.cls):
            return {"kind": kind.name, **kind.to_json(optimizer)}
    raise TypeError(
        "`optimizer` must be one that a `build_` function of tff_optim returned; found "
        f"{type(optimizer).__name__}."
    )


def from_config(config: Any, *, trusted_packages: Collection[str] = ()) -> Any:
    """Builds the optimizer that a configuration describes.

    A configuration is what `get_config` writes, or shorter:

    - A Keras optimizer by name or `[name, some arguments]`, or as `tf.keras.optimizers.serialize`
      writes it. Schedules, regularizers and constraints of Keras have the same forms.
    - `{"kind": "pipeline", "learning_rate": ...}`, where `regularizers`, `transforms` and `projection`
      have entries `name` and `[name, some arguments]`: `list_regularizers` and `list_transforms` say
      which names. What is left out has its default.
    - An `Optimizer` configuration of declearn (`lrate`, `w_decay`, `regularizers`, `modules`); see
      `tff_optim.declearn_configs`.

    Only classes of Keras, of this package and of `trusted_packages` are built, and nothing is
    imported: import the packages of your own classes first. Regular expressions are matched in
    bounded time (`tff_optim.patterns`).

    Args:
      config: A configuration, as JSON text, or the path of a JSON file. It is not changed.
      trusted_packages: Names of top-level packages whose classes may be built too.

    Returns:
      The optimizer.

    Raises:
      TypeError: If an entry is of the wrong type.
      ValueError: If an entry is unknown, missing, out of range or not trusted, or a file cannot be
        read. The message says where the entry stands.

    Example:
      >>> decay = {"initial_learning_rate": 0.1, "decay_steps": 100, "decay_rate": 0.5}
      >>> optimizer = from_config(
      ...     {
      ...         "kind": "pipeline",
      ...         "learning_rate": ["ExponentialDecay", decay],
      ...         "regularizers": [["FedProx", {"alpha": 0.5}]],
      ...         "transforms": ["Adam"],
      ...     }
      ... )
      >>> from_config(get_config(optimizer)) == optimizer
      True
      >>> optimizer = from_config(["SGD", {"learning_rate": 0.5}])
      >>> from_config(get_config(optimizer)) == optimizer
      True
    """
    if isinstance(trusted_packages, str) or not all(isinstance(p, str) for p in trusted_packages):
        raise TypeError(
            f"`trusted_packages` must be a collection of names; found {trusted_packages!r}."
        )
    return _optimizer(entries.read(config, trusted_packages))


def _optimizer(entry: Entry) -> Any:
    value = entry.value
    if isinstance(value, str | list) or keras_objects.is_described(entry):
        keras = keras_objects.from_json(entry, keras_objects.OPTIMIZER)
        return entry.build(build_keras_optimizer, keras)
    if isinstance(value, dict) and "lrate" in value:
        return declearn_configs.from_json(entry)
    if not isinstance(value, dict) or "kind" not in value:
        entry.refuse(
            "be a mapping with `kind`, the name of a Keras optimizer, [name, arguments], or a "
            "configuration of Keras or declearn",
            ValueError if isinstance(value, dict) else TypeError,
        )
    kinds = {kind.name: kind for kind in KINDS}
    if not isinstance(value["kind"], str) or value["kind"] not in kinds:
        entry.at("kind").refuse(f"be one of {list(kinds)}")
    kind = kinds[value["kind"]]
    return kind.from_json(entry.fields({"kind", *kind.names}, kind.required))


def _value_to_json(value: Any, name: str) -> Any:
    if isinstance(value, tuple(kind.cls for kind in KINDS)):
        return get_config(value)
    return keras_objects.to_json(value, name)


# ------------------------------------------------------------------------------- Keras optimizers


def _keras_to_json(optimizer: KerasOptimizer) -> dict[str, Any]:
    keras = optimizer.keras_optimizer
    _value_to_json(optimizer.learning_rate, "learning_rate")  # raises for a tensor of a computation
    excluded = keras_step.excluded_patterns(keras)
    for pattern in excluded:
        patterns.check(pattern)
    return {
        "optimizer": keras_objects.object_to_json(keras),
        # Set by a method and missing from Keras' own configuration.
        "exclude_from_weight_decay": excluded,
        "weight_names": None if optimizer.weight_names is None else [*optimizer.weight_names],
        "device": optimizer.device,
    }


def _keras_from_json(fields: Mapping[str, Entry]) -> KerasOptimizer:
    keras = keras_objects.from_json(fields["optimizer"], keras_objects.OPTIMIZER)
    if "exclude_from_weight_decay" in fields:
        excluded = fields["exclude_from_weight_decay"]
        for i, pattern in enumerate(excluded.strings()):
            excluded.at(i).build(patterns.check, pattern)
        if excluded.value:
            keras.exclude_from_weight_decay(var_names=excluded.strings())
    names = fields.get("weight_names")
    return fields["optimizer"].build(
        build_keras_optimizer,
        keras,
        weight_names=None if names is None or names.value is None else names.strings(),
        device=_device(fields),
    )


def _device(fields: Mapping[str, Entry]) -> str | None:
    if "device" not in fields:
        return None
    device = fields["device"]
    return None if device.value is None else device.build(devices.select_device, device.value)


# --------------------------------------------------------------------------------------- pipelines


def _pipeline_to_json(optimizer: PipelineOptimizer) -> dict[str, Any]:
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


def _pipeline_from_json(fields: Mapping[str, Entry]) -> PipelineOptimizer:
    given: dict[str, Any] = {"device": _device(fields)}
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
    return attrs.evolve(fields["kind"], path="").build(build_optimizer, **given)


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
        arguments[name] = _optimizer(part) if is_optimizer else read(part)
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


KINDS = (
    OptimizerKind(
        name="keras",
        cls=KerasOptimizer,
        to_json=_keras_to_json,
        from_json=_keras_from_json,
        names=("optimizer", "exclude_from_weight_decay", "weight_names", "device"),
        required=("optimizer",),
    ),
    OptimizerKind(
        name="pipeline",
        cls=PipelineOptimizer,
        to_json=_pipeline_to_json,
        from_json=_pipeline_from_json,
        names=(
            "learning_rate",
            "regularizers",
            "transforms",
            "weight_decay",
            "projection",
            "device",
            "jit_compile",
        ),
        required=("learning_rate",),
    ),
)
