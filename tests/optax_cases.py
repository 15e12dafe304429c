"""Every public optax transformation: an optimizer, its plain optax, and what is told of it.

`python tests/optax_cases.py` prints the table of `docs/pages/guides/optax.md`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import contracts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import tensorflow as tf
from jax.experimental import enable_x64

import tff_optim

RATE = {"learning_rate": 0.05}


@attrs.frozen(slots=False)
class Case:
    """A transformation that runs.

    Attributes:
      made: A transformation, or a factory.
      arguments: The arguments of the factory.
      couples: One weight's gradient has a say in another's step.
      narrow: Its initial state has 32 bits even for weights of 64.
      positive: Plain optax gives NaN for negative gradients.
      by_position: It is made of a list, with something for each weight.
      others: What to set numbers to, where another 60 percent of them would change no step: a bound
        that is not met, a sign that does not turn.
    """

    made: Any
    arguments: Mapping[str, Any] = attrs.field(factory=dict)
    couples: bool = False
    narrow: bool = False
    positive: bool = False
    by_position: bool = False
    others: Mapping[str, float] = attrs.field(factory=dict)

    def ours(self, **arguments: Any) -> Any:
        return tff_optim.build_optax_optimizer(self.made, **{**self.arguments, **arguments})

    def plain(self, **arguments: Any) -> optax.GradientTransformation:
        made = self.made
        if isinstance(made, optax.GradientTransformation):
            return _with_injected(made, arguments)
        return made(**{**self.arguments, **arguments})

    def named(self) -> Any:
        """The optimizer, with names for two weights unless it knows them by position."""
        return self.ours(weight_names=None if self.by_position else ["first", "second"])

    @functools.cached_property
    def shared(self) -> Any:
        """One optimizer for all laws, which jax need not trace for each of them."""
        return self.named()

    @functools.cached_property
    def step(self) -> Any:
        """The step of `shared` as a function, which TensorFlow need not trace for each law."""
        return tf.function(self.shared.next)

    @functools.cached_property
    def compiled_plain(self) -> tuple[Any, Any]:
        """Plain optax' `init` and its `update`, compiled once for all laws."""
        transformation = self.plain()
        return transformation.init, jax.jit(transformation.update)


def _with_injected(made: optax.GradientTransformation, numbers: Mapping[str, float]) -> Any:
    """A transformation of `optax.inject_hyperparams` with some of its numbers set."""

    def init(params: Any) -> Any:
        state = made.init(params)
        return state._replace(hyperparams={**state.hyperparams, **numbers}) if numbers else state

    return optax.GradientTransformation(init, made.update)


def case(made: Callable[..., Any], **arguments: Any) -> Case:
    flags = ("couples", "narrow", "positive", "by_position", "others")
    return Case(made, arguments, **{n: arguments.pop(n) for n in flags if n in arguments})


def ready(transformation: optax.GradientTransformation, **flags: Any) -> Case:
    return Case(transformation, **flags)


_contrib = optax.contrib
_decay = optax.exponential_decay(0.1, 2, 0.5)
_descend = optax.sgd(0.05, momentum=0.5)
# Of steps that start at 0.05 and grow or shrink.
_BOUNDS = {"min_step_size": 0.04, "max_step_size": 0.055}
# Radam divides by the squares from the threshold on: in the fifth step, or never.
_LATE = {"threshold": 5.5, "eps": 1.0}


def _halve(gradients: Any, params: Any) -> Any:
    del params
    return jax.tree_util.tree_map(lambda g: -g / 2, gradients)


