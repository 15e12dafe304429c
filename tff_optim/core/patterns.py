r"""Regular expressions that select weights by name, matched in bounded time.

Every pattern has the meaning that RE2 gives it, in configurations and in programs. `\w`, `\d` and `\b`
know ASCII only: `\w` does not match `ö`, and there is a `\b` on either side of one. Write such letters
out, or use `[^/]`. `$` is the very end of the name.

Python's `re` tries every way in which a pattern can match: `(a+)+$` on forty letters takes hours. RE2,
which is part of TensorFlow, takes time in proportion to the text. It has no lookahead, no lookbehind
and no references back to a group, so patterns with these are refused.
"""

import functools
import re
import warnings

import tensorflow as tf

from tff_optim.core.messages import shown

_LONGEST = 1000
# Python and RE2 read these differently.
_OTHER_MEANING = ("{,", "[:")


@functools.lru_cache(maxsize=1024)
def search(pattern: str, text: str) -> bool:
    r"""Whether a pattern that `check` accepts is found in a text.

    Example:
      >>> search(r"bias|norm_\d", "norm_2/gamma")
      True
    """
    with tf.__internal__.eager_context.eager_mode(), tf.device("/CPU:0"):
        return bool(tf.strings.regex_full_match(text, f"(?s:.*)(?:{pattern})(?s:.*)"))


def check(name: str, pattern: str) -> None:
    """Raises `ValueError` unless a pattern is one of RE2's, and of Python's too.

    Args:
      name: The argument's name, for messages.
      pattern: Its value.

    Example:
      >>> check("where", "bias|norm")
      >>> check("where", "(?!bias)")
      Traceback (most recent call last):
        ...
      ValueError: `where` must be a regular expression of RE2's, without lookaround ...
    """
    rule = (
        f"`{name}` must be a regular expression of RE2's, without lookaround and back references and "
        f"of at most {_LONGEST} characters; found {shown(pattern)}"
    )
    if len(pattern) > _LONGEST:
        raise ValueError(f"{rule}, which has {len(pattern)} characters.")
    if any(part in pattern for part in _OTHER_MEANING):
        raise ValueError(f"{rule}, in which {' and '.join(_OTHER_MEANING)} may mean two things.")
    try:
        # Each alone: `a)(b` is well formed only between the parentheses of `search`.
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            re.compile(pattern)
        search(pattern, "")
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        raise ValueError(f"{rule}: {error}.") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{rule}, which is not text.") from error
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(f"{rule}: {error.message.rpartition('error: ')[2]}.") from error
