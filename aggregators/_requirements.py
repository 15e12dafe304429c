"""Says what is missing before an import fails halfway with something unreadable.

`tff_optim` and `aggregators` do not import each other, so each has this check.
"""

import importlib.metadata

_FIX = (
    "Plain `pip install tensorflow-federated` no longer resolves; install the locked set instead: "
    "`pip install --no-deps -r requirements.lock` (README, section Install)."
)


def check_tff() -> None:
    """Raises `ImportError` unless TensorFlow Federated 0.87 is installed."""
    try:
        found = importlib.metadata.version("tensorflow-federated")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"`aggregators` needs TensorFlow Federated 0.87; none is installed. {_FIX}"
        ) from error
    if not found.startswith("0.87."):
        raise ImportError(f"`aggregators` needs TensorFlow Federated 0.87; found {found}. {_FIX}")
