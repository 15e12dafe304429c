"""Entries of a configuration: plain values, each with its path, so that messages can name it."""

import collections
import difflib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NoReturn

import attrs
import numpy as np

from tff_optim.core.devices import select_device
from tff_optim.core.messages import at, refusal, shorten, shown
from tff_optim.core.types import Function, Json, Value

_PACKAGE = __name__.partition(".")[0]
# In the metadata of an attrs field: the function from an entry to the value of the field.
READER = "tff_optim_reader"

# Limits of a configuration, which keep the time for reading or refusing it short.
_LONGEST_TEXT = 1_000_000  # characters of JSON
_LONGEST_STRING = 1000
_DEEPEST = 32
_MOST = 10_000  # values in all: models have thousands of weights, whose names may be listed
MOST_PARTS = 100  # parts of a pipeline, or regular expressions: each takes milliseconds to build


@attrs.frozen
class Entry:
    """A value of a configuration in plain Python types, and its path.

    Attributes:
      value: None, a bool, a finite number, a string, or a list or dictionary of these.
      path: Keys and positions from the top, joined by slashes.
      trusted: The top-level packages whose classes may be built, besides Keras and this one.
      name: The name of the argument that holds the configuration.
      torch_python: The Python that runs optimizers of torch, which no entry may name.
    """

    value: Json
    path: str = ""
    trusted: frozenset[str] = frozenset()
    name: str = "config"
    torch_python: str | os.PathLike | None = None

    @property
    def label(self) -> str:
        """Its name in messages."""
        return at(self.name, self.path)

    def at(self, key: str | int) -> "Entry":
        """The entry under a key or position; None if there is none."""
        value = self.value.get(key) if isinstance(self.value, Mapping) else self.value[int(key)]
        return attrs.evolve(self, value=value, path=self.path_of(key))

    def path_of(self, key: str | int) -> str:
        """The path of the entry under a key or position."""
        return f"{self.path}/{key}" if self.path else str(key)

    def refuse(
        self,
        rule: str,
        error: type[Exception] = ValueError,
        *,
        found: object = None,
        advice: str = "",
    ) -> NoReturn:
        """Raises an error with the entry's path, the rule, and the value or `found`."""
        found = shown(self.value) if found is None else found
        raise refusal(self.label, rule, found, advice, error=error)

    def check_trusted(self, package: str) -> None:
        """Refuses the entry if it names something of a package that is not trusted."""
        if package not in ("keras", _PACKAGE):
            check_trusted(self.label, self.value, package, self.trusted, "Keras")

    def strings(self, most: int = _MOST) -> list[str]:
        """The value, a list of strings."""
        if not isinstance(self.value, list) or not all(isinstance(s, str) for s in self.value):
            self.refuse("be a list of strings", TypeError)
        return [item.value for item in self.items(most)]

    def items(self, most: int = _MOST) -> list["Entry"]:
        """The entries of a list."""
        if not isinstance(self.value, list):
            self.refuse("be a list", TypeError)
        if len(self.value) > most:
            self.refuse(f"have at most {most} elements", found=len(self.value))
        return [self.at(i) for i in range(len(self.value))]

    def fields(self, known: Collection[str], required: Collection[str] = ()) -> dict[str, "Entry"]:
        """The entries of a dictionary, whose keys must be `known` and include `required`."""
        if not isinstance(self.value, dict):
            self.refuse("be a mapping", TypeError)
        problems = []
        if unknown := [name for name in self.value if name not in known]:
            problems.append(f"unknown {shown(unknown)}{suggestion(unknown[0], known)}")
        if missing := [name for name in required if name not in self.value]:
            problems.append(f"missing {shown(missing)}")
        if problems:
            raise refusal(self.label, "have the entries that it takes", ", ".join(problems))
        return {name: self.at(name) for name in self.value}

    def build(self, make: Function, /, *arguments: Value, **named: Value) -> Value:
        """Calls `make`, and raises its errors as errors of this entry."""
        try:
            return make(*arguments, **named)
        except Exception as error:  # constructors of Keras and of trusted packages raise anything
            kind = TypeError if isinstance(error, TypeError) else ValueError
            reason = str(error) or type(error).__name__
            raise kind(f"{self.label} cannot be built: {shorten(reason, 1000)}") from error


@attrs.frozen
class Described:
    """An object that an entry describes, read but not built.

    Attributes:
      entry: The entry.
      make: The function that builds the object.
      arguments: The arguments of `make` by name, in which more objects may be described.
    """

    entry: Entry
    make: Function
    arguments: Mapping[str, Json]


def built(value: Value) -> Value:
    """Builds every description in a value, from the inside out."""
    if isinstance(value, Described):
        return value.entry.build(value.make, **built(value.arguments))
    if isinstance(value, list | tuple):
        return type(value)(built(item) for item in value)
    if isinstance(value, Mapping):
        return {key: built(item) for key, item in value.items()}
    return value


