"""History: what a run has shown, as tables of records."""

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from tff_optim.simulation.progress import main_metrics

_KEYS = ("process", "seed", "round", "client")  # which record it is
_ENDS = 20  # records that are printed at each end of a long table


class Table(Sequence):
    """Records with named values; a record may lack some.

    It prints as a table, also in a notebook: a wide one in blocks that fit the terminal, a long one
    with its first and last 20 records. `to_pandas` makes a `DataFrame` of it, or
    `pandas.DataFrame(list(table))`.

    Example:
      >>> table = Table([{"round": 1, "loss": 0.5}, {"round": 2, "loss": 0.25, "new": 1}])
      >>> table
      round  loss  new
          1   0.5
          2  0.25    1
      >>> table["loss"].tolist(), table["new"].tolist()
      ([0.5, 0.25], [nan, 1.0])
      >>> table[["new", "round"]]
      new  round
               1
        1      2
      >>> table.where(round=2)[0]
      {'round': 2, 'loss': 0.25, 'new': 1}

    Args:
      records: Mappings from names to values.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]] = ()):
        self._records = [dict(record) for record in records]

    @property
    def columns(self) -> list[str]:
        """Every name, in the order of appearance."""
        return list(dict.fromkeys(name for record in self._records for name in record))

    def where(self, **values: Any) -> "Table":
        """The records that have these values."""
        missing = set(values) - set(self.columns)
        if missing and self._records:
            raise KeyError(
                f"`values` must name columns of the table; found {sorted(missing)}. There are "
                f"{self.columns}."
            )
        return Table([r for r in self if all(r.get(name) == v for name, v in values.items())])

    def to_pandas(self) -> Any:
        """A pandas `DataFrame`; pandas is not among this package's requirements."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("`to_pandas` needs pandas: `pip install pandas`.") from error
        return pandas.DataFrame(self._records, columns=self.columns)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: Any) -> Any:
        """A record by position, records by a slice, a column as an array by its name, or several.

        Several columns, by a list of names, are a table.
        """
        if isinstance(key, slice):
            return Table(self._records[key])
        if isinstance(key, list):
            for name in key:
                self[name]  # raises where it is missing
            return Table([{n: record.get(n, "") for n in key} for record in self._records])
        if not isinstance(key, str):
            return self._records[key]
        if key not in self.columns:
            raise KeyError(
                f"`key` must be a column of the table; found {key!r}. There are {self.columns}."
            )
        return np.array([record.get(key, math.nan) for record in self._records])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self._records == other._records

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        rows = [self.columns, *self._texts()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n\n".join(
            "\n".join("  ".join(row[i].rjust(widths[i]) for i in block).rstrip() for row in rows)
            for block in _blocks(self.columns, widths)
        )

    def _repr_html_(self) -> str:
        from html import escape

        def row(texts: list[str], tag: str) -> str:
            cells = "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)
            return f"<tr>{cells}</tr>"

        return f"<table>{row(self.columns, 'th')}{''.join(row(t, 'td') for t in self._texts())}</table>"

    def _texts(self) -> list[list[str]]:
        columns = self.columns

        def texts(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
            return [[_text(record.get(name, "")) for name in columns] for record in records]

        if len(self) <= 2 * _ENDS + 1:
            return texts(self._records)
        left_out = ["..." for _ in columns]
        return [*texts(self._records[:_ENDS]), left_out, *texts(self._records[-_ENDS:])]


def _blocks(columns: list[str], widths: list[int]) -> list[list[int]]:
    """Positions of columns that go on one line, each block with those that say which record it is."""
    line = shutil.get_terminal_size((120, 24)).columns
    keys = list(itertools.takewhile(lambda i: columns[i] in _KEYS, range(len(columns))))
    blocks = [list(keys)]
    for i in range(len(keys), len(columns)):
        if len(blocks[-1]) > len(keys) and sum(widths[j] + 2 for j in [*blocks[-1], i]) - 2 > line:
            blocks.append(list(keys))
        blocks[-1].append(i)
    return blocks


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    # Ends of lines, and what no terminal can show, would break the table.
    return text if text.isprintable() else text.encode("unicode_escape").decode()


@attrs.frozen(repr=False)
class History:
    """What one or several runs have shown; prints how each run ended, with its last main metrics.

    Attributes:
      rounds: A record for each round, with `process`, `seed` and `round`, the flat metrics, and
        what `evaluate` gave, under `evaluation/`. Round 0 is the model before training.
      clients: A record for each client of each round, with its id as `client`, and what the rule
        shows of single clients (see `client_records`).
      states: The last state by `(process, seed)`.
      ended: How each run ended, by `(process, seed)`: "finished", "stopped" or "interrupted".
    """

    rounds: Table
    clients: Table
    states: dict[tuple[str, int], Any]
    ended: dict[tuple[str, int], str]

    def __repr__(self) -> str:
        return repr(self._ends())

    def _repr_html_(self) -> str:
        return self._ends()._repr_html_()

    def _ends(self) -> Table:
        """How each run ended, and the last value of each of its main metrics."""
        ends = []
        for (process, seed), how in self.ended.items():
            mine = [r for r in self.rounds if (r["process"], r["seed"]) == (process, seed)]
            done = max((record["round"] for record in mine), default=0)
            end = {"process": process, "seed": seed, "round": done, "ended": how}
            for record in mine:
                end.update(main_metrics(record))
            ends.append(end)
        return Table(ends)

    @property
    def state(self) -> Any:
        """The last state of a single run."""
        if len(self.states) != 1:
            raise ValueError(
                "`state` must be that of a single run; found runs "
                f"{list(self.states)}. Choose one of `states`."
            )
        (state,) = self.states.values()
        return state

    def materialized(self, process: Any) -> "History":
        """The same with plain states in the place of those of a `ResidentProcess`."""
        states = {run: process.materialize(state) for run, state in self.states.items()}
        return attrs.evolve(self, states=states)

    def only(self, process: str, seed: int = 0) -> "History":
        """The history of one run among several."""
        run = (process, seed)
        if run not in self.ended:
            raise KeyError(
                f"`process` and `seed` must be those of a run; found {run!r}. There are "
                f"{list(self.ended)}."
            )
        return History(
            rounds=self.rounds.where(process=process, seed=seed),
            clients=self.clients.where(process=process, seed=seed),
            states={run: self.states[run]},
            ended={run: self.ended[run]},
        )


def join(histories: Sequence[History]) -> History:
    """One history of several runs."""
    return History(
        rounds=Table([record for history in histories for record in history.rounds]),
        clients=Table([record for history in histories for record in history.clients]),
        states={run: state for history in histories for run, state in history.states.items()},
        ended={run: how for history in histories for run, how in history.ended.items()},
    )
