"""How messages show what was found, and where."""

from typing import Any

_LONGEST = 200


def shown(value: Any) -> str:
    """`repr(value)`, shortened; something in words where it cannot be had or would never end."""
    try:
        text = repr(value)
    except Exception:  # nested too deep, an integer of thousands of digits, a `__repr__` that fails
        return f"a value of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def at(name: str, path: str) -> str:
    """How a message calls the leaf of the argument `name` at `path`; the argument if it is one leaf."""
    return f"`{name}` at '{path}'" if path else f"`{name}`"
