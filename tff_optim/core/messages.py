"""How messages show what was found, and where."""

import reprlib
from typing import Any

_LONGEST = 200
# Looks at a few elements of each container and at a few levels: what is inside may have no end.
_short = reprlib.Repr()
_short.maxlevel = 5
_short.maxdict = _short.maxlist = _short.maxtuple = _short.maxset = 12
_short.maxstring = _short.maxother = _LONGEST


def shown(value: Any) -> str:
    """`repr(value)`, shortened; something in words where it cannot be had."""
    try:
        return shorten(_short.repr(value))
    except Exception:  # an integer of thousands of digits, say
        return f"a value of type {type(value).__name__} that cannot be printed"


def at(name: str, path: str) -> str:
    """How a message calls the leaf of the argument `name` at `path`; the argument if it is one leaf."""
    return f"`{name}` at '{shorten(path)}'" if path else f"`{name}`"


def shorten(text: str, longest: int = _LONGEST) -> str:
    """The beginning of a long text."""
    return text if len(text) <= longest else f"{text[:longest]} ..."
