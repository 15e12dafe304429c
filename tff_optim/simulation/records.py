"""RecordFile: a CSV file of records that a killed run leaves readable."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_federated as tff


class RecordFile(tff.program.ReleaseManager):
    """Writes the records of each round to a CSV file with a column for each name.

    A row is appended; where a new name appears, the file is written anew and renamed. When the file
    is opened again, a row that was cut off by a kill, and rows of rounds after the last checkpoint,
    are dropped.

    Args:
      path: The file, made at the first release; None to keep the records in memory alone.
      last_round: Rows of later rounds are dropped; None drops all.
    """

    def __init__(self, path: str | None, last_round: int | None = None):
        self._path = path
        self._columns: list[str] = []
        self.records: list[dict[str, Any]] = []
        if path is not None and os.path.exists(path):
            found = [] if last_round is None else _read(path)
            self.records = [r for r in found if r["round"] <= (last_round or 0)]
            self._write_all()

    async def release(self, value: Sequence[Mapping[str, Any]], key: int) -> None:
        """Appends the records of round `key`."""
        records = [{"round": int(key), **record} for record in value]
        known = set(self._columns)
        new = any(name not in known for record in records for name in record)
        self.records += records
        if new:
            self._write_all()
        elif self._path is not None:
            with open(self._path, "a", newline="") as file:
                _writer(file, self._columns).writerows(records)

    def _write_all(self) -> None:
        self._columns = list(dict.fromkeys(name for record in self.records for name in record))
        if self._path is None:
            return
        unfinished = self._path + ".unfinished"
        with open(unfinished, "w", newline="") as file:
            writer = _writer(file, self._columns)
            writer.writeheader()
            writer.writerows(self.records)
        os.replace(unfinished, self._path)


def _writer(file: Any, columns: list[str]) -> csv.DictWriter:
    return csv.DictWriter(file, columns, lineterminator="\n")


def _read(path: str) -> list[dict[str, Any]]:
    with open(path, newline="") as file:
        whole, _, _ = file.read().rpartition("\n")  # what follows was cut off
    rows = csv.DictReader(io.StringIO(whole, newline=""))
    return [
        {name: text if name == "client" else _value(text) for name, text in row.items() if text}
        for row in rows
    ]


def _value(text: str) -> Any:
    """The value that was written as this text."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