RUNS: dict[str, Case] = {
    "adabelief": case(optax.adabelief, **RATE, b1=0.8, b2=0.97),
    "adadelta": case(optax.adadelta, learning_rate=2.0, rho=0.8, weight_decay=0.01),
    "adafactor": case(optax.adafactor, learning_rate=0.1, min_dim_size_to_factor=2, momentum=0.5),
    "adagrad": case(optax.adagrad, **RATE, initial_accumulator_value=0.3),
    "adam": case(optax.adam, **RATE, b1=0.8, b2=0.97, eps_root=1e-6),
    "adamax": case(optax.adamax, **RATE, b1=0.8),
    "adamaxw": case(optax.adamaxw, **RATE, weight_decay=0.1),
    "adamw": case(optax.adamw, learning_rate=_decay, weight_decay=0.1, nesterov=True),
    "adaptive_grad_clip": case(optax.adaptive_grad_clip, clipping=0.1, others={"eps": 3.0}),
    "add_decayed_weights": case(optax.add_decayed_weights, weight_decay=0.1),
    "add_noise": case(optax.add_noise, eta=0.1, gamma=0.5, seed=3, couples=True),
    "amsgrad": case(optax.amsgrad, **RATE, b1=0.8),
    "apply_every": case(optax.apply_every, k=2),
    "apply_if_finite": case(optax.apply_if_finite, inner=_descend, max_consecutive_errors=2),
    "centralize": case(optax.centralize),
    "chain": ready(optax.chain(optax.clip(0.5), optax.trace(0.5), optax.scale(-0.1))),
    "clip": case(optax.clip, max_delta=0.7),
    "clip_by_block_rms": case(optax.clip_by_block_rms, threshold=0.5),
    "clip_by_global_norm": case(optax.clip_by_global_norm, max_norm=0.5, couples=True),
    "ema": case(optax.ema, decay=0.7),
    "flatten": ready(optax.flatten(optax.adam(0.05)), couples=True),
    "fromage": case(optax.fromage, learning_rate=0.05, others={"min_norm": 5.0}),
    "identity": case(optax.identity),
    "inject_hyperparams": ready(optax.inject_hyperparams(optax.adam)(**RATE, b1=0.8)),
    "inject_stateful_hyperparams": ready(
        optax.inject_stateful_hyperparams(optax.adam)(learning_rate=_decay, b1=0.8)
    ),
    "keep_params_nonnegative": case(optax.keep_params_nonnegative),
    "lamb": case(optax.lamb, **RATE, weight_decay=0.1),
    "lars": case(optax.lars, learning_rate=0.5, weight_decay=0.1, momentum=0.5),
    "lion": case(optax.lion, learning_rate=0.02, b1=0.8, others={"b1": 0.99}),
    "masked": ready(optax.masked(_descend, [True, False]), by_position=True),
    "maybe_update": case(optax.maybe_update, inner=_descend, should_update_fn=lambda s: s % 2 == 0),
    "multi_transform": ready(
        optax.multi_transform({"a": _descend, "b": optax.adam(0.05)}, ["a", "b"]), by_position=True
    ),
    "MultiSteps": case(optax.MultiSteps, opt=_descend, every_k_schedule=2),
    "nadam": case(optax.nadam, **RATE, b1=0.8),
    "nadamw": case(optax.nadamw, **RATE, b1=0.8, weight_decay=0.1),
    "named_chain": ready(optax.named_chain(("clip", optax.clip(0.5)), ("step", optax.adam(0.05)))),
    "noisy_sgd": case(optax.noisy_sgd, **RATE, eta=0.1, seed=3, couples=True),
    "novograd": case(optax.novograd, **RATE, weight_decay=0.1),
    "optimistic_gradient_descent": case(optax.optimistic_gradient_descent, **RATE, alpha=0.5),
    "radam": case(optax.radam, **RATE, b1=0.8, b2=0.9, threshold=4.5, others=_LATE),
    "rmsprop": case(optax.rmsprop, **RATE, decay=0.8, centered=True, momentum=0.5),
    "rprop": case(optax.rprop, learning_rate=0.05, eta_plus=1.5, others=_BOUNDS),
    "scale": case(optax.scale, step_size=-0.1),
    "scale_by_adadelta": case(optax.scale_by_adadelta, rho=0.8),
    "scale_by_adam": case(optax.scale_by_adam, b1=0.8, b2=0.97),
    "scale_by_adamax": case(optax.scale_by_adamax, b1=0.8),
    "scale_by_amsgrad": case(optax.scale_by_amsgrad, b1=0.8, b2=0.97),
    "scale_by_belief": case(optax.scale_by_belief, b1=0.8, b2=0.97, eps=1e-3),
    "scale_by_distance_over_gradients": case(
        optax.scale_by_distance_over_gradients, global_scale=-1.0, positive=True
    ),
    "scale_by_factored_rms": case(optax.scale_by_factored_rms, min_dim_size_to_factor=2),
    "scale_by_learning_rate": case(optax.scale_by_learning_rate, **RATE),
    "scale_by_lion": case(optax.scale_by_lion, b1=0.8, others={"b1": 0.99}),
    "scale_by_novograd": case(optax.scale_by_novograd, b1=0.8),
    "scale_by_optimistic_gradient": case(optax.scale_by_optimistic_gradient, alpha=0.5),
    "scale_by_param_block_norm": case(optax.scale_by_param_block_norm, min_scale=5.0),
    "scale_by_param_block_rms": case(optax.scale_by_param_block_rms, min_scale=5.0),
    "scale_by_radam": case(optax.scale_by_radam, b1=0.8, b2=0.9, threshold=4.5, others=_LATE),
    "scale_by_rms": case(optax.scale_by_rms, decay=0.8),
    "scale_by_rprop": case(optax.scale_by_rprop, learning_rate=0.05, others=_BOUNDS),
    "scale_by_rss": case(optax.scale_by_rss, initial_accumulator_value=0.3),
    "scale_by_schedule": case(optax.scale_by_schedule, step_size_fn=lambda step: -0.1 / (step + 1)),
    "scale_by_sm3": case(optax.scale_by_sm3, b1=0.8),
    "scale_by_stddev": case(optax.scale_by_stddev, decay=0.8),
    "scale_by_trust_ratio": case(optax.scale_by_trust_ratio, trust_coefficient=0.1),
    "scale_by_yogi": case(optax.scale_by_yogi, b1=0.8),
    "set_to_zero": case(optax.set_to_zero),
    "sgd": case(optax.sgd, **RATE, momentum=0.8, nesterov=True),
    "sm3": case(optax.sm3, learning_rate=0.05, momentum=0.5),
    "stateless": case(optax.stateless, f=_halve),
    "stateless_with_tree_map": case(optax.stateless_with_tree_map, f=lambda g, w: -g / 2),
    "trace": case(optax.trace, decay=0.5, nesterov=True),
    "with_extra_args_support": case(optax.with_extra_args_support, tx=_descend),
    "yogi": case(optax.yogi, **RATE, b1=0.8),
    "zero_nans": case(optax.zero_nans),
    "contrib.cocob": case(_contrib.cocob, alpha=50.0),
    "contrib.dadapt_adamw": case(_contrib.dadapt_adamw, estim_lr0=1e-3, couples=True, narrow=True),
    "contrib.mechanize": ready(
        _contrib.mechanize(_descend, s_init=1e-3), couples=True, narrow=True
    ),
    "contrib.normalize": case(_contrib.normalize, couples=True),
    "contrib.prodigy": case(
        _contrib.prodigy,
        estim_lr0=1e-3,
        weight_decay=0.1,
        couples=True,
        narrow=True,
        others={"estim_lr_coef": 50.0, "weight_decay": 5.0},
    ),
    "contrib.sam": ready(_contrib.sam(_descend, optax.sgd(0.05)), couples=True),
    "contrib.split_real_and_imaginary": ready(_contrib.split_real_and_imaginary(optax.adam(0.05))),
}

