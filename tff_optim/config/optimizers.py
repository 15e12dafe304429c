"""Optimizers as JSON, and back from it."""

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs

from tff_optim.backends.keras.optimizer import KerasOptimizer, build_keras_optimizer
from tff_optim.backends.optax.optimizer import OptaxOptimizer
from tff_optim.backends.torch.optimizer import TorchOptimizer
from tff_optim.config import backends as backend_configs
from tff_optim.config import declearn as declearn_configs
from tff_optim.config import pipelines as pipeline_config
from tff_optim.core import entries
from tff_optim.core.entries import Entry
from tff_optim.core.messages import shown
from tff_optim.keras_objects import as_json as keras_objects
from tff_optim.pipeline import PipelineOptimizer


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
      optimizer: What a `build_` function of `tff_optim` returned.

    Returns:
      A dictionary of plain Python types, from which `from_config` builds an equal optimizer. Each
      regularizer and transform is an entry `[name, arguments]`. An optimizer of optax is written if
      it was built of a public factory of optax (`optax.adam`, not `optax.adam(0.1)`) and of plain
      arguments; one of torch without the path of its Python, which is a matter of the machine.

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
    config: Any,
    *,
    trusted_packages: Collection[str] = (),
    torch_python: str | os.PathLike | None = None,
) -> Any:
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
    if isinstance(trusted_packages, str) or not all(isinstance(p, str) for p in trusted_packages):
        raise TypeError(
            f"`trusted_packages` must be a collection of names; found {shown(trusted_packages)}."
        )
    return from_entry(
        attrs.evolve(entries.read(config, trusted_packages), torch_python=torch_python)
    )


def from_entry(entry: Entry) -> Any:
    """The optimizer that an entry describes; see `from_config`."""
    value = entry.value
    if isinstance(value, str | list) or keras_objects.is_described(entry):
        return entry.build(build_keras_optimizer, keras_objects.optimizer_from_json(entry))
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


def _write(value: Any, name: str) -> Any:
    """A value of a part of a pipeline, which may be an optimizer, in plain Python types."""
    if isinstance(value, tuple(kind.cls for kind in KINDS)):
        return get_config(value)
    return keras_objects.to_json(value, name)


KINDS = (
    OptimizerKind(
        name="keras",
        cls=KerasOptimizer,
        to_json=backend_configs.keras_to_json,
        from_json=backend_configs.keras_from_json,
        names=("optimizer", "exclude_from_weight_decay", "weight_names", "device"),
        required=("optimizer",),
    ),
    OptimizerKind(
        name="optax",
        cls=OptaxOptimizer,
        to_json=backend_configs.optax_to_json,
        from_json=backend_configs.optax_from_json,
        names=("transformation", "arguments", "weight_names", "device"),
        required=("transformation",),
    ),
    OptimizerKind(
        name="pipeline",
        cls=PipelineOptimizer,
        to_json=lambda optimizer: pipeline_config.to_json(optimizer, _write),
        from_json=lambda fields: pipeline_config.from_json(fields, from_entry),
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
    OptimizerKind(
        name="torch",
        cls=TorchOptimizer,
        to_json=backend_configs.torch_to_json,
        from_json=backend_configs.torch_from_json,
        names=("optimizer", "arguments", "lr_scheduler"),
        required=("optimizer",),
    ),
)
