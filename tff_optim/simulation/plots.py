"""Pictures of a `History`; matplotlib is in the extra `examples`."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from tff_optim.core.checks import check_number
from tff_optim.core.types import ClientId, Record, Value
from tff_optim.simulation.history import History, Table

# Classes of matplotlib, which functions import when they draw.
Axes: TypeAlias = Value
Figure: TypeAlias = Value

# Four dashes and seven colours: 28 lines that all differ.
_STYLES = ["-", "--", ":", "-."]
# Colours of Okabe and Ito, ordered so that neighbours differ in grey too.
_COLOURS = ["#000000", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#0072B2"]
_MAP = "cividis_r"  # in all maps dark means large
_ROUND = "round of training"
# The meanings of columns.
_WORDS = {"score_mean": "mean score of clients", "weights": "weight of a client in the mean"}
_OVER_CLIENTS = {
    "mean": "mean over",
    "lowest_decile": "lowest decile of",
    "highest_decile": "highest decile of",
    "spread": "standard deviation over",
}


def line_style(number: int, lines: int) -> Record:
    """The style of one of several lines, for `axes.plot`; they also differ without colours.

    Earlier lines are wider, and later ones dashed, so that lines that coincide all stay visible.

    Example:
      >>> line_style(1, lines=3)
      {'color': '#D55E00', 'linestyle': '--', 'linewidth': 2.1}

    Args:
      number: The number of the line, from 0.
      lines: How many lines there are.
    """
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _STYLES[number % len(_STYLES)],
        "linewidth": min(1.6 + 0.5 * (lines - 1 - number), 3.6),
    }


def words(metric: str) -> str:
    """The name of a metric in words, for an axis.

    Example:
      >>> words("evaluation/accuracy"), words("client_work/train/loss")
      ('accuracy (evaluation)', 'loss (client work, train)')
      >>> words("evaluation/clients/accuracy/lowest_decile")
      'accuracy, lowest decile of clients (evaluation)'
    """
    *where, name = metric.split("/")
    text = _WORDS.get(name, name)
    if "clients" in where[:-1] and name in _OVER_CLIENTS:
        text = f"{where.pop()}, {_OVER_CLIENTS[name]} clients"
        where.remove("clients")
    return (f"{text} ({', '.join(where)})" if where else text).replace("_", " ")


def panel_letters(axes: Iterable[Axes], titles: Sequence[str] = ()) -> None:
    """Writes a, b, c, ... at the top left of panels, for a caption to refer to, and titles beside them.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> figure, panels = plt.subplots(1, 2)
      >>> panel_letters(panels, ["Accuracy", "Loss"])
      >>> [(panel.get_title(loc="left"), panel.get_title()) for panel in panels]
      [('a', 'Accuracy'), ('b', 'Loss')]

    Args:
      axes: The panels.
      titles: One for each panel, or none.

    Raises:
      ValueError: If the numbers of titles and panels differ.
    """
    panels = list(axes)
    if titles and len(titles) != len(panels):
        raise ValueError(
            f"`titles` must be one for each of {len(panels)} panels; found {len(titles)}."
        )
    for number, one in enumerate(panels):
        one.set_title(chr(ord("a") + number), loc="left", fontweight="bold")
        if titles:
            one.set_title(titles[number])


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a picture as `PATH.png` for a screen, and as the vector graphic `PATH.pdf` for a paper.

    Missing folders are created. A suffix `.png` or `.pdf` of the path is dropped.

    Example:
      >>> import matplotlib.pyplot as plt, os, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(plt.figure(), f"{folder}/curves")
      ...     sorted(os.listdir(folder))
      ['curves.pdf', 'curves.png']
    """
    base = os.fspath(path)
    base = base.removesuffix(".png").removesuffix(".pdf")
    os.makedirs(os.path.dirname(base) or ".", exist_ok=True)
    figure.savefig(f"{base}.png", dpi=110)
    # Without a date, equal pictures are equal files.
    figure.savefig(f"{base}.pdf", metadata={"CreationDate": None})


def learning_curves(
    history: History, metric: str, *, target: float | None = None, axes: Axes | None = None
) -> Axes:
    """Draws a metric over the rounds: for each process the mean and the range of its seeds.

    Example:
      >>> rounds = Table([
      ...     {"process": "FedAvg", "seed": s, "round": r, "loss": 1 / r + s / 10}
      ...     for s in (0, 1) for r in (1, 2, 3)
      ... ])
      >>> axes = learning_curves(History(rounds, Table(), {}, {}), "loss")
      >>> axes.get_ylabel(), [text.get_text() for text in axes.get_legend().get_texts()]
      ('loss', ['FedAvg'])
      >>> axes.get_legend().get_title().get_text()
      'mean and range of 2 seeds'

    Args:
      history: The result of `run`.
      metric: A column of `history.rounds`.
      target: The value of a horizontal line; None for no line.
      axes: Matplotlib axes to draw on; None for new ones.

    Returns:
      The axes.
    """
    if target is not None:
        check_number("target", target)
    records = _with(history.rounds, metric, "metric")
    axes = _axes(axes)
    names = list(dict.fromkeys(record["process"] for record in records))
    runs = {(record["process"], record["seed"]) for record in records}
    counts = {name: sum(process == name for process, _ in runs) for name in names}
    one_count = len(set(counts.values())) == 1
    for number, name in enumerate(names):
        mine = [record for record in records if record["process"] == name]
        by_round: dict[int, list[float]] = {}
        for record in mine:
            by_round.setdefault(record["round"], []).append(record[metric])
        x = sorted(by_round)
        means = [float(np.mean(by_round[r])) for r in x]
        style = line_style(number, len(names))
        label = name if one_count else f"{name} ({_band(counts[name])})"
        axes.plot(x, means, label=label, **style)
        if counts[name] > 1:
            low, high = ([f(by_round[r]) for r in x] for f in (min, max))
            alpha = min(0.15, 0.4 / len(names))  # many opaque bands would hide the lines
            axes.fill_between(x, low, high, color=style["color"], alpha=alpha, linewidth=0)
    if target is not None:
        axes.axhline(target, color="grey", linewidth=1.0, label=f"target: {target:g}")
    axes.set(xlabel=_ROUND, ylabel=words(metric))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    title = _band(counts[names[0]]) if one_count else None
    # Long enough to tell dashes apart.
    axes.legend(title=title, fontsize="small", title_fontsize="small", handlelength=3)
    return axes


