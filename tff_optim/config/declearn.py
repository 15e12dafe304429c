"""Configurations of declearn's `Optimizer`, read.

declearn (https://gitlab.inria.fr/magnet/declearn, 2.x) writes an optimizer as `lrate`, `w_decay`,
`regularizers` and `modules`, with entries `name` or `[name, arguments]`. This builds the pipeline that
computes the same. What has no counterpart is refused, with the reason.

- A schedule here counts the steps of its optimizer. declearn's `step_level: false` and
  `warmup-rounds` count rounds, which no optimizer of TFF knows; at the server a round is one step.
- The state of a client begins anew in each round, as with `round_reset: true`. At the server such a
  reset would leave nothing to do. FedProx keeps the weights of the first step of a round.
- Noise comes from another generator. It has declearn's distribution, but other numbers.
"""

from collections.abc import Mapping

import attrs
import tensorflow as tf

from tff_optim import regularizers, schedules, transforms
from tff_optim.core.entries import MOST_PARTS, Described, Entry, suggestion
from tff_optim.core.messages import refusal
from tff_optim.core.types import Function, Json, Named, Rate
from tff_optim.keras_objects import as_json as keras_objects
from tff_optim.pipeline import build_optimizer

_Keras = tf.keras.optimizers.schedules


@attrs.frozen
class _Rule:
    """Builds a named entry from arguments, which have declearn's names.

    `fixed` arguments may only have the one value that has a counterpart here.
    """

    make: Function
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Json, str, str]] = {}


_RESET = {
    "round_reset": (
        False,
        "be false",
        "On clients a state begins anew in each round anyway, and at the server a round is one step.",
    )
}
_BY_STEP = {
    "step_level": (
        True,
        "be true",
        "A schedule counts the steps of its optimizer, since no optimizer of TFF knows the round. At "
        "the server a round is one step: leave `step_level` out.",
    )
}

_MODULES: Mapping[str, _Rule] = {
    "momentum": _Rule(transforms.Momentum, optional=("beta", "nesterov"), fixed=_RESET),
    "ewma": _Rule(transforms.EWMA, optional=("beta",), fixed=_RESET),
    "yogi-momentum": _Rule(transforms.YogiMomentum, optional=("beta",), fixed=_RESET),
    "adagrad": _Rule(transforms.Adagrad, optional=("eps",), fixed=_RESET),
    "rmsprop": _Rule(transforms.RMSProp, optional=("beta", "eps"), fixed=_RESET),
    "adam": _Rule(transforms.Adam, optional=("beta_1", "beta_2", "amsgrad", "eps"), fixed=_RESET),
    "yogi": _Rule(transforms.Yogi, optional=("beta_1", "beta_2", "amsgrad", "eps"), fixed=_RESET),
    "tensorflow-optim": _Rule(transforms.KerasTransform, required=("optim",), fixed=_RESET),
    "l2-clipping": _Rule(transforms.ClipByNorm, optional=("max_norm",)),
    "l2-global-clipping": _Rule(transforms.ClipByGlobalNorm, optional=("max_norm",)),
    "gaussian-noise": _Rule(
        transforms.GaussianNoise,
        required=("safe_mode",),  # true by default
        optional=("std", "seed"),
        fixed={
            "safe_mode": (
                False,
                "be false",
                "TensorFlow has no cryptographic generator, and a computation of TFF cannot ask the "
                "system for one.",
            )
        },
    ),
}
_REGULARIZERS: Mapping[str, _Rule] = {
    "fedprox": _Rule(regularizers.FedProx, optional=("alpha",)),
    "lasso": _Rule(lambda alpha=0.01: tf.keras.regularizers.L1(alpha), optional=("alpha",)),
    "ridge": _Rule(lambda alpha=0.01: tf.keras.regularizers.L2(alpha), optional=("alpha",)),
}
_NAMES = {"eps": "epsilon", "std": "stddev", "optim": "optimizer"}
_SCAFFOLD = (
    "It exchanges variables besides the model, which takes a whole learning process: see "
    "`aggregators.build_scaffold`."
)
# Advice for modules without a counterpart.
_NO_COUNTERPART = {
    "scaffold-client": _SCAFFOLD,
    "scaffold-server": _SCAFFOLD,
    "torch-optim": "torch takes whole steps, in a process of its own: give the server "
    "`tff_optim.build_torch_optimizer`.",
    "warmup-rounds": "No optimizer of TFF knows the round. At the server a round is one step: take "
    "`warmup`.",
}


def _linear(base: float, rate: float) -> Rate:
    return _Keras.PolynomialDecay(base, 1 / rate, 0.0) if rate else base


def _cosine(base: float, max_lr: float, duration: float) -> Rate:
    if max_lr <= 0:
        raise refusal("max_lr", "be greater than 0", f"{max_lr!r}")
    return _Keras.CosineDecay(max_lr, duration, alpha=base / max_lr)


