"""Records of a run: a file of typed lines that reveals changes, and CSV files made from it."""

import csv
import hashlib
import json
import os
from collections.abc import Sequence

import attrs

from tff_optim.core.types import Record, Value

_FORMAT = {"format": 1}
_CHECK = b', "check": "'
_DIGITS = 16


@attrs.frozen
class _Line:
    value: Record
    check: str  # a digest of this line and of all before it
    end: int  # in bytes from the file's beginning


class RecordFile:
    """A JSON object in each line, with a digest of itself and of all lines before it.

    The digest reveals missing and changed lines. JSON keeps types and all characters; `NaN` and
    `Infinity` are written as Python does.

    Args:
      path: The file.
    """

    def __init__(self, path: str):
        self._path = path
        self._lines: list[_Line] = []

    @property
    def values(self) -> list[Record]:
        """The values of the lines, without the first one, which names the format."""
        return [line.value for line in self._lines[1:]]

    def read(self) -> str:
        """Reads up to the first line that is not as it was written.

        Returns:
          The fault of that line; empty if there is none, or if a kill cut off the last line.

        Raises:
          OSError: If the file cannot be read.
        """
        with open(self._path, "rb") as file:
            *lines, cut_off = file.read().split(b"\n")
        for line in lines:
            try:
                self._lines.append(_parse(line, self._lines[-1:]))
            except ValueError as error:
                return f"line {len(self._lines) + 1}: {str(error)[:-1]}"
        if not self._lines:
            return "line 1 is cut off" if cut_off else "it is empty"
        return ""

    def hold(self, values: Sequence[Record]) -> bytes:
        """Sets the values; returns the text of a file that holds them."""
        self._lines, text = [], b""
        for value in (_FORMAT, *values):
            written, line = _written(value, self._lines[-1:])
            text += written
            self._lines.append(line)
        return text

    def start(self, values: Sequence[Record] = ()) -> None:
        """Writes the file anew, with some records."""
        with open(self._path + ".unfinished", "wb") as file:
            file.write(self.hold(values))
        os.replace(self._path + ".unfinished", self._path)

    def append(self, value: Record) -> None:
        """Adds a line."""
        text, line = _written(value, self._lines[-1:])
        with open(self._path, "r+b") as file:
            file.truncate(self._lines[-1].end)  # a full disk may have left a part of a line
            file.seek(self._lines[-1].end)
            file.write(text)
        self._lines.append(line)

    def cut(self, count: int) -> None:
        """Drops all values but the first `count`."""
        os.truncate(self._path, self._lines[count].end)
        del self._lines[count + 1 :]


def _written(value: Record, before: Sequence[_Line]) -> tuple[bytes, _Line]:
    """A line as bytes, and as `_parse` will read it."""
    body = json.dumps(value).encode()
    check = _digest(body, before)
    text = body[:-1] + _CHECK + check.encode() + b'"}\n'
    return text, _Line(value, check, len(text) + (before[-1].end if before else 0))


def _parse(text: bytes, before: Sequence[_Line]) -> _Line:
    body, _, rest = text.rpartition(_CHECK)
    check = rest[:_DIGITS].decode("ascii", "replace")
    if check != _digest(body + b"}", before) or rest[_DIGITS:] != b'"}':
        raise ValueError(
            "it must be as it was written; found it changed, or a line before it missing."
        )
    value = json.loads(body + b"}")
    if not before and value != _FORMAT:
        raise ValueError(f"it must be {_FORMAT}; found {value}, which another version has written.")
    return _Line(value, check, len(text) + 1 + (before[-1].end if before else 0))


def _digest(body: bytes, before: Sequence[_Line]) -> str:
    chain = before[-1].check.encode() if before else b""
    return hashlib.sha256(chain + body).hexdigest()[:_DIGITS]


class CsvView:
    """Records as a CSV file for other programs: a column for each name, in the order of appearance.

    Args:
      path: The file, which is written anew.
      records: The first records.
    """

    def __init__(self, path: str, records: Sequence[Record]):
        self._path, self._records = path, list(records)
        self._columns: list[str] = []
        self._write_all()

    def append(self, records: Sequence[Record]) -> None:
        """Adds rows; the file is written anew if a name is new."""
        self._records += records
        if any(name not in self._columns for record in records for name in record):
            self._write_all()
        elif records:
            with _opened(self._path, "a") as file:
                _writer(file, self._columns).writerows(records)

    def _write_all(self) -> None:
        self._columns = list(dict.fromkeys(name for record in self._records for name in record))
        with _opened(self._path + ".unfinished", "w") as file:
            writer = _writer(file, self._columns)
            writer.writeheader()
            writer.writerows(self._records)
        os.replace(self._path + ".unfinished", self._path)


def _opened(path: str, mode: str) -> Value:
    # Half a surrogate cannot be encoded: it is written as `\udc80`.
    return open(path, mode, newline="", encoding="utf-8", errors="backslashreplace")


def _writer(file: Value, columns: list[str]) -> csv.DictWriter:
    # Quoted texts keep carriage returns, and "007" apart from 7.
    return csv.DictWriter(file, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