def _band(seeds: int) -> str:
    return f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"


def score_heatmap(
    history: History, metric: str = "aggregator/score_mean", *, axes: Axes | None = None
) -> Axes:
    """Draws a number per layer as a map of layers and rounds, in which dark means large.

    Args:
      history: The history of a single run; choose one with `only`.
      metric: A metric per layer, such as `aggregator/score_mean`, whose columns are
        `METRIC/LAYER`; or a column.
      axes: Matplotlib axes to draw on; None for new ones.

    Returns:
      The axes.
    """
    import matplotlib.colors

    _check_single(history)
    table = Table([record for record in history.rounds if record["round"] > 0])
    columns = [c for c in table.columns if c == metric or c.startswith(metric + "/")]
    if not columns:
        _with(table, metric, "metric")  # raises
    values = np.array([table[column] for column in columns], float)
    axes = _axes(axes)
    positive = values[np.isfinite(values) & (values > 0)]
    norm = None
    if positive.size and positive.max() > 10 * positive.min():
        norm = matplotlib.colors.LogNorm(positive.min(), positive.max())
    rounds = table["round"]
    edges = np.append(rounds - 0.5, rounds[-1] + 0.5)
    image = axes.pcolormesh(
        edges, np.arange(len(columns) + 1), values, cmap=_MAP, norm=norm, rasterized=True
    )
    names = [column.removeprefix(metric).lstrip("/") or metric for column in columns]
    axes.set_yticks(np.arange(len(columns)) + 0.5, names)
    axes.invert_yaxis()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=_ROUND, ylabel="layer")
    axes.figure.colorbar(image, ax=axes, label=words(metric))
    return axes


def client_weights(
    history: History, metric: str = "aggregator/weights", *, axes: Axes | None = None
) -> Axes:
    """Draws the share of each client, by id, in the result of each round; dark means large.

    Args:
      history: The history of a single run; choose one with `only`. The process needs a `sample_size`.
      metric: A column of `history.clients`, or the common start of columns per layer, whose mean is
        drawn.
      axes: Matplotlib axes to draw on; None for new ones.

    Returns:
      The axes.
    """
    _check_single(history)
    columns = [c for c in history.clients.columns if c == metric or c.startswith(metric + "/")]
    if not columns:
        _with(history.clients, metric, "metric")  # raises
    records = [record for record in history.clients if columns[0] in record]
    clients = sorted({record["client"] for record in records}, key=_by_numbers)
    rows = {client: row for row, client in enumerate(clients)}
    rounds = np.arange(min(r["round"] for r in records), max(r["round"] for r in records) + 1)
    values = np.full([len(clients), len(rounds)], np.nan)
    for record in records:
        shares = [record[column] for column in columns if column in record]
        values[rows[record["client"]], record["round"] - rounds[0]] = np.mean(shares)
    axes = _axes(axes)
    edges = np.append(rounds - 0.5, rounds[-1] + 0.5)
    image = axes.pcolormesh(
        edges, np.arange(len(clients) + 1), values, cmap=_MAP, vmin=0, rasterized=True
    )
    if len(clients) <= 40:
        axes.set_yticks(np.arange(len(clients)) + 0.5, [str(client) for client in clients])
    axes.invert_yaxis()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=_ROUND, ylabel="client (white: not drawn)")
    axes.figure.colorbar(image, ax=axes, label=words(metric))
    return axes


def _axes(axes: Axes) -> Axes:
    if axes is not None:
        return axes
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install matplotlib`.") from error
    return plt.subplots(figsize=(6, 4), layout="constrained")[1]


def _by_numbers(client: ClientId) -> list[tuple[bool, int, str]]:
    """Sorts 'client 2' before 'client 10'."""
    parts = re.findall(r"\d+|\D+", str(client))
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]


def _with(table: Table, name: str, argument: str) -> list[Record]:
    records = [record for record in table if isinstance(record.get(name), int | float)]
    if not records:
        raise ValueError(
            f"`{argument}` must be a metric of the history, of numbers; found {name!r}, and there are "
            f"{table.columns}."
        )
    return records


def _check_single(history: History) -> None:
    runs = list(dict.fromkeys((record["process"], record["seed"]) for record in history.rounds))
    if len(runs) != 1:
        raise ValueError(
            f"`history` must be of a single run; found {runs}. Choose one with "
            "`history.only(process, seed)`."
        )