def check_packages(trusted_packages: Collection[str]) -> frozenset[str]:
    """The argument `trusted_packages`, a collection of names."""
    if isinstance(trusted_packages, str) or not all(isinstance(p, str) for p in trusted_packages):
        raise refusal(
            "trusted_packages", "be a collection of names", shown(trusted_packages), error=TypeError
        )
    return frozenset(trusted_packages)


def check_trusted(
    name: str, value: Value, package: str, trusted: Collection[str], library: str
) -> None:
    """Raises `ValueError` unless a value's package is one of those that are trusted."""
    if package not in trusted:
        rule = f"be of {library} or of a package in `trusted_packages` {sorted(trusted)}"
        raise refusal(name, f"{rule}, not of {package!r}", shown(value))


def suggestion(name: str, known: Collection[str]) -> str:
    """A phrase with the name that was probably meant, or nothing."""
    by_case = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=0.75)
    return f" (did you mean {by_case[close[0]]!r}?)" if close else ""


def device(fields: Mapping[str, Entry]) -> str | None:
    """The device of an optimizer with such entries."""
    entry = fields.get("device")
    if entry is None or entry.value is None:
        return None
    return entry.build(select_device, entry.value)


def read(config: Value, trusted: Collection[str] = (), name: str = "config") -> Entry:
    """The top entry of a configuration: an object, JSON text, or a path of a JSON file.

    Args:
      config: The argument.
      trusted: The top-level packages whose classes may be built.
      name: The name of the argument, for messages.

    Raises:
      TypeError: If something in it is of a type that JSON does not have.
      ValueError: If the text or file cannot be read, a number is not finite or does not fit into a
        float, a key occurs twice, or it is too long, too large or nested too deep.
    """
    if isinstance(config, str) and config.lstrip()[:1] in ("{", "[", '"'):
        config = _parse(config, f"`{name}`")
    elif isinstance(config, os.PathLike) or (
        isinstance(config, str) and config.endswith(".json") and "\0" not in config
    ):
        path = pathlib.Path(os.fspath(config))
        config = _parse(_text_of(path, name), f"`{name}` in {shown(str(path))}")
    top = Entry(config, "", frozenset(trusted), name)
    return attrs.evolve(top, value=_plain(top, 0, itertools.count()))


def _text_of(path: pathlib.Path, name: str) -> str:
    rule = f"`{name}` must be a JSON file that can be read; found"
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{rule} {shown(str(path))}, which is no regular file.")
        with path.open(encoding="utf-8") as file:
            return file.read(_LONGEST_TEXT + 1)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{rule} {shorten(str(error))}.") from error


def _parse(text: str, name: str) -> Json:
    if len(text) > _LONGEST_TEXT:
        raise refusal(name, f"be JSON of at most {_LONGEST_TEXT} characters", shown(text))

    def pairs(items: Sequence[tuple[str, Json]]) -> dict[str, Json]:
        counts = collections.Counter(key for key, _ in items)
        if twice := sorted(key for key, count in counts.items() if count > 1):
            raise ValueError(f"the keys {shown(twice)} occur twice")
        return dict(items)

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        reason = shorten(str(error), 1000)
        raise refusal(name, "be JSON", f"{shown(text)}: {reason}") from error


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False
    return True


def _plain(entry: Entry, depth: int, counter: Iterator[int]) -> Json:
    """A copy of the value in plain Python types; tuples become lists, NumPy scalars numbers."""
    value = entry.value
    if depth > _DEEPEST:
        entry.refuse(f"not be nested more than {_DEEPEST} deep")
    if next(counter) > _MOST:  # a small object may hold the same list many times, at every depth
        found = f"more: number {_MOST + 1} is at '{shorten(entry.path)}'"
        raise refusal(entry.name, f"hold at most {_MOST} values", found)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if len(value) > _LONGEST_STRING:
            entry.refuse(f"be a text of at most {_LONGEST_STRING} characters", found=len(value))
        if not _is_text(value):
            entry.refuse("be text that UTF-8 can encode")
        return str(value)
    if isinstance(value, int | float):
        try:
            finite = math.isfinite(value)
        except OverflowError:
            finite = False
        if not finite:
            entry.refuse("be a finite number that fits into a float")
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, list | tuple):
        return [
            _plain(attrs.evolve(entry, value=item, path=entry.path_of(i)), depth + 1, counter)
            for i, item in enumerate(value)
        ]
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str) or not _is_text(key)]:
            raise refusal(entry.label, "have texts as keys", shown(odd[0]), error=TypeError)
        if long := [key for key in value if len(key) > _LONGEST_STRING]:
            raise refusal(
                entry.label, f"have keys of at most {_LONGEST_STRING} characters", shown(long[0])
            )
        return {
            str(key): _plain(
                attrs.evolve(entry, value=item, path=entry.path_of(key)), depth + 1, counter
            )
            for key, item in value.items()
        }
    return entry.refuse("be of a type that JSON has", TypeError)
