"""The short examples do, in a few rounds, what they say, and stay short."""

import importlib
import pathlib

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
SHORT = ["compare_rules", "keras_in_five_lines", "kill_and_resume", "own_score"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_every_short_example_is_short_and_has_a_test_here():
    for name in SHORT:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100, name
        assert f'example("{name}")' in pathlib.Path(__file__).read_text()


def test_rules_are_compared_in_a_picture(example, tmp_path):
    history = example("compare_rules").main("2", "2", str(tmp_path))
    assert list(history.ended) == [("FedAvg", 0), ("FedAvg", 1), ("KL", 0), ("KL", 1)]
    assert history.rounds["evaluation/accuracy"].shape == (12,)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_keras_optimizers_train(example):
    losses = example("keras_in_five_lines").main("6")
    assert losses[-1] < losses[0]


def test_a_run_goes_on(example, tmp_path):
    module = example("kill_and_resume")
    module.main("2", str(tmp_path / "pieces"))
    pieces, weights = module.main("4", str(tmp_path / "pieces"))
    assert pieces.rounds["round"].tolist() == [1, 2, 3, 4]
    assert np.shape(weights.trainable[0]) == (3, 1)


def test_a_score_of_yours_weighs_clients(example):
    history = example("own_score").main("3")
    (name,) = [
        column for column in history.clients.columns if column.endswith("weights/dense/kernel")
    ]
    for number in (1, 2, 3):
        assert history.clients.where(round=number)[name].sum() == pytest.approx(1, abs=1e-5)
