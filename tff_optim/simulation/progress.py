"""A progress bar as a release manager."""

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import tensorflow_federated as tff

_SHOWN = 3


class ProgressBar(tff.program.ReleaseManager):
    """Shows rounds, time left and main metrics on a terminal or in a notebook, and nothing elsewhere.

    Args:
      name: Of the run.
      rounds: How many rounds it has.
      done: How many of them are done already.
      visible: False for no bar at all.
    """

    def __init__(self, name: str, rounds: int, done: int, visible: bool):
        self._bar: Any = None
        self._evaluation: dict[str, Any] = {}
        if not visible or not (sys.stderr.isatty() or _in_notebook()):
            return
        try:
            import tqdm
        except ImportError:  # an extra: a run goes on without
            print("No progress bar: `pip install tqdm`.", file=sys.stderr)
            return
        with warnings.catch_warnings():
            # A notebook without ipywidgets gets a bar of text, which is as good.
            warnings.simplefilter("ignore", tqdm.TqdmWarning)
            import tqdm.auto
        self._bar = tqdm.auto.tqdm(total=rounds, initial=done, desc=name, unit="round")

    async def release(self, value: Mapping[str, Any], key: int) -> None:
        """Shows round `key`: the last evaluation, or what training gave."""
        if self._bar is None:
            return
        main = main_metrics(value)
        self._evaluation.update({k: v for k, v in main.items() if k.startswith("evaluation/")})
        chosen = {**main, **self._evaluation}
        first = sorted(chosen, key=lambda name: not name.startswith("evaluation/"))[:_SHOWN]
        self._bar.set_postfix(
            {name.rpartition("/")[2]: f"{chosen[name]:.4g}" for name in first}, refresh=False
        )
        self._bar.update(key - self._bar.n)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def main_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that say how training goes: of the evaluation and of the clients' training."""
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
