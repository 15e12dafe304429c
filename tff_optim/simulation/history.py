"""The history of runs, as tables of records."""

import itertools
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import numpy as np

from tff_optim.core.checks import check_number, check_whole, whole
from tff_optim.core.types import Function, Json, Process, Record, State, Value
from tff_optim.simulation.goals import goal
from tff_optim.simulation.progress import main_metrics

_KEYS = ("process", "seed", "round", "client")  # identify a record
_ENDS = 20  # records printed at each end of a long table


class Table(Sequence):
    """Records with named values; a record may lack some.

    It prints as a table, also in a notebook: a wide one in blocks that fit the terminal, a long one
    with its first and last 20 records. `to_pandas` converts it to a `DataFrame`.

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

    def __init__(self, records: Sequence[Mapping[str, Json]] = ()):
        self._records = [dict(record) for record in records]
        self._folded: dict[Function, tuple[int, Value]] = {}

    def append(self, record: Mapping[str, Json]) -> None:
        """Adds a record, as the loop does after each round to the table for `stop`."""
        self._records.append(dict(record))

    def running(self, step: Callable[[Value, Mapping[str, Json]], Value], initial: Value) -> Value:
        """Folds a function over all records, and visits each only once.

        When the table has grown, the fold goes on from its earlier value. A `stop` that uses it after
        each round so takes time in proportion to the rounds.

        Example:
          >>> table, total = Table([{"n": 1}, {"n": 2}]), lambda so_far, record: so_far + record["n"]
          >>> table.running(total, 0)
          3
          >>> table.append({"n": 4})
          >>> table.running(total, 0)
          7

        Args:
          step: A function of the value so far and a record, the same object in each call.
          initial: The value before the first record.
        """
        done, value = self._folded.get(step, (0, initial))
        for record in self._records[done:]:
            value = step(value, record)
        self._folded[step] = (len(self._records), value)
        return value

    @property
    def columns(self) -> list[str]:
        """All names, in the order of appearance."""
        return list(dict.fromkeys(name for record in self._records for name in record))

    def where(self, **values: Value) -> "Table":
        """The records that have these values."""
        missing = set(values) - set(self.columns)
        if missing and self._records:
            raise KeyError(
                f"`values` must name columns of the table; found {sorted(missing)}. There are "
                f"{self.columns}."
            )
        return Table([r for r in self if all(r.get(name) == v for name, v in values.items())])

    def to_pandas(self) -> Value:
        """A pandas `DataFrame`; pandas is not among this package's requirements."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("`to_pandas` needs pandas: `pip install pandas`.") from error
        return pandas.DataFrame(self._records, columns=self.columns)

    def to_markdown(self) -> str:
        """All records as a table in Markdown."""
        names, *rows = ([_markdown(t) for t in row] for row in self._all_texts())
        lines = [" | ".join(row) for row in (names, ["---"] * len(names), *rows)]
        return "\n".join(f"| {line} |" for line in lines)

    def to_latex(self) -> str:
        """All records as a `tabular` of LaTeX, which needs no package."""
        rows = [" & ".join(map(_latex, row)) + r" \\" for row in self._all_texts()]
        texts = {n for r in self._records for n, value in r.items() if isinstance(value, str)}
        kinds = "".join("l" if name in texts else "r" for name in self.columns)
        body = "\n".join([rows[0], r"\hline", *rows[1:]])
        return f"\\begin{{tabular}}{{{kinds}}}\n{body}\n\\end{{tabular}}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: Value) -> Value:
        """A record by position, a table by a slice or a list of names, or a column by its name."""
        if isinstance(key, slice):
            return Table(self._records[key])
        if isinstance(key, list):
            for name in key:
                self[name]  # raises if it is missing
            return Table([{n: record.get(n, "") for n in key} for record in self._records])
        if not isinstance(key, str):
            return self._records[key]
        if key not in self.columns:
            raise KeyError(
                f"`key` must be a column of the table; found {key!r}. There are {self.columns}."
            )
        return np.array([record.get(key, math.nan) for record in self._records])

    def __iter__(self) -> Iterator[Record]:
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

    def _all_texts(self) -> list[list[str]]:
        return [list(map(_text, self.columns)), *self._rows(self._records)]

    def _texts(self) -> list[list[str]]:
        if len(self) <= 2 * _ENDS + 1:
            return self._rows(self._records)
        left_out = ["..." for _ in self.columns]
        first, last = self._records[:_ENDS], self._records[-_ENDS:]
        return [*self._rows(first), left_out, *self._rows(last)]

    def _rows(self, records: Sequence[Mapping[str, Json]]) -> list[list[str]]:
        columns = self.columns
        return [[_text(record.get(name, "")) for name in columns] for record in records]


