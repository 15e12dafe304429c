"""Regular expressions from outside, matched in bounded time.

Python's `re` tries every way in which a pattern can match: `(a+)+$` on forty letters takes hours. RE2,
which TensorFlow brings along, takes time in proportion to the text and has limits of its own on the
size of a pattern. It has no lookahead, no lookbehind and no references back to a group.
"""

import functools
import re
import warnings

import tensorflow as tf

from tff_optim.messages import shown

_LONGEST = 1000
# Python reads these in another way than RE2.
_OTHER_MEANING = ("{,", "[:")


@functools.lru_cache(maxsize=1024)
def _matches(pattern: str, text: str) -> bool:
    with tf.__internal__.eager_context.eager_mode(), tf.device("/CPU:0"):
        return bool(tf.strings.regex_full_match(text, f"(?s:.*)(?:{pattern})(?s:.*)"))


def check(pattern: str) -> None:
    """Raises `ValueError` unless a pattern is matched in bounded time and as Python reads it.

    Example:
      >>> check("bias|norm")
      >>> check("(?!bias)")
      Traceback (most recent call last):
        ...
      ValueError: must be a regular expression of RE2's, without lookaround ...
    """
    rule = (
        "must be a regular expression of RE2's, without lookaround and back references and of at "
        f"most {_LONGEST} characters; found {shown(pattern)}"
    )
    if len(pattern) > _LONGEST:
        raise ValueError(f"{rule}, which has {len(pattern)} characters.")
    if any(part in pattern for part in _OTHER_MEANING):
        raise ValueError(f"{rule}, in which {' and '.join(_OTHER_MEANING)} may mean two things.")
    try:
        # Each alone: `a)(b` is well formed only between the parentheses of `_matches`.
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            re.compile(pattern)
        _matches(pattern, "")
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        raise ValueError(f"{rule}: {error}.") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{rule}, which is not text.") from error
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(f"{rule}: {error.message.rpartition('error: ')[2]}.") from error


@functools.lru_cache(maxsize=1024)
def is_bounded(pattern: str) -> bool:
    """Whether `check` accepts a pattern."""
    try:
        check(pattern)
    except ValueError:
        return False
    return True


def search(pattern: str, text: str) -> bool:
    """Whether a pattern is found in a text, as `re.search` finds it.

    In bounded time where `check` accepts the pattern. Others come from a program, not from a
    configuration, and are left to Python.
    """
    if is_bounded(pattern):
        return _matches(pattern, text)
    return re.search(pattern, text) is not None
