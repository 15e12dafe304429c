"""Optimizers as JSON, and back from it."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import attrs
import tensorflow as tf

from tff_optim import keras_configs, registry
from tff_optim.keras_optimizer import KerasOptimizer, build_keras_optimizer
from tff_optim.pipeline import PipelineOptimizer, build_optimizer
from tff_optim.projections import Projection

_PACKAGE = __name__.partition(".")[0]
_KERAS = {"kind", "optimizer", "exclude_from_weight_decay", "weight_names", "device"}
_PIPELINE_REQUIRED = {"kind", "learning_rate"}
_PIPELINE = _PIPELINE_REQUIRED | {
    "regularizers",
    "transforms",
    "weight_decay",
    "projection",
    "device",
    "jit_compile",
}


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
    if isinstance(optimizer, KerasOptimizer):
        keras = optimizer.keras_optimizer
        if tf.is_symbolic_tensor(optimizer.learning_rate):
            raise ValueError(
                "`optimizer` was built with a tensor of a TFF computation as its `learning_rate`; "
                f"found {optimizer.learning_rate!r}, which JSON cannot hold."
            )
        return {
            "kind": "keras",
            "optimizer": keras_configs.object_to_json(keras),
            # Set by a method and missing from Keras' own configuration.
            "exclude_from_weight_decay": list(
                getattr(keras, "_exclude_from_weight_decay_names", None) or []
            ),
            "weight_names": None if optimizer.weight_names is None else [*optimizer.weight_names],
            "device": optimizer.device,
        }
    if isinstance(optimizer, PipelineOptimizer):
        pipeline = optimizer.pipeline
        return {
            "kind": "pipeline",
            "learning_rate": _value_to_json(pipeline.learning_rate, "learning_rate"),
            "regularizers": [_part_to_json(part) for part in pipeline.regularizers],
            "transforms": [_part_to_json(part) for part in pipeline.transforms],
            "weight_decay": _value_to_json(pipeline.weight_decay, "weight_decay"),
            "projection": [_projection_to_json(p) for p in pipeline.projection],
            "device": pipeline.device,
            "jit_compile": pipeline.jit_compile,
        }
    raise TypeError(
        "`optimizer` must be one that tff_optim.build_optimizer or tff_optim.build_keras_optimizer "
        f"returned; found {type(optimizer).__name__}."
    )


def _value_to_json(value: Any, name: str) -> Any:
    if isinstance(value, KerasOptimizer | PipelineOptimizer):
        return get_config(value)
    return keras_configs.to_json(value, name)


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
    if projection.where is not None and not isinstance(projection.where, str):
        raise ValueError(
            "`where` of `Projection` must be a regular expression or None to be written to a "
            f"configuration; found {projection.where!r}."
        )
    function = projection.function
    written = (
        keras_configs.object_to_json(function)
        if keras_configs.is_keras_object(function)
        else _part_to_json(function)
    )
    return {"function": written, "where": projection.where}


def from_config(config: Mapping[str, Any], *, trusted_packages: Collection[str] = ()) -> Any:
    """Builds the optimizer that a configuration describes.

    Besides what `get_config` writes, `regularizers` and `transforms` may have entries `name` and
    `[name, some arguments]`, as declearn's lists do: `list_regularizers` and `list_transforms` say
    which names. `learning_rate` and `kind` are needed for a pipeline; what else is missing there
    has its default. A Keras object must be described in full.

    Only classes of Keras, of this package and of `trusted_packages` are built, and nothing is
    imported: import the packages of your own classes first. `config` is not changed.

    Args:
      config: A dictionary as of `get_config`, straight or through JSON.
      trusted_packages: Names of top-level packages whose classes may be built too.

    Returns:
      The optimizer.

    Raises:
      TypeError: If an entry is of the wrong type.
      ValueError: If an entry is unknown, missing, out of range or not trusted.

    Example:
      >>> optimizer = from_config(
      ...     {
      ...         "kind": "pipeline",
      ...         "learning_rate": 0.1,
      ...         "regularizers": [["FedProx", {"alpha": 0.5}]],
      ...         "transforms": ["Adam"],
      ...     }
      ... )
      >>> from_config(get_config(optimizer)) == optimizer
      True
    """
    if isinstance(trusted_packages, str):
        raise TypeError(
            f"`trusted_packages` must be a collection of names; found {trusted_packages!r}."
        )
    if not isinstance(config, Mapping):
        raise TypeError(f"`config` must be a mapping; found {config!r}.")
    kind = config.get("kind")
    if kind == "keras":
        _check_entries(config, _KERAS, _KERAS)
        return _keras_from_json(config, trusted_packages)
    if kind == "pipeline":
        _check_entries(config, _PIPELINE, _PIPELINE_REQUIRED)
        return _pipeline_from_json(config, trusted_packages)
    raise ValueError(f"`kind` of `config` must be 'keras' or 'pipeline'; found {kind!r}.")


def _check_entries(config: Mapping[str, Any], known: set[str], required: set[str]) -> None:
    if unknown := sorted(set(config) - known):
        raise ValueError(f"`config` must have the entries {sorted(known)}; found {unknown}.")
    if missing := sorted(required - set(config)):
        raise ValueError(f"`config` must have the entries {missing}; found them missing.")


def _keras_from_json(config: Mapping[str, Any], trusted: Collection[str]) -> KerasOptimizer:
    if not keras_configs.is_keras_config(config["optimizer"]):
        raise TypeError(
            "`optimizer` of `config` must be a Keras object as `get_config` writes it; "
            f"found {config['optimizer']!r}."
        )
    keras = keras_configs.object_from_json(config["optimizer"], trusted)
    if not isinstance(keras, tf.keras.optimizers.Optimizer):
        raise TypeError(f"`optimizer` of `config` must be an optimizer; found {keras!r}.")
    excluded, names = config["exclude_from_weight_decay"], config["weight_names"]
    _check_strings("exclude_from_weight_decay", excluded)
    if names is not None:
        _check_strings("weight_names", names)
    if excluded:
        keras.exclude_from_weight_decay(var_names=list(excluded))
    return build_keras_optimizer(keras, device=config["device"], weight_names=names)


def _check_strings(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"`{name}` of `config` must be a list of strings; found {value!r}.")


def _pipeline_from_json(config: Mapping[str, Any], trusted: Collection[str]) -> PipelineOptimizer:
    regularizers = _list("regularizers", config)
    transforms = _list("transforms", config)
    projection = _list("projection", config)
    return build_optimizer(
        _value_from_json(config["learning_rate"], trusted),
        regularizers=[
            _part_from_json(e, "regularizers", registry.list_regularizers(), trusted)
            for e in regularizers
        ],
        transforms=[
            _part_from_json(e, "transforms", registry.list_transforms(), trusted)
            for e in transforms
        ],
        weight_decay=_value_from_json(config.get("weight_decay", 0.0), trusted),
        projection=[_projection_from_json(e, trusted) for e in projection],
        device=config.get("device"),
        jit_compile=config.get("jit_compile", False),
    )


def _list(name: str, config: Mapping[str, Any]) -> list[Any]:
    value = config.get(name, [])
    if not isinstance(value, list | tuple):
        raise TypeError(f"`{name}` of `config` must be a list; found {value!r}.")
    return list(value)


def _value_from_json(value: Any, trusted: Collection[str]) -> Any:
    if keras_configs.is_keras_config(value):
        return keras_configs.object_from_json(value, trusted)
    if isinstance(value, Mapping) and "kind" in value:
        return from_config(value, trusted_packages=trusted)
    return json.loads(json.dumps(value))  # a copy: nothing of the caller's is kept


def _part_from_json(
    entry: Any, where: str, names: Mapping[str, type], trusted: Collection[str]
) -> Any:
    if keras_configs.is_keras_config(entry):
        return keras_configs.object_from_json(entry, trusted)
    pair = [entry, {}] if isinstance(entry, str) else entry
    if (
        not isinstance(pair, list | tuple)
        or len(pair) != 2
        or not isinstance(pair[0], str)
        or not isinstance(pair[1], Mapping)
    ):
        raise TypeError(
            f"`{where}` of `config` must hold entries like 'Name' or ['Name', {{...}}]; "
            f"found {entry!r}."
        )
    name, arguments = pair
    if name not in names:
        raise ValueError(
            f"`{where}` of `config` must name one of {sorted(names)}; found {name!r}. Import the "
            "package that registers it, if it is not built in."
        )
    cls = names[name]
    package = registry.package_of(cls)
    if package not in {_PACKAGE, "keras", *trusted}:
        raise ValueError(
            f"`{where}` of `config` must name classes of packages in `trusted_packages` "
            f"{sorted(trusted)}; found {name!r} of {package!r}."
        )
    return _construct(cls, name, {k: _value_from_json(v, trusted) for k, v in arguments.items()})


def _construct(cls: Any, name: str, arguments: Mapping[str, Any]) -> Any:
    if attrs.has(cls):
        fields = {f.alias: f for f in attrs.fields(cls) if f.init}
        if unknown := sorted(set(arguments) - set(fields)):
            raise ValueError(
                f"`config` of `{name}` must have the entries {sorted(fields)}; found {unknown}."
            )
        required = {alias for alias, f in fields.items() if f.default is attrs.NOTHING}
        if missing := sorted(required - set(arguments)):
            raise ValueError(f"`config` of `{name}` must have {missing}; found them missing.")
        return cls(**arguments)
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`config` of `{name}` does not fit its constructor: {error}") from error


def _projection_from_json(entry: Any, trusted: Collection[str]) -> Projection:
    if not isinstance(entry, Mapping) or "function" not in entry:
        entry = {"function": entry}
    if unknown := sorted(set(entry) - {"function", "where"}):
        raise ValueError(
            f"`projection` of `config` must have the entries function and where; found {unknown}."
        )
    function = _part_from_json(
        entry["function"], "projection", registry.list_projections(), trusted
    )
    return Projection(function, entry.get("where"))