_PER_EXAMPLE = "batch dimension"
_PRIVATE = {"l2_norm_clip": 1.0, "noise_multiplier": 1.0, "seed": 0}

# What plain optax itself cannot run with gradients, state and weights alone; and words of the reason.
REFUSED: dict[str, tuple[Case, str]] = {
    "differentially_private_aggregate": (
        case(optax.differentially_private_aggregate, **_PRIVATE),
        _PER_EXAMPLE,
    ),
    "dpsgd": (
        case(optax.dpsgd, **RATE, **_PRIVATE),
        _PER_EXAMPLE,
    ),
    "lookahead": (
        case(optax.lookahead, fast_optimizer=_descend, sync_period=2, slow_step_size=0.5),
        "fast",
    ),
    "scale_by_backtracking_linesearch": (
        case(optax.scale_by_backtracking_linesearch, max_backtracking_steps=3),
        "extra arguments: value, grad, value_fn",
    ),
    "contrib.differentially_private_aggregate": (
        case(_contrib.differentially_private_aggregate, **_PRIVATE),
        _PER_EXAMPLE,
    ),
    "contrib.dpsgd": (
        case(_contrib.dpsgd, **RATE, **_PRIVATE),
        _PER_EXAMPLE,
    ),
    "contrib.reduce_on_plateau": (case(_contrib.reduce_on_plateau), "extra arguments: loss"),
}
REASONS = {
    _PER_EXAMPLE: "clips the gradient of every example, and TFF hands over their mean",
    "fast": "its weights are pairs of fast and slow ones (`LookaheadParams`)",
    "extra arguments: loss": "its `update` needs `loss`, which TFF does not hand to an optimizer",
    "extra arguments: value, grad, value_fn": (
        "its `update` needs `value`, `grad` and `value_fn`, which TFF does not hand to an optimizer"
    ),
}


