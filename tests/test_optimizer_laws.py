"""Puts every optimizer through every law, and guards that none is missing."""

import inspect

import contracts
import optax_cases
import pipeline_cases
import pytest
import selection
import tensorflow as tf

K = tf.keras.optimizers
_decay = K.schedules.ExponentialDecay(0.1, 3, 0.5, staircase=True)

CASES = {
    "SGD": contracts.keras_case(lambda: K.SGD(0.05, momentum=0.8, nesterov=True)),
    "SGD without momentum": contracts.keras_case(lambda: K.SGD(0.05, clipvalue=0.7)),
    "Adam": contracts.keras_case(lambda: K.Adam(0.05, beta_1=0.8, beta_2=0.97, amsgrad=True)),
    "AdamW": contracts.keras_case(lambda: K.AdamW(0.05, weight_decay=0.1, epsilon=1e-3)),
    "Adamax": contracts.keras_case(lambda: K.Adamax(0.05, beta_1=0.85)),
    "Nadam": contracts.keras_case(lambda: K.Nadam(0.05, beta_1=0.8)),
    "Adagrad": contracts.keras_case(lambda: K.Adagrad(0.1, initial_accumulator_value=0.3)),
    "Adadelta": contracts.keras_case(lambda: K.Adadelta(2.0, rho=0.8, epsilon=1e-3)),
    "RMSprop": contracts.keras_case(
        lambda: K.RMSprop(0.05, rho=0.8, momentum=0.5, centered=True, epsilon=1e-3)
    ),
    "Ftrl": contracts.keras_case(
        lambda: K.Ftrl(
            0.1,
            learning_rate_power=-0.6,
            l1_regularization_strength=0.01,
            l2_regularization_strength=0.02,
            l2_shrinkage_regularization_strength=0.1,
            beta=0.1,
        )
    ),
    "Adafactor": contracts.keras_case(
        lambda: K.Adafactor(0.1, beta_2_decay=-0.7, clip_threshold=0.9, epsilon_1=1e-6)
    ),
    "Lion": contracts.keras_case(lambda: K.Lion(0.02, beta_1=0.8)),
    "schedule": contracts.keras_case(lambda: K.Adam(_decay, weight_decay=0.02)),
    "moving average": contracts.keras_case(
        lambda: K.SGD(0.05, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=3)
    ),
    "clipped": contracts.keras_case(
        lambda: K.RMSprop(0.05, global_clipnorm=0.5), couples_weights=True
    ),
    **pipeline_cases.CASES,
    **{f"optax {name}": optax_cases.law_case(name) for name in ("sgd", "rmsprop")},
}


PAIRS = {
    f"{name}-{law.__name__}": (case, law) for name, case in CASES.items() for law in contracts.LAWS
}
# Numbers are the library's; all else is done by one class for all optimizers of a kind.
OF_NUMBERS = [contracts.agrees_in_python, contracts.carries_hparams]
# TFF takes a second to build what one of a library agrees in.
OUTSIDE_OF_TFF = [law for law in contracts.LAWS if law is not contracts.agrees_in_tff]
OF_A_KIND = {
    "SGD": contracts.LAWS,
    "Nadam": OUTSIDE_OF_TFF,  # keeps a number besides its slots
    "moving average": OUTSIDE_OF_TFF,
    "clipped": OUTSIDE_OF_TFF,
    "pipeline: everything, compiled": [contracts.agrees_in_tff, contracts.resumes_bit_for_bit],
    "pipeline: in a pipeline": OUTSIDE_OF_TFF,
    "pipeline: around Keras": OUTSIDE_OF_TFF,
    "optax rmsprop": contracts.LAWS,
    # Slots of another shape, and numbers that rounding in other dtypes shows in.
    "Adafactor": [contracts.takes_a_scalar_and_nothing, contracts.keeps_mixed_dtypes],
    "Ftrl": [contracts.keeps_mixed_dtypes, contracts.sums_repeated_and_changing_rows],
    "schedule": [contracts.resumes_bit_for_bit, contracts.keeps_types_and_makes_no_variables],
}
QUICK = [
    f"{name}-{law.__name__}" for name in CASES for law in {*OF_NUMBERS, *OF_A_KIND.get(name, [])}
]


@pytest.mark.parametrize(("case", "law"), selection.params(PAIRS, QUICK, unpack=True))
def test_law(case, law, tmp_path):
    if "directory" in inspect.signature(law).parameters:
        law(case, str(tmp_path))
    else:
        law(case)


def test_every_keras_optimizer_has_a_case():
    public = {
        name
        for name, value in vars(K).items()
        if isinstance(value, type) and issubclass(value, K.Optimizer) and value is not K.Optimizer
    }
    assert len(public) >= 11
    assert public <= set(CASES)


def test_every_law_is_checked():
    laws = {
        function
        for name, function in inspect.getmembers(contracts, inspect.isfunction)
        if not name.startswith("_") and list(inspect.signature(function).parameters)[:1] == ["case"]
    }
    assert laws == set(contracts.LAWS)
    assert len(laws) >= 11
