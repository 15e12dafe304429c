"""Epsilon and noise against published figures and `dp_accounting` itself."""

import math

import dp_accounting
import pytest
import selection

from aggregators import privacy


@pytest.mark.parametrize(
    ("examples", "batch", "noise", "epochs", "delta", "expected"),
    [
        # Figures of TensorFlow Privacy, compute_dp_sgd_privacy_test.py; the first is MNIST.
        (60000, 150, 1.3, 15, 1e-5, 0.7242234026109595),
        (100000, 100, 1.0, 30, 1e-7, 1.4154988495444845),
    ],
)
def test_published_figures_of_dp_sgd(examples, batch, noise, epochs, delta, expected):
    found = privacy.epsilon(
        noise,
        sampling_probability=batch / examples,
        steps=epochs * examples // batch,
        delta=delta,
    )
    # Those use fewer orders, so theirs is an upper bound that is a little larger.
    assert expected * 0.98 < found <= expected * 1.0001


def test_a_published_figure_per_client():
    """Rounds of 100 clients of 342,477 (Stack Overflow), z 1: dp_accounting's own accountant."""
    accountant = dp_accounting.pld.PLDAccountant()
    event = dp_accounting.PoissonSampledDpEvent(100 / 342477, dp_accounting.GaussianDpEvent(1.0))
    accountant.compose(event, 1500)
    found = privacy.epsilon(
        1.0, sampling_probability=100 / 342477, steps=1500, delta=1e-6, accountant="pld"
    )
    assert found == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-9)


def test_one_sum_without_sampling_is_the_gaussian_mechanism():
    """Balle and Wang, 2018: the exact delta of one Gaussian mechanism."""
    found = privacy.epsilon(2.0, sampling_probability=1, steps=1, delta=1e-5, accountant="pld")

    def normal(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    exact = normal(1 / 4 - 2 * found) - math.exp(found) * normal(-1 / 4 - 2 * found)
    assert exact == pytest.approx(1e-5, rel=1e-2)


SETTINGS = {
    "rdp": {"sampling_probability": 0.1, "steps": 20, "accountant": "rdp"},
    "pld": {"sampling_probability": 0.1, "steps": 20, "accountant": "pld"},
    "pld, one sum": {"sampling_probability": 1, "steps": 1, "accountant": "pld"},
}


@pytest.mark.parametrize("setting", selection.params(SETTINGS, ["rdp", "pld, one sum"]))
def test_noise_gives_the_epsilon_asked_for_and_no_less_would(setting):
    setting = {**setting, "delta": 1e-5}
    noise = privacy.noise_multiplier_for(3.0, **setting)
    assert privacy.epsilon(noise, **setting) == pytest.approx(3.0, rel=1e-4)
    assert privacy.epsilon(noise, **setting) <= 3.0
    assert privacy.epsilon(noise - 1e-4, **setting) > 3.0


def test_the_ends():
    assert privacy.epsilon(0.0, sampling_probability=0.1, steps=3, delta=1e-5) == math.inf
    assert privacy.epsilon(1.0, sampling_probability=0.1, steps=0, delta=1e-5) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": -1.0}, "`noise_multiplier` must be a finite number of at least 0"),
        ({"noise_multiplier": math.nan}, "`noise_multiplier`"),
        (
            {"sampling_probability": 0.0},
            "`sampling_probability` must be .* of at most 1; found 0.0",
        ),
        ({"sampling_probability": 1.5}, "`sampling_probability`"),
        ({"steps": 2.5}, "`steps` must be a whole number"),
        ({"steps": -1}, "`steps`"),
        ({"delta": 0.0}, "`delta` must be a finite number above 0 and below 1"),
        ({"delta": True}, "`delta`"),
        ({"accountant": "moments"}, '`accountant` must be "rdp" or "pld"'),
    ],
)
def test_bad_arguments(change, message):
    good = {"noise_multiplier": 1.0, "sampling_probability": 0.1, "steps": 10, "delta": 1e-5}
    with pytest.raises(ValueError, match=message):
        privacy.epsilon(**{**good, **change})


def test_bad_targets():
    with pytest.raises(ValueError, match="`target_epsilon`"):
        privacy.noise_multiplier_for(0.0, sampling_probability=0.1, steps=10, delta=1e-5)
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        privacy.noise_multiplier_for(1.0, sampling_probability=0.1, steps=0, delta=1e-5)
