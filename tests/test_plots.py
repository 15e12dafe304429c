"""The pictures show the numbers of the history, and TensorBoard's own interface finds the curves."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

matplotlib.use("Agg")

from tff_optim import simulation
from tff_optim.simulation import History, Table, plots


def make_history(processes=("FedAvg", "KL"), seeds=(0, 1)):
    """Two layers, one of which has no score in the first round; clients a, b, c, two a round."""
    rounds, clients = [], []
    for name in processes:
        for seed in seeds:
            for r in range(4):
                record = {"process": name, "seed": seed, "round": r, "loss": 1 / (1 + r) + seed}
                if r:
                    record["aggregator/score_mean/dense/kernel"] = 10.0**-r
                    record["aggregator/score_mean/dense/bias"] = float("nan") if r == 1 else 0.0
                    for place, client in enumerate(["ab", "bc", "ca"][r - 1]):
                        weight = {"aggregator/weights/dense": 0.25 + 0.5 * place}
                        labels = {"process": name, "seed": seed, "round": r, "client": client}
                        clients.append({**labels, **weight})
                rounds.append(record)
    runs = {(name, seed): "finished" for name in processes for seed in seeds}
    return History(Table(rounds), Table(clients), dict.fromkeys(runs), runs)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    matplotlib.pyplot.close("all")


def test_curves_are_means_over_seeds_with_their_range():
    axes = plots.learning_curves(make_history(), "loss", target=0.25)
    *lines, target = axes.get_lines()
    assert [line.get_label() for line in lines] == ["FedAvg", "KL"]
    assert (target.get_label(), *target.get_ydata()) == ("target: 0.25", 0.25, 0.25)
    assert len(axes.get_legend().get_texts()) == 3
    assert axes.get_legend().get_title().get_text() == "mean and range of 2 seeds"
    np.testing.assert_allclose(lines[0].get_xdata(), [0, 1, 2, 3])
    np.testing.assert_allclose(lines[0].get_ydata(), [1.5, 1.0, 1 / 3 + 0.5, 0.75])
    assert len({line.get_linestyle() for line in lines}) == 2  # told apart without colours
    assert lines[0].get_linewidth() > lines[1].get_linewidth()  # seen where the other covers it
    assert axes.get_xlabel() == "round of training"
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (0.25, 2.0)


def test_a_legend_says_which_band_is_of_how_many_seeds():
    history = make_history()
    without = [r for r in history.rounds if (r["process"], r["seed"]) != ("KL", 1)]
    axes = plots.learning_curves(History(Table(without), history.clients, {}, {}), "loss")
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == ["FedAvg (mean and range of 2 seeds)", "KL (one seed)"]
    assert len(axes.collections) == 1


def test_scores_are_a_map_of_layers_and_rounds():
    axes = plots.score_heatmap(make_history().only("KL", 1))
    (mesh,) = axes.collections
    values = np.asarray(mesh.get_array().filled(np.nan)).reshape(2, 3)
    np.testing.assert_allclose(values[0], [0.1, 0.01, 0.001])
    assert np.isnan(values[1][0])
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["dense/kernel", "dense/bias"]
    assert isinstance(mesh.norm, matplotlib.colors.LogNorm)


def test_weights_are_a_map_of_clients_by_id():
    axes = plots.client_weights(make_history(["KL"], [0]))
    (mesh,) = axes.collections
    values = np.asarray(mesh.get_array().filled(np.nan)).reshape(3, 3)
    nan = np.nan
    np.testing.assert_array_equal(values, [[0.25, nan, 0.75], [0.75, 0.25, nan], [nan, 0.75, 0.25]])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c"]


def test_pictures_are_drawn_on_axes_of_yours():
    figure, axes = matplotlib.pyplot.subplots(1, 3)
    history = make_history(["KL"], [0])
    assert plots.learning_curves(history, "loss", axes=axes[0]) is axes[0]
    assert plots.score_heatmap(history, axes=axes[1]) is axes[1]
    assert plots.client_weights(history, axes=axes[2]) is axes[2]
    figure.canvas.draw()


def test_many_lines_differ_all():
    styles = [plots.line_style(number, 28) for number in range(28)]
    assert len({(one["color"], one["linestyle"]) for one in styles}) == 28


def test_maps_are_dark_where_there_is_much():
    history = make_history(["KL"], [0])
    for axes in (plots.score_heatmap(history), plots.client_weights(history)):
        colours = axes.collections[0].cmap([0.0, 1.0])[:, :3].sum(axis=1)
        assert colours[0] > colours[1]


def test_what_cannot_be_drawn_is_said():
    history = make_history()
    with pytest.raises(
        ValueError, match="`metric` must be a metric of the history, of numbers; found 'los'"
    ):
        plots.learning_curves(history, "los")
    for draw in (plots.score_heatmap, plots.client_weights):
        with pytest.raises(ValueError, match="`history` must be of a single run; found"):
            draw(history)
    with pytest.raises(ValueError, match="found 'aggregator/shares'"):
        plots.client_weights(history.only("KL", 0), "aggregator/shares")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def get(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_tensorboard_finds_every_curve_by_its_own_interface(tmp_path):
    model = tff.learning.models.functional_model_from_keras(
        tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))]),
        tf.keras.losses.MeanSquaredError(),
        (tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
    )
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model, tff.learning.optimizers.build_sgdm(0.1)
    )
    data = tf.data.Dataset.from_tensors(([[1.0, 2.0]], [[3.0]]))
    history = simulation.run(
        {"plain": process},
        [data] * 3,
        rounds=3,
        clients_per_round=2,
        evaluate=lambda weights: {"norm": np.linalg.norm(weights.trainable[0])},
        directory=tmp_path,
    )
    port = free_port()
    board = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    scalars = f"http://localhost:{port}/data/plugin/scalars"
    run = "plain/seed_0/tensorboard"
    try:
        deadline = time.monotonic() + 120
        found = {}
        while run not in found:
            assert time.monotonic() < deadline
            assert board.poll() is None
            try:
                found = get(f"{scalars}/tags")
            except OSError:
                time.sleep(0.5)
        curves = {name: get(f"{scalars}/scalars?run={run}&tag={name}") for name in found[run]}
    finally:
        board.terminate()
        board.wait()
    labels = {"process", "seed", "round"}
    assert set(curves) == set(history.rounds.columns) - labels
    for name, points in curves.items():
        shown = {step: value for _, step, value in points}
        expected = {r["round"]: r[name] for r in history.rounds if name in r}
        assert shown == pytest.approx(expected, rel=1e-6)
