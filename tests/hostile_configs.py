"""Hostile configurations, made from a seed, and what `from_config` does with them.

Run all of it: `python tests/hostile_configs.py --count 12000`. `test_hostile_configs.py` runs a part.

A case starts from a configuration that is right and changes it in one to three places: other values,
names, modules, classes, kinds, patterns, keys; what was removed, doubled, or nested too deep. It is
handled rightly if it is

- refused with a `ValueError` or `TypeError` that names the entry, in a message of bounded length, or
- built, and the optimizer takes two steps that give no NaN (torch is not here: one of its optimizers
  is only built);

and in either case within seconds, while nothing is imported, executed or opened.
"""

import argparse
import collections
import contextlib
import copy
import faulthandler
import json
import random
import reprlib
import signal
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

import tff_optim
from tff_optim import transforms
from tff_optim.backends.torch.optimizer import TorchOptimizer

SECONDS = 20
LONGEST_MESSAGE = 3000
LAZY = "lazily_loading_package"
CANARIES = ("antigravity", "this", "turtle", "smtplib", "xmlrpc.server", "wsgiref.simple_server")


# ----------------------------------------------------------------------- what nobody may make us run


@attrs.define
class Alarm:
    """What was run while it was armed."""

    armed: bool = False
    events: list[str] = attrs.field(factory=list)

    def ring(self, event: str) -> None:
        if self.armed:
            self.events.append(event)

    @contextlib.contextmanager
    def set(self) -> Iterator[list[str]]:
        self.events, self.armed = [], True
        try:
            yield self.events
        finally:
            self.armed = False


ALARM = Alarm()
_EXECUTE = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.fork")


def audit(event: str, arguments: Any) -> None:
    if not ALARM.armed:
        return
    if event in _EXECUTE or (event == "import" and arguments[0] in CANARIES):
        ALARM.ring(f"{event} {arguments[0]}")


class _LazyModule(types.ModuleType):
    """A trusted package that loads its submodules when they are asked for, as scipy does."""

    def __getattribute__(self, name: str) -> Any:
        ALARM.ring(f"{LAZY}.__getattribute__({name!r})")
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        ALARM.ring(f"{LAZY}.{name}")
        if name == "evil":
            return types.SimpleNamespace(Evil=Evil)
        raise AttributeError(name)


class Evil(tf.keras.optimizers.Optimizer):
    def __init__(self, learning_rate=0.1, name="Evil", **kwargs):
        ALARM.ring("Evil()")
        super().__init__(name=name, **kwargs)


class Good(tf.keras.optimizers.SGD):
    """What the trusted package really holds."""


@contextlib.contextmanager
def lazy_package() -> Iterator[None]:
    """The package above, among the modules that are imported."""
    module = _LazyModule(LAZY)
    Good.__module__ = LAZY
    module.__dict__.update(Good=Good, np=np, os=sys.modules["os"], Evil=Evil)
    sys.modules[LAZY] = module
    try:
        yield
    finally:
        del sys.modules[LAZY]


# ------------------------------------------------------------------------------------ right to start