def _blocks(columns: list[str], widths: list[int]) -> list[list[int]]:
    """Positions of columns that fit on a line; each block begins with those that identify a record."""
    line = shutil.get_terminal_size((120, 24)).columns
    keys = list(itertools.takewhile(lambda i: columns[i] in _KEYS, range(len(columns))))
    blocks = [list(keys)]
    for i in range(len(keys), len(columns)):
        if len(blocks[-1]) > len(keys) and sum(widths[j] + 2 for j in [*blocks[-1], i]) - 2 > line:
            blocks.append(list(keys))
        blocks[-1].append(i)
    return blocks


def _text(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    # Line breaks and unprintable characters would break the table.
    return text if text.isprintable() else text.encode("unicode_escape").decode()


# Entities for characters that not every reader of Markdown lets a backslash escape.
_MARKDOWN = {"&": "&amp;", "<": "&lt;", "$": "&#36;", "\\": "&#92;"}
_MARKDOWN |= {one: "\\" + one for one in "|*`[]"}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_LATEX |= {
    "`": r"\textasciigrave{}",
    "[": "{[}",
    "*": "{*}",
}  # `\\` of the row before takes the last two
_LATEX |= {one: "\\" + one for one in "&%$#_{}"}


def _markdown(text: str) -> str:
    escaped = "".join(_MARKDOWN.get(one, one) for one in text)
    return re.sub(r"\b_+|_+\b", lambda m: m[0].replace("_", "\\_"), escaped)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(one, one) for one in text)


@attrs.frozen
class Kept:
    """The best round of a run, by `keep_best` of `run`.

    Attributes:
      round: The number of the round.
      value: The value of the metric.
      state: The state after the round.
    """

    round: int
    value: float
    state: State = attrs.field(repr=False)


