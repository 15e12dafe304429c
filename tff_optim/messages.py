"""How messages show what was found, and where."""

from typing import Any

_LONGEST = 200


def shown(value: Any) -> str:
    """`repr(value)`, shortened; something in words where it cannot be had or would never end."""
    try:
        return shorten(repr(value))
    except Exception:  # nested too deep, an integer of thousands of digits, a `__repr__` that fails
        return f"a value of type {type(value).__name__} that cannot be printed"


def at(name: str, path: str) -> str:
    """How a message calls the leaf of the argument `name` at `path`; the argument if it is one leaf."""
    return f"`{name}` at '{shorten(path)}'" if path else f"`{name}`"


def shorten(text: str, longest: int = _LONGEST) -> str:
    """The beginning of a long text."""
    return text if len(text) <= longest else f"{text[:longest]} ..."
