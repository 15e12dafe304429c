"""Optimizers as JSON, and back from it."""

import os
from collections.abc import Collection

import attrs

from tff_optim.backends.common import OptimizerKind, PureOptimizer
from tff_optim.backends.keras import config as keras_config
from tff_optim.backends.keras.optimizer import build_keras_optimizer
from tff_optim.backends.optax import config as optax_config
from tff_optim.backends.torch import config as torch_config
from tff_optim.config import declearn, pipelines
from tff_optim.core import entries
from tff_optim.core.entries import Described, Entry, built
from tff_optim.core.types import Json, Value
from tff_optim.keras_objects import as_json as keras_objects
from tff_optim.pipeline import PipelineOptimizer


def get_config(optimizer: PureOptimizer) -> dict[str, Json]:
    """Describes an optimizer in JSON.

    Args:
      optimizer: The result of a `build_` function of `tff_optim`.

    Returns:
      A dictionary of plain Python types, from which `from_config` builds an equal optimizer. Each
      regularizer and transform is an entry `[name, arguments]`. An optimizer of optax can be written if
      it was built of a public factory of optax (`optax.adam`, not `optax.adam(0.1)`) and of plain
      arguments. One of torch is written without the path of its Python, which differs by machine.

    Raises:
      TypeError: If `optimizer` is not of this package.
      ValueError: If it holds something that cannot be named or written, such as a function or a
        ready optax transformation. The message says what to give instead.

    Example:
      >>> import tff_optim
      >>> momentum = tff_optim.transforms.Momentum(0.5)
      >>> config = get_config(tff_optim.build_optimizer(0.1, transforms=[momentum]))
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


def from_config(
    config: Json | os.PathLike,
    *,
    trusted_packages: Collection[str] = (),
    torch_python: str | os.PathLike | None = None,
) -> PureOptimizer:
    """Builds the optimizer that a configuration describes.

    A configuration is what `get_config` writes, or shorter:

    - A Keras optimizer by name or `[name, some arguments]`, or as `tf.keras.optimizers.serialize`
      writes it. Schedules, regularizers and constraints of Keras have the same forms.
    - `{"kind": "pipeline", "learning_rate": ...}`, where `regularizers`, `transforms` and `projection`
      have entries `name` and `[name, some arguments]`: `list_regularizers` and `list_transforms` say
      which names. What is left out has its default.
    - `{"kind": "optax", "transformation": "adamw", "arguments": {...}}`: a public factory of optax, or
      of `optax.contrib` as `"contrib.prodigy"`. An argument is a plain value.
    - `{"kind": "torch", "optimizer": "Adam", "arguments": {...}}`, with `"lr_scheduler": [name,
      arguments]` if there is one: see `build_torch_optimizer`.
    - An `Optimizer` configuration of declearn (`lrate`, `w_decay`, `regularizers`, `modules`); see
      `tff_optim.config.declearn`.

    Only classes of Keras, of this package and of `trusted_packages` are built, and nothing but optax
    is imported: import the packages of your own classes first. Only the process of torch, which
    starts when the optimizer is used, imports trusted packages. A configuration cannot say which
    Python that is. Regular expressions are those of RE2 (`tff_optim.core.patterns`).

    A JSON text or file has at most 1,000,000 characters. A configuration holds at most 10,000 values,
    nested at most 32 deep, and texts of at most 1,000 characters. Lists of parts or of regular
    expressions have at most 100 elements, as has a schedule at most 100 boundaries.

    Args:
      config: A configuration, as JSON text, or the path of a JSON file. It is not changed.
      trusted_packages: Names of top-level packages whose classes may be built too.
      torch_python: The `python` of `build_torch_optimizer`, for an optimizer of torch.

    Returns:
      The optimizer.

    Raises:
      TypeError: If an entry is of the wrong type.
      ValueError: If an entry is unknown, missing, out of range or not trusted, a limit is
        passed, or a file cannot be read. The message says where the entry stands.

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
    top = entries.read(config, entries.check_packages(trusted_packages))
    return built(_read(attrs.evolve(top, torch_python=torch_python)))


def _read(entry: Entry) -> Described:
    """Reads the description of an optimizer; see `from_config`."""
    value = entry.value
    if isinstance(value, str | list) or keras_objects.is_described(entry):
        keras = keras_objects.optimizer_from_json(entry)
        return Described(entry, build_keras_optimizer, {"optimizer": keras})
    if isinstance(value, dict) and "lrate" in value:
        return declearn.from_json(entry)
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
    return kind.from_json(entry, entry.fields({"kind", *kind.names}, kind.required))


def _write(value: Value, name: str) -> Json:
    """A value of a part of a pipeline, which may be an optimizer, in plain Python types."""
    if isinstance(value, tuple(kind.cls for kind in KINDS)):
        return get_config(value)
    return keras_objects.to_json(value, name)


KINDS = (
    keras_config.KIND,
    optax_config.KIND,
    OptimizerKind(
        name="pipeline",
        cls=PipelineOptimizer,
        to_json=lambda optimizer: pipelines.to_json(optimizer, _write),
        from_json=lambda entry, fields: pipelines.from_json(entry, fields, _read),
        names=pipelines.NAMES,
        required=("learning_rate",),
    ),
    torch_config.KIND,
)
