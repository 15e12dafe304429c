"""The wording of messages: "`argument` must RULE; found VALUE. ADVICE"."""

import reprlib

_LONGEST = 200
# Shows a few elements of each container and a few levels, since a value may be endless.
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
    """An error with the rule, the value that was found, and advice.

    Args:
      name: The argument; or another name for it, with its own backticks.
      rule: The rule, after "must".
      found: The value that was found, in words or `shown`.
      advice: Advice in whole sentences.
      error: The class of the error.

    Example:
      >>> refusal("device", "be a name", 3, "Leave it out.", error=TypeError)
      TypeError('`device` must be a name; found 3. Leave it out.')
    """
    subject = name if name.startswith("`") else f"`{name}`"
    return error(f"{subject} must {rule}; found {found}. {advice}".rstrip())


def shown(value: object) -> str:
    """`repr(value)`, shortened; a description if it fails."""
    try:
        return shorten(_short.repr(value))
    except Exception:  # an integer of thousands of digits, say
        return f"a value of type {type(value).__name__} that cannot be printed"


def at(name: str, path: str) -> str:
    """The leaf of the argument `name` at `path`, for messages; the argument if it is a lone leaf."""
    return f"`{name}` at '{shorten(path)}'" if path else f"`{name}`"


def shorten(text: str, longest: int = _LONGEST) -> str:
    """The beginning of a long text."""
    return text if len(text) <= longest else f"{text[:longest]} ..."
