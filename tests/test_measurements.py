"""What rounds show has names, all the way into TensorBoard and CSV."""

import asyncio
import csv
import pathlib

import federated_twin as twin
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from nearness import assert_near
from problems import INPUT_SPEC

import aggregators
from aggregators import rules, scores, weighting

SGD = tff.learning.optimizers.build_sgdm(0.1)
DATA = twin.make_data()


fixed = tf.keras.initializers.GlorotUniform


def two_layers():
    keras_model = tf.keras.Sequential(
        [
            tf.keras.layers.InputLayer((3,)),
            tf.keras.layers.Dense(4, name="hidden", kernel_initializer=fixed(1)),
            tf.keras.layers.Dense(
                2, name="Output", kernel_initializer=fixed(2)
            ),  # its name sorts before the other
        ]
    )
    return tff.learning.models.from_keras_model(
        keras_model, loss=tf.keras.losses.MeanSquaredError(), input_spec=INPUT_SPEC
    )


def measured(layers, model=two_layers, sample_size=3):
    rule = rules.adaptive_mean(scores.l2_distance, weighting.softmax(), layers=layers)
    process = aggregators.build_fed_avg(model, SGD, rule=rule, sample_size=sample_size)
    return process.next(process.initialize(), twin.datasets(DATA)).metrics


TENSORS = ["hidden/kernel", "hidden/bias", "Output/kernel", "Output/bias"]


@pytest.fixture(scope="module")
def by_tensor():
    return measured("tensor")


def test_layers_have_their_variables_names(by_tensor):
    for name in ("score_mean", "effective_clients", "largest_weight", "scale", "sample_weights"):
        assert list(by_tensor["aggregator"][name]) == TENSORS


def test_kernel_and_bias_of_a_layer_are_weighed_together(by_tensor):
    found = measured("layer")["aggregator"]["sample_scores"]
    assert list(found) == ["hidden", "Output"]
    alone = by_tensor["aggregator"]["sample_scores"]
    for layer in found:
        kernel, bias = alone[f"{layer}/kernel"], alone[f"{layer}/bias"]
        np.testing.assert_allclose(found[layer], np.hypot(kernel, bias), rtol=1e-4)


def test_one_layer_has_one_number():
    assert np.shape(measured("model")["aggregator"]["score_mean"]) == ()


def test_layers_of_a_functional_model_have_positions_or_names_of_yours():
    assert list(measured("tensor", twin.functional_model())["aggregator"]["scale"]) == ["0", "1"]
    named = {"slope": [0], "offset": [1]}
    assert list(measured(named, twin.functional_model())["aggregator"]["scale"]) == list(named)


def test_tensorboard_draws_a_curve_for_every_number(by_tensor, tmp_path):
    manager = tff.program.TensorBoardReleaseManager(tmp_path)
    for round_number in range(2):
        asyncio.run(manager.release(by_tensor, key=round_number))
    (events,) = pathlib.Path(tmp_path).glob("events*")
    found = {}
    for event in tf.compat.v1.train.summary_iterator(str(events)):
        for value in event.summary.value:
            kind = value.metadata.plugin_data.plugin_name
            found.setdefault(value.tag, (kind, []))[1].append(event.step)
    for tensor in TENSORS:
        kind, steps = found[f"aggregator/score_mean/{tensor}"]
        assert (kind, steps) == ("scalars", [0, 1])
    assert found["aggregator/clients"][0] == "scalars"


def test_csv_has_a_column_for_every_number(by_tensor, tmp_path):
    path = tmp_path / "metrics.csv"
    manager = tff.program.CSVFileReleaseManager(path)
    asyncio.run(manager.release(by_tensor, key=1))
    (row,) = csv.DictReader(path.open())
    for tensor in TENSORS:
        shown = by_tensor["aggregator"]["score_mean"][tensor]
        assert_near(float(row[f"aggregator/score_mean/{tensor}"]), shown)