OPTAX: list[Any] = [
    {"kind": "optax", "transformation": "adamw", "arguments": {"learning_rate": 0.1, "b1": 0.5}},
    {
        "kind": "optax",
        "transformation": "contrib.prodigy",
        "arguments": {"learning_rate": 1.0, "safeguard_warmup": True},
        "weight_names": ["kernel", "bias"],
        "device": None,
    },
]
TORCH: list[Any] = [
    {
        "kind": "torch",
        "optimizer": "Adam",
        "arguments": {"lr": 0.1, "betas": [0.8, 0.9], "amsgrad": True},
        "lr_scheduler": ["StepLR", {"step_size": 3}],
    },
    {"kind": "torch", "optimizer": f"{LAZY}.Good", "arguments": {"lr": 0.1}},
]
# Names of both libraries, arguments of our own functions, and what is neither.
NAMES = [
    "adam", "sgd", "contrib.sam", "chain", "inject_hyperparams", "stateless", "MultiSteps", "losses",
    "contrib", "contrib.prodigy.__globals__", "_src.alias.adam", "GradientTransformation", "os.system",
    "apply_updates", "global_norm", "flatten", "masked", "optax.adam", "SGD", "LBFGS", "Optimizer",
    "torch.hub.load", "builtins.eval", "lr_scheduler", "lr_scheduler.StepLR", "StepLR", "LambdaLR",
    f"{LAZY}.evil.Evil", *(f"{name}.X" for name in CANARIES), ".", "", "\0", "a" * 9999, "Adam ", "é",
]  # fmt: skip
ARGUMENTS = [
    "python", "trusted_packages", "lr_scheduler", "device", "weight_names", "optimizer", "params",
    "transformation_or_factory", "mask", "inner", "inner_factory", "learning_rate", "mu_dtype", "seed",
    "foreach", "closure", "self", "__class__",
]  # fmt: skip


def _starts() -> list[Any]:
    keras, schedules = tf.keras.optimizers, tf.keras.optimizers.schedules
    decay = schedules.ExponentialDecay(0.3, 2, 0.5)
    excluding = keras.AdamW(0.1)
    excluding.exclude_from_weight_decay(var_names=["bias"])
    full = [
        tff_optim.build_keras_optimizer(keras.SGD(decay, momentum=0.5, clipnorm=1.0)),
        tff_optim.build_keras_optimizer(excluding, weight_names=["kernel", "bias"]),
        tff_optim.build_optimizer(
            schedules.PiecewiseConstantDecay([1], [0.2, 0.1]),
            regularizers=[
                tff_optim.regularizers.FedProx(0.5),
                tf.keras.regularizers.L1L2(0.1, 0.2),
            ],
            transforms=[
                transforms.ClipByGlobalNorm(1.0),
                transforms.Adam(0.5, decay),
                transforms.KerasTransform(keras.RMSprop()),
                transforms.GaussianNoise(0.1, seed=1),
            ],
            weight_decay=0.1,
            projection=[
                tf.keras.constraints.MaxNorm(3.0),
                tff_optim.projections.Projection(tff_optim.projections.Box(-9.0, 9.0), where="0|1"),
            ],
        ),
    ]
    decayed = {"initial_learning_rate": 0.1, "decay_steps": 5, "decay_rate": 0.5}
    return [
        *(tff_optim.get_config(optimizer) for optimizer in full),
        "adam",
        ["SGD", {"learning_rate": ["ExponentialDecay", decayed]}],
        {"class_name": "Adam", "config": {"learning_rate": 0.1}, "registered_name": "Adam"},
        {
            "kind": "pipeline",
            "learning_rate": 0.1,
            "regularizers": ["L2", ["FedProx", {"alpha": 0.1}]],
            "transforms": [["Momentum", {"beta": 0.5}], ["KerasTransform", {"optimizer": "adam"}]],
            "projection": [["MaxNorm", {"max_value": 2.0}], {"function": "NonNeg", "where": "0"}],
        },
        {
            "lrate": [
                "warmup",
                {"base": ["inverse-scaling", {"base": 0.1, "rate": 0.5}], "warmup": 2},
            ],
            "w_decay": 0.1,
            "regularizers": [["fedprox", {"alpha": 0.1}], "lasso"],
            "modules": ["l2-clipping", ["adam", {"beta_1": 0.5, "amsgrad": True}]],
        },
        {"kind": "keras", "optimizer": {"module": LAZY, "class_name": "Good", "config": {}}},
        *OPTAX,
        *TORCH,
    ]


# ----------------------------------------------------------------------------------- ways to change


def deep(depth: int, wrap: str) -> Any:
    value: Any = 0.1
    for _ in range(depth):
        value = [value] if wrap == "list" else {"config": value, "class_name": "SGD"}
    return value


