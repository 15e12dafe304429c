"""The progress of a run: a bar on a terminal, lines in a log file."""

import sys
import time
import warnings
from collections.abc import Mapping

import tensorflow_federated as tff

from tff_optim.core.types import Json, Record, Value

_SHOWN = 3
_SECONDS = 10.0  # between two lines of a log file


class ProgressBar(tff.program.ReleaseManager):
    """Shows rounds, time left and main metrics: as a bar on a terminal or in a notebook, else in lines.

    If stderr is a log file, it gets at most a line every ten seconds.

    Args:
      name: The name of the run.
      rounds: How many rounds it has.
      done: How many of them are finished.
      visible: False to show nothing.
    """

    def __init__(self, name: str, rounds: int, done: int, visible: bool):
        self._bar: Value = None
        self._evaluation: Record = {}
        self._name, self._rounds, self._done = name, rounds, done
        self._began = self._told = time.monotonic()
        self._in_lines = visible and not (sys.stderr.isatty() or _in_notebook())
        if not visible or self._in_lines:
            return
        try:
            import tqdm
        except ImportError:  # an extra: a run goes on without
            print("No progress bar: `pip install tqdm`.", file=sys.stderr)
            return
        with warnings.catch_warnings():
            # A notebook without ipywidgets gets a text bar, which is good enough.
            warnings.simplefilter("ignore", tqdm.TqdmWarning)
            import tqdm.auto
        self._bar = tqdm.auto.tqdm(total=rounds, initial=done, desc=name, unit="round")

    async def release(self, value: Mapping[str, Json], key: int) -> None:
        """Shows round `key` with the last evaluation, or else the metrics of training."""
        if self._bar is None and not self._in_lines:
            return
        main = main_metrics(value)
        self._evaluation.update({k: v for k, v in main.items() if k.startswith("evaluation/")})
        chosen = {**main, **self._evaluation}
        first = sorted(chosen, key=lambda name: not name.startswith("evaluation/"))[:_SHOWN]
        shown = {name.rpartition("/")[2]: f"{chosen[name]:.4g}" for name in first}
        if self._in_lines:
            self._write_line(key, shown)
            return
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(key - self._bar.n)

    def _write_line(self, key: int, shown: Mapping[str, str]) -> None:
        now = time.monotonic()
        if now - self._told < _SECONDS or key == self._done:
            return
        self._told, pace = now, (now - self._began) / (key - self._done)
        texts = [f"round {key} of {self._rounds}", f"{pace:.3g} s a round"]
        texts.append(f"{_time(pace * (self._rounds - key))} left")
        texts += [f"{name} {text}" for name, text in shown.items()]
        print(f"{self._name}: {', '.join(texts)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def main_metrics(metrics: Mapping[str, Json]) -> dict[str, float]:
    """The main metrics: those of the evaluation and of the clients' training."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, float)
        and "time_in_seconds" not in name
        and name.startswith(("evaluation/", "client_work/train/", "train/"))
    }


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None
