"""Finds classes of Keras and of trusted packages by name.

Nothing is imported, and no code of a module runs: only modules that are already loaded are searched.
"""

import sys
import types
from collections.abc import Sequence

import attrs
import tensorflow as tf

from tff_optim import schedules
from tff_optim.core.entries import Entry, suggestion
from tff_optim.core.types import Value
from tff_optim.keras_objects import arguments as keras_arguments


@attrs.frozen
class Kind:
    """A kind of Keras object.

    Attributes:
      noun: Its name in messages.
      base: Its base class.
      module: The name of Keras' public module of this kind.
      public: That module.
      more: This package's module of further classes of this kind.
    """

    noun: str
    base: type
    module: str
    public: types.ModuleType
    more: types.ModuleType | None = None

    @property
    def classes(self) -> dict[str, type]:
        """The classes of this kind by name; neither aliases nor the base class."""
        return {
            name: cls
            for module in (self.more, self.public)
            if module is not None
            for name, cls in vars(module).items()
            if isinstance(cls, type)
            and issubclass(cls, self.base)
            and cls is not self.base
            and cls.__name__ == name
            and not name.startswith("_")
        }


_K, _S = tf.keras, tf.keras.optimizers.schedules
OPTIMIZER = Kind("a Keras optimizer", _K.optimizers.Optimizer, "keras.optimizers", _K.optimizers)
SCHEDULE = Kind(
    "a learning-rate schedule", _S.LearningRateSchedule, "keras.optimizers.schedules", _S, schedules
)
REGULARIZER = Kind(
    "a Keras regularizer", _K.regularizers.Regularizer, "keras.regularizers", _K.regularizers
)
CONSTRAINT = Kind(
    "a Keras constraint", _K.constraints.Constraint, "keras.constraints", _K.constraints
)
KINDS = (OPTIMIZER, SCHEDULE, REGULARIZER, CONSTRAINT)


def nouns(kinds: Sequence[Kind]) -> str:
    """The name of an object of one of these kinds, for messages."""
    return " or ".join(kind.noun for kind in kinds)


def class_of(entry: Entry, kinds: Sequence[Kind]) -> type:
    """The class that the long form of an entry names, of Keras or of a trusted package."""
    name, module, registered = (
        entry.at(key) for key in ("class_name", "module", "registered_name")
    )
    for part in (module, registered):
        if part.value is not None and not isinstance(part.value, str):
            part.refuse("be a string", TypeError)
    root = "keras" if module.value is None else module.value.partition(".")[0]
    if root in ("keras", "tensorflow", "tf"):
        if "legacy" in (module.value or ""):
            module.refuse("not be that of a legacy optimizer", advice=instead_of(name.value))
        cls = class_of_keras(name, kinds)
        homes = {kind.module for kind in kinds if issubclass(cls, kind.base)}
        homes |= {f"{home}.experimental" for home in homes}
        public = {f"{prefix}{home}" for prefix in ("", "tensorflow.", "tf.") for home in homes}
        if module.value not in {None, cls.__module__, *public}:
            module.refuse(f"be {min(homes)!r}, which holds {cls.__name__}")
    else:
        module.check_trusted(root)
        cls = _class_in_module(name, module, kinds)
    known = (None, cls.__name__, tf.keras.saving.get_registered_name(cls))
    if registered.value not in known:
        registered.refuse(f"be the registered name of {cls.__name__}, or left out")
    return cls


def class_of_keras(name: Entry, kinds: Sequence[Kind]) -> type:
    """A class of Keras by its name, which for optimizers may be in any case, as in Keras."""
    if not isinstance(name.value, str):
        name.refuse(f"be the name of {nouns(kinds)}", TypeError)
    known = {key: cls for kind in kinds for key, cls in kind.classes.items()}
    found = known.get(name.value)
    if found is None and OPTIMIZER in kinds:
        found = {key.lower(): cls for key, cls in OPTIMIZER.classes.items()}.get(name.value.lower())
    if found is None:
        name.refuse(f"be the name of {nouns(kinds)}{suggestion(name.value, known)}")
    return found


def _class_in_module(name: Entry, module: Entry, kinds: Sequence[Kind]) -> type:
    """The class that a module of a trusted package holds, found without running code of it."""
    if not isinstance(name.value, str):
        name.refuse("be the name of a class", TypeError)
    found = sys.modules.get(str(module.value))
    if not issubclass(type(found), types.ModuleType):
        module.refuse("be imported already, since nothing is imported for a configuration")
    # Not `getattr`, nor even `vars`: a module that loads lazily would import and run something.
    held: Value = object.__getattribute__(found, "__dict__")
    cls: Value = None
    for part in name.value.split("."):
        cls = held.get(part)
        if not isinstance(cls, type):  # through classes only, not through other modules
            name.refuse(f"be the name of a class that {module.value!r} holds")
        held = vars(cls)
    bases = tuple(kind.base for kind in kinds)
    if cls in bases or not issubclass(cls, bases):
        name.refuse(f"be the class of {nouns(kinds)}")
    name.check_trusted(keras_arguments.package_of(cls))
    if cls.__qualname__ != name.value:
        name.refuse(f"be the name that the class has itself, {cls.__qualname__!r}")
    return cls


def instead_of(name: object) -> str:
    """The advice for a legacy optimizer; empty if it has no successor."""
    known = isinstance(name, str) and name in OPTIMIZER.classes
    return f"Use `tf.keras.optimizers.{name}` instead." if known else ""