def doubling() -> Any:
    """A small object that holds itself 2^60 times."""
    value: Any = [0.1]
    for _ in range(60):
        value = [value, value]
    return value


def cycle() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


class _Loud(str):
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


VALUES = [
    None, True, False, 0, 1, -1, 2, 0.0, -0.0, 0.5, 1.0, -0.5, 1e-50, 1e39, 1e308, -1e39,
    float("nan"), float("inf"), float("-inf"), 10**30, 10**400, -(10**400), 2**63, 2**64,
    "", "x", "0.1", "nan", "Adam", "adam", "L2", "MaxNorm", "FedProx", "ExponentialDecay", "\0",
    "\ud800", "a" * 100_000, "../../etc/passwd", "/dev/zero", "config.json", "{", "[1, 2", "/GPU:99",
    "/CPU:99999999999999999999", "/CPU:-1", "/job:evil/task:7/CPU:0", "__class__", "lambda: 0",
    [], {}, [None], [[]], [0.1], ["Adam"], ["Adam", {}], ["Adam", {}, {}], [{}, {}], [0.1, 0.2], {"": 0},
    {1: 2, "a": 3}, {None: 1}, {("a", 1): 1}, (1, 2), b"bytes", 1j, {1, 2}, object(), print, Evil,
    np.float32(np.nan), np.float64(0.1), np.array([1.0, 2.0]), np.int64(3), tf.float32, _Loud("x"),
    {"kind": "keras"}, {"kind": "pipeline"}, {"kind": ["keras"]}, {"kind": "optax"},
    {"kind": "torch"}, {"kind": "jax"},
    {"kind": "keras", "optimizer": "adam"}, {"kind": "pipeline", "learning_rate": 0.1},
    {"class_name": "SGD"}, {"class_name": None}, {"class_name": "L2", "config": {"l2": 0.1}},
    {"class_name": "ExponentialDecay", "config": {}}, {"class_name": "MaxNorm", "config": {}},
    {"class_name": "MaxNorm", "config": {"max_value": -1.0}}, ["MaxNorm", {"max_value": 1e39}],
    ["ExponentialDecay", {"initial_learning_rate": 1.0, "decay_steps": 1, "decay_rate": 1e30}],
    ["ExponentialDecay", {"initial_learning_rate": 1.0, "decay_steps": 0, "decay_rate": 0.5}],
    ["InverseTimeDecay", {"initial_learning_rate": 1.0, "decay_steps": 1, "decay_rate": -1.0}],
    ["PolynomialDecay", {"initial_learning_rate": 1, "decay_steps": 3, "end_learning_rate": 0}],
    ["PiecewiseConstantDecay", {"boundaries": ["a"], "values": [0.1, 0.2]}],
    ["warmup", {"base": ["warmup", {"base": 0.1, "warmup": 2}], "warmup": 2}],
    ["linear-decay", {"base": 0.1, "rate": 0}], ["cosine-annealing", {"base": 0.1, "max_lr": 0}],
    {"lrate": 0.1}, {"function": "NonNeg"}, {"function": {"function": "NonNeg"}},
]  # fmt: skip
MAKERS = [
    lambda: deep(40, "list"),
    lambda: deep(40, "dict"),
    lambda: deep(100_000, "list"),
    doubling,
    cycle,
]
PATTERNS = [
    "(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*)*x", "(([a-z])+.)+[A-Z]([a-z])+$", "(", ")", "[", "*", "a{,3}",
    "a{1000}{1000}", "(?:" * 5000 + ")" * 5000, "(" * 400 + ")" * 400, "(?=a)", r"(a)\1", "(?P<n",
    "x" * 5000,
    "(a{0,900}){0,900}", "[[:alpha:]]", r"\Z", "(?i)bias", "\ud800", "^0$", "(x+x+)+y", "|" * 900,
]  # fmt: skip
MODULES = [
    "os", "subprocess", "builtins", "sys", "importlib", "keras", "keras.optimizers", "keras.layers",
    "keras.optimizers.legacy", "keras.regularizers", "tensorflow", "tensorflow.keras.optimizers",
    "keras.src.optimizers.adam", LAZY, f"{LAZY}.evil", f"{LAZY}.os", "tff_optim", "",
    "tff_optim.config.optimizers", ".", "..", "numpy", *CANARIES, "__main__", "tff_optim.schedules",
]  # fmt: skip
CLASSES = [
    "system", "Popen", "eval", "exec", "Lambda", "SGD", "Adam", "Optimizer", "LearningRateSchedule",
    "Regularizer", "Constraint", "evil.Evil", "Evil", "Good", "Good.__init__", "os.system", "np.float32",
    "__class__", "Good.__class__", "schedules.ExponentialDecay", "l2", "serialize", "deserialize", "L2",
    "LossScaleOptimizer", "Sequential", "", ".", "Good.", "function", "__lambda__", "_Schedule",
    "schedules", "KerasOptimizer", "Custom>Adam", "Package>Evil", "CosineDecay",
]  # fmt: skip


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(item, (*path, key))


