"""How messages are worded: "`argument` must RULE; found VALUE. ADVICE"."""

import reprlib

_LONGEST = 200
# Looks at a few elements of each container and at a few levels: what is inside may have no end.
_short = reprlib.Repr()
_short.maxlevel = 5
_short.maxdict = _short.maxlist = _short.maxtuple = _short.maxset = 12
_short.maxstring = _short.maxother = _LONGEST


def refusal(
    name: str,
    rule: str,
    found: object,
    advice: str = "",
    *,
    error: type[Exception] = ValueError,
) -> Exception:
    """An error that says what must be, what was found, and what to do.

    Args:
      name: The argument; or how to call it, with backticks where they belong.
      rule: What it must be or do, after "must".
      found: What was found, in words or `shown`.
      advice: Sentences that say what to do.
      error: The class of the error.

    Example:
      >>> refusal("device", "be a name", 3, "Leave it out.", error=TypeError)
      TypeError('`device` must be a name; found 3. Leave it out.')
    """
    subject = name if name.startswith("`") else f"`{name}`"
    return error(f"{subject} must {rule}; found {found}. {advice}".rstrip())


def shown(value: object) -> str:
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