def _triangular(base: float, max_lr: float, stepsize: float, decay: bool = False) -> Rate:
    return schedules.Triangular(base, max_lr, stepsize, cycle_factor=0.5 if decay else 1.0)


_SCHEDULES: Mapping[str, _Rule] = {
    "exponential-decay": _Rule(
        lambda base, rate: _Keras.ExponentialDecay(base, 1, rate), ("base", "rate"), fixed=_BY_STEP
    ),
    "piecewise-decay": _Rule(
        lambda base, rate, step_size: _Keras.ExponentialDecay(base, step_size, rate, True),
        ("base", "rate", "step_size"),
        fixed=_BY_STEP,
    ),
    "inverse-scaling": _Rule(
        lambda base, rate: schedules.InverseScaling(base, rate), ("base", "rate"), fixed=_BY_STEP
    ),
    "linear-decay": _Rule(_linear, ("base", "rate"), fixed=_BY_STEP),
    "polynomial-decay": _Rule(
        lambda base, power, limit: _Keras.PolynomialDecay(base, limit, 0.0, power),
        ("base", "power", "limit"),
        fixed=_BY_STEP,
    ),
    "cosine-annealing": _Rule(_cosine, ("base", "max_lr", "duration"), fixed=_BY_STEP),
    "cosine-annealing-warm-restarts": _Rule(
        lambda base, max_lr, period, t_mult=1.0: schedules.CosineRestarts(
            base, max_lr, period, t_mult
        ),
        ("base", "max_lr", "period"),
        ("t_mult",),
        fixed=_BY_STEP,
    ),
    "cyclic-triangular": _Rule(_triangular, ("base", "max_lr", "stepsize"), ("decay",)),
    "cyclic-exp-range": _Rule(
        lambda base, max_lr, stepsize, decay: schedules.Triangular(
            base, max_lr, stepsize, step_factor=decay
        ),
        ("base", "max_lr", "stepsize", "decay"),
    ),
    "warmup": _Rule(
        lambda base, warmup: schedules.Warmup(base[0], warmup, base[1]), ("base", "warmup")
    ),
}


def from_json(entry: Entry) -> Described:
    """Reads the pipeline that a configuration of declearn's `Optimizer` means.

    Raises:
      TypeError: If an entry is of the wrong type.
      ValueError: If an entry is unknown, missing, out of range, or has no counterpart.
    """
    fields = entry.fields({"lrate", "w_decay", "regularizers", "modules"}, {"lrate"})
    given: Named = {}
    if "w_decay" in fields:
        given["weight_decay"] = _rate(fields["w_decay"])
    for name, argument, rules in (
        ("regularizers", "regularizers", _REGULARIZERS),
        ("modules", "transforms", _MODULES),
    ):
        if name in fields and fields[name].value is not None:
            given[argument] = [_named(item, rules) for item in fields[name].items(MOST_PARTS)]
    given["learning_rate"] = _rate(fields["lrate"])
    return Described(entry, build_optimizer, given)


def _rate(entry: Entry) -> Json | Described:
    if not isinstance(entry.value, list):
        return entry.value
    return _named(entry, _SCHEDULES)


def _warmed(entry: Entry) -> tuple[Json, Json | Described]:
    """The rate that a warm-up leads to, which is the `base` of the schedule after it, and that."""
    inner = entry
    while isinstance(inner.value, list) and len(inner.value) == 2:
        inner = inner.at(1).fields(inner.at(1).value, {"base"})["base"]
    return inner.value, _rate(entry) if inner is not entry else None


def _named(entry: Entry, rules: Mapping[str, _Rule]) -> Described:
    pair = isinstance(entry.value, list) and len(entry.value) == 2
    name = entry.at(0) if pair else entry
    if not isinstance(name.value, str):
        entry.refuse("be like 'name' or ['name', {...}]", TypeError)
    if name.value in _NO_COUNTERPART:
        name.refuse("have a counterpart here", advice=_NO_COUNTERPART[name.value])
    if name.value not in rules:
        name.refuse(
            f"be a name of declearn that has a counterpart here{suggestion(name.value, rules)}"
        )
    rule = rules[name.value]
    inner = entry.at(1) if pair else attrs.evolve(entry, value={})
    parts = inner.fields({*rule.required, *rule.optional, *rule.fixed}, rule.required)
    arguments: Named = {}
    for key, part in parts.items():
        if key in rule.fixed:
            value, must, advice = rule.fixed[key]
            if part.value is not value:
                part.refuse(must, advice=advice)
        elif key == "optim":
            arguments[_NAMES[key]] = keras_objects.optimizer_from_json(part)
        elif key == "base" and name.value == "warmup":
            arguments[key] = _warmed(part)
        else:
            is_whole = isinstance(part.value, int) and not isinstance(part.value, bool)
            # Keras' schedules would compute with integers.
            value = float(part.value) if rules is _SCHEDULES and is_whole else part.value
            arguments[_NAMES.get(key, key)] = value
    return Described(entry, rule.make, arguments)