@attrs.frozen(repr=False)
class History:
    """The history of one or several runs; prints how each run ended, with its last main metrics.

    Example:
      >>> rounds = Table([{"process": "KL", "seed": 0, "round": 3, "evaluation/accuracy": 0.5}])
      >>> History(rounds, Table(), {("KL", 0): None}, {("KL", 0): "finished"})
      process  seed  round     ended  evaluation/accuracy
           KL     0      3  finished                  0.5

    Attributes:
      rounds: A record for each round, with `process`, `seed` and `round`, the flat metrics, and
        the numbers of `evaluate` under `evaluation/`. Round 0 is the model before training.
      clients: A record for each client of each round, with its id as `client`, and the rule's numbers of
        single clients (see `client_records`).
      states: The last state by `(process, seed)`.
      ended: How each run ended, by `(process, seed)`: "finished", "stopped" or "interrupted".
      kept: The best round and its state by `(process, seed)`, with `keep_best` of `run`.
    """

    rounds: Table
    clients: Table
    states: dict[tuple[str, int], State]
    ended: dict[tuple[str, int], str]
    kept: dict[tuple[str, int], Kept] = attrs.field(factory=dict)

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
            if (process, seed) in self.kept:
                end["best_round"] = self.kept[process, seed].round
            ends.append(end)
        return Table(ends)

    def summary(self, metric: str, *, target: float | None = None, last: int = 1) -> Table:
        """A row for each process: a metric at the end over seeds, and rounds to a target.

        ```
        v_s = mean of the metric over the last rounds of seed s that show it
        mean = mean of v_s        spread = standard deviation of v_s, with n - 1; nan for one seed
        rounds_to_target = median over seeds of the first round that is as good as the target
        ```

        A seed that never reaches the target counts as infinitely many rounds. `to_markdown` and
        `to_latex` make a table for a page or a paper.

        Example:
          >>> rounds = Table([
          ...     {"process": name, "seed": seed, "round": r, "accuracy": a * r + seed / 10}
          ...     for name, a in (("slow", 0.1), ("fast", 0.2)) for seed in (0, 1) for r in (1, 2, 3)
          ... ])
          >>> history = History(rounds, Table(), {}, {})
          >>> history.summary("accuracy", target=0.5)
          process  seeds  mean   spread  rounds_to_target
             slow      2  0.35  0.07071               inf
             fast      2  0.65  0.07071               2.5
          >>> history.best("accuracy")["process"]
          'fast'

        Args:
          metric: `"max NAME"` or `"min NAME"`, or the name of an accuracy or a loss.
          target: The value to reach; None for no such column.
          last: The number of last rounds to average over.

        Raises:
          ValueError: If no round has the metric.
        """
        wanted, last = goal("metric", metric), whole(last)
        check_whole("last", last, 1)
        if target is not None:
            check_number("target", target)
        curves: dict[str, dict[int, list[tuple[int, float]]]] = {}
        for record in self.rounds:
            if isinstance(record.get(wanted.name), int | float):
                by_seed = curves.setdefault(record["process"], {})
                point = (record["round"], float(record[wanted.name]))
                by_seed.setdefault(record["seed"], []).append(point)
        if not curves:
            raise ValueError(
                f"`metric` must be a metric of the history; found {wanted.name!r}, and there are "
                f"{self.rounds.columns}."
            )
        rows = []
        for process, by_seed in curves.items():
            ends = [np.mean([value for _, value in curve[-last:]]) for curve in by_seed.values()]
            row = {"process": process, "seeds": len(ends), "mean": float(np.mean(ends))}
            row["spread"] = float(np.std(ends, ddof=1)) if len(ends) > 1 else math.nan
            if target is not None:
                reached = [
                    next((n for n, v in curve if wanted.sign * (v - target) >= 0), math.inf)
                    for curve in by_seed.values()
                ]
                row["rounds_to_target"] = float(np.median(reached))
            rows.append(row)
        return Table(rows)

    def best(self, metric: str, *, last: int = 1) -> Record:
        """The row of `summary` with the best mean, such as the best rate or rule of a grid.

        A process whose mean is NaN is never the best.
        """
        rows, wanted = self.summary(metric, last=last), goal("metric", metric)
        return max(rows, key=lambda row: wanted.value({wanted.name: row["mean"]}))

    @property
    def state(self) -> Value:
        """The last state of a single run."""
        if len(self.states) != 1:
            raise ValueError(
                "`state` must be that of a single run; found runs "
                f"{list(self.states)}. Choose one of `states`."
            )
        (state,) = self.states.values()
        return state

    def materialized(self, process: Process) -> "History":
        """The same history with plain states instead of those of a `ResidentProcess`."""
        states = {run: process.materialize(state) for run, state in self.states.items()}
        kept = {
            run: attrs.evolve(one, state=process.materialize(one.state))
            for run, one in self.kept.items()
        }
        return attrs.evolve(self, states=states, kept=kept)

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
            kept={run: self.kept[run]} if run in self.kept else {},
        )


def join(histories: Sequence[History]) -> History:
    """One history of several runs."""
    return History(
        rounds=Table([record for history in histories for record in history.rounds]),
        clients=Table([record for history in histories for record in history.clients]),
        states={run: state for history in histories for run, state in history.states.items()},
        ended={run: how for history in histories for run, how in history.ended.items()},
        kept={run: one for history in histories for run, one in history.kept.items()},
    )