def _replaced(config: Any, path: tuple, change: Any) -> Any:
    if not path:
        return change(config)
    holder = config
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = change(holder[path[-1]])
    return config


def _change_value(rng: random.Random, value: Any) -> Any:
    if rng.random() < 0.04:
        return rng.choice(MAKERS)()
    new = rng.choice(VALUES)
    return copy.deepcopy(new) if isinstance(new, list | dict) else new


def _change_keys(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value:
        key, kind = rng.choice(list(value)), rng.randrange(4)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[
                rng.choice(
                    [str(key).upper(), f"{key}_", "__init__", "mesh", "custom_objects", "lr"]
                )
            ] = value.pop(key)
        elif kind == 2:
            value[rng.choice(["unknown", 3, None, "mesh", "jit_compile", "decay"])] = value[key]
        else:
            value[key] = {key: value[key]}
    elif isinstance(value, list) and value:
        rng.choice([value.pop, lambda: value.append(value[0]), value.reverse])()
    return value


def _change_class(rng: random.Random, value: Any) -> Any:
    new: dict[str, Any] = {"class_name": rng.choice(CLASSES)}
    if rng.random() < 0.8:
        new["module"] = rng.choice(MODULES)
    if rng.random() < 0.8:
        new["config"] = value.get("config", {}) if isinstance(value, dict) else {}
    if rng.random() < 0.3:
        new["registered_name"] = rng.choice([None, "Adam", "Custom>SGD", 3, "SGD"])
    return new


def _change_pattern(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict):
        for key, make in (("where", str), ("exclude_from_weight_decay", lambda p: [p])):
            if key in value:
                value[key] = make(rng.choice(PATTERNS))
                return value
    return rng.choice(PATTERNS)


def _change_library(rng: random.Random, value: Any) -> Any:
    """Another name or other arguments in an entry of optax or torch."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in ("optax", "torch"):  # an array has no truth value
        return rng.choice(NAMES)
    key = "optimizer" if kind == "torch" else "transformation"
    if rng.random() < 0.5:
        value[key] = rng.choice(NAMES)
    if rng.random() < 0.5 and isinstance(value.get("arguments"), dict):
        value["arguments"][rng.choice(ARGUMENTS)] = _change_value(rng, None)
    return value


CHANGES = [
    _change_value,
    _change_value,
    _change_keys,
    _change_class,
    _change_pattern,
    _change_library,
]


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxstring = 12, 20, 20, 100


@attrs.frozen(eq=False, repr=False)
class Case:
    """A configuration, and the packages that are trusted with it."""

    config: Any
    trusted: tuple[str, ...]

    def __repr__(self) -> str:  # some have no end
        return f"Case({_REPR.repr(self.config)}, trusted={self.trusted})"


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """Makes `count` hostile configurations from a seed."""
    rng = random.Random(seed)
    starts = _starts()
    for _ in range(count):
        config = copy.deepcopy(rng.choice(starts))
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            path = rng.choice(list(_places(config)))
            change = rng.choice(CHANGES)
            config = _replaced(config, path, lambda value: change(rng, value))  # noqa: B023
            if not isinstance(config, dict | list) or _is_endless(config):
                break
        if isinstance(config, dict | list) and rng.random() < 0.1:
            with contextlib.suppress(TypeError, ValueError, RecursionError):
                if not _is_endless(config):
                    text = json.dumps(config)
                    config = text[: rng.randrange(len(text))] if rng.random() < 0.5 else text
        yield Case(config, rng.choice([(), (LAZY,), (LAZY, "os", "builtins", *CANARIES)]))


def _is_endless(value: Any) -> bool:
    """Whether walking through a value would never end."""
    count, todo = 0, [value]
    while todo:
        count += 1
        if count > 5000:
            return True
        item = todo.pop()
        if isinstance(item, dict | list):
            todo.extend(item.values() if isinstance(item, dict) else item)
    return False


# ----------------------------------------------------------------------------------------- judgement


class Hung(BaseException):
    """Not an `Exception`, so that nothing takes it for one of a constructor."""


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raises `Hung` after this time of the processor, however busy the machine is."""

    def stop(*unused: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(30 * seconds, exit=True)  # where no Python code runs
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


WEIGHTS = [np.float32([[0.5, -1.0], [1.0, 0.0]]), np.float32([0.5, -0.5])]


def _step(optimizer: Any) -> None:
    specs = [tf.TensorSpec(w.shape, w.dtype) for w in WEIGHTS]
    state, weights = optimizer.initialize(specs), WEIGHTS
    for _ in range(2):
        state, weights = optimizer.next(state, weights, [np.ones_like(w) for w in WEIGHTS])
    if any(np.isnan(w).any() for w in weights):
        raise FloatingPointError("the weights are NaN")


def judge(case: Case) -> str:
    """Says what became of a case: 'refused', 'built', or what went wrong."""
    with ALARM.set() as events:
        try:
            with _time_limit(SECONDS):
                try:
                    optimizer = tff_optim.from_config(
                        case.config, trusted_packages=case.trusted, torch_python=sys.executable
                    )
                except (TypeError, ValueError) as error:
                    message = str(error)
                    if not message.startswith("`") or len(message) > LONGEST_MESSAGE:
                        return f"unclean: {type(error).__name__}: {message[:200]}"
                    return f"ran: {events}" if events else "refused"
                if isinstance(optimizer, TorchOptimizer):
                    return f"ran: {events}" if events else "built"
                try:
                    _step(optimizer)
                except ValueError as error:  # weights of other names, say
                    if not str(error).startswith("`"):
                        return f"unclean in a step: {error!r:.300}"
        except Hung:
            return "hung"
        except Exception as error:
            return f"unclean: {type(error).__name__}: {str(error)[:200]}"
        return f"ran: {events}" if events else "built"


def attack(count: int, seed: int = 0, show: Any = None) -> collections.Counter:
    """Judges `count` cases; calls `show(case, verdict)` for each that was not handled rightly."""
    sys.addaudithook(audit)
    found: collections.Counter = collections.Counter()
    with lazy_package():
        # What TensorFlow and optax import when they are first used.
        judge(Case("adam", ()))
        judge(Case(OPTAX[0], ()))
        for case in cases(count, seed):
            verdict = judge(case)
            found[verdict.split(":")[0]] += 1
            if show is not None and verdict not in ("refused", "built"):
                show(case, verdict)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tff.test.set_no_default_context()
    start = time.perf_counter()

    def show(case: Case, verdict: str) -> None:
        print(f"{verdict}\n  {case}", flush=True)

    found = attack(arguments.count, arguments.seed, show)
    print(
        f"{sum(found.values())} configurations in {time.perf_counter() - start:.0f} s: {dict(found)}"
    )


if __name__ == "__main__":
    main()