def public_transformations() -> set[str]:
    """optax' own list of public names that make a transformation."""
    found = set()
    for module, prefix in ((optax, ""), (optax.contrib, "contrib.")):
        for name, value in vars(module).items():
            if name.startswith("_") or not callable(value):
                continue
            makes = "GradientTransformation" in str(_returns(value))
            untold = name.startswith("scale_by_") or hasattr(value, "gradient_transformation")
            if makes or untold:
                found.add(prefix + name)
    return found


def _returns(value: Any) -> Any:
    try:
        return inspect.signature(value).return_annotation
    except (TypeError, ValueError):
        return ""


def run_plain(
    case: Case, weights: list[np.ndarray], steps: list[list[np.ndarray]], **numbers: float
) -> list[np.ndarray]:
    """Plain optax, built with these numbers, under jax' 64 bits if a weight has them."""
    wide = any(w.dtype == np.float64 for w in weights)
    with enable_x64(wide):
        init, update = case.compiled_plain
        if wide or numbers:  # some compute constants when they are built
            transformation = case.plain(**numbers)
            init, update = transformation.init, transformation.update
        params = [jnp.asarray(w) for w in weights]
        state = init(params)
        for gradients in steps:
            updates, state = update([jnp.asarray(g) for g in gradients], state, params)
            params = optax.apply_updates(params, updates)
        return [np.asarray(w) for w in params]


def run_by_laws(case: Case, weights: list[Any], steps: list[list[Any]]) -> list[np.ndarray]:
    """Plain optax where a gradient may be None or sparse: zeros, and all of that weight put back."""

    def put_back(path: tuple[Any, ...], new: Any, old: Any) -> Any:
        return old if getattr(path[-1], "idx", None) in missing else new

    transformation = case.plain()
    params = [jnp.asarray(np.asarray(w)) for w in weights]
    state = transformation.init(params)
    for gradients in steps:
        missing = {i for i, g in enumerate(gradients) if g is None}
        dense = [
            jnp.zeros_like(w) if g is None else jnp.asarray(np.asarray(tf.convert_to_tensor(g)))
            for g, w in zip(gradients, params)
        ]
        updates, new_state = transformation.update(dense, state, params)
        state = jax.tree_util.tree_map_with_path(put_back, new_state, state)
        stepped = optax.apply_updates(params, updates)
        params = [w if i in missing else n for i, (w, n) in enumerate(zip(params, stepped))]
    return [np.asarray(w) for w in params]


def law_case(name: str) -> contracts.Case:
    """A case of the laws of all optimizers, for those whose numbers a rounding does not move much."""
    case = RUNS[name]

    def reference(weights: Any, steps: Any) -> list[np.ndarray]:
        with enable_x64(any(np.asarray(w).dtype == np.float64 for w in weights)):
            return run_by_laws(case, weights, steps)

    return contracts.Case(case.ours, reference, couples_weights=case.couples)


def table() -> str:
    """What runs, what does not, and why, as the optimizers themselves tell it."""
    specs = [tf.TensorSpec((3, 2), tf.float32), tf.TensorSpec((2,), tf.float32)]
    rows = ["| transformation | runs | numbers that may change |", "| --- | --- | --- |"]
    for name, entry in sorted({**RUNS, **REFUSED}.items()):
        if name in REFUSED:
            rows.append(f"| `{name}` | no: {REASONS[entry[1]]} | |")
            continue
        state = entry.ours().initialize(specs)
        numbers = [n for n in state if n not in ("step", "slots")]
        starts = ", starting from the weights" if "step" in state else ""
        rows.append(f"| `{name}` | yes{starts} | {', '.join(f'`{n}`' for n in numbers)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
