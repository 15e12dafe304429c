"""A seeded part of the attack on `from_config`, and the cases that once got through."""

import collections
import json
import os
import re
import sys
import time

import hostile_configs
import numpy as np
import pytest
import tensorflow as tf
from hostile_configs import LAZY, Case

import tff_optim
from tff_optim import projections
from tff_optim.core import entries, patterns

BASE = {"kind": "pipeline", "learning_rate": 0.1}
OPTAX, TORCH = hostile_configs.OPTAX[0], hostile_configs.TORCH[0]


def test_a_part_of_the_attack_is_refused_or_built_and_nothing_else():
    wrong = []
    found = hostile_configs.attack(300, seed=1, show=lambda case, verdict: wrong.append(verdict))
    assert not wrong
    assert found["refused"] > 200
    assert found["built"] > 10
    assert sum(found.values()) == 300


def test_the_attack_would_notice(monkeypatch):
    """What goes wrong is counted as such: code that runs, NaN, an unclean refusal, a hang."""
    keep = Case("adam", ())

    def behaves(function):
        monkeypatch.setattr(tff_optim, "from_config", function)
        return hostile_configs.judge(keep).partition(":")[0]

    def imports(config, **options):
        sys.modules.pop("this", None)
        sys.audit("import", "this", None, None, None, None)
        raise ValueError("`config` must be good.")

    def poisons(config, **options):
        optimizer = tff_optim.build_optimizer(0.1, projection=lambda w: w * np.float32(np.nan))
        return optimizer

    def mumbles(config, **options):
        raise KeyError("x")

    def never_ends(config, **options):
        while True:
            pass

    monkeypatch.setattr(hostile_configs, "SECONDS", 1)
    sys.addaudithook(hostile_configs.audit)
    assert behaves(imports) == "ran"
    assert behaves(poisons) == "unclean"
    assert behaves(mumbles) == "unclean"
    assert behaves(never_ends) == "hung"


def refused(config, message, trusted=()):
    with hostile_configs.lazy_package(), hostile_configs.ALARM.set() as events:
        start = time.process_time()
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            tff_optim.from_config(config, trusted_packages=trusted)
        assert time.process_time() - start < 20
        assert len(str(caught.value)) < 3000
        assert not events


MANY_KEYS = {f"k{i}": 0 for i in range(40_000)}


def piecewise(number):
    values = [1.0] * (number + 1)
    return ["PiecewiseConstantDecay", {"boundaries": list(range(number)), "values": values}]


def keras(module, class_name, **more):
    return {"kind": "keras", "optimizer": {"module": module, "class_name": class_name, **more}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # A trusted package that loads lazily, and what it holds from elsewhere.
        (keras(LAZY, "evil.Evil"), "must be the name of a class that"),
        (keras(LAZY, "os.system"), "must be the name of a class that"),
        (keras(LAZY, "np.float32"), "must be the name of a class that"),
        (keras(LAZY, "Good.__class__"), "must be the name of a class that"),
        (keras(LAZY, "Evil"), "must be of Keras or of a package in `trusted_packages`"),
        (keras(f"{LAZY}.evil", "Evil"), "must be imported already"),
        (keras(LAZY, "_LazyModule"), "must be the name of a class that"),
        # Modules and registered names that do not match.
        (keras("keras.regularizers", "Adam"), "must be 'keras.optimizers', which holds Adam"),
        (keras("keras.optimizers", "Adam", registered_name="SGD"), "the registered name of Adam"),
        (keras("keras.optimizers", "Package>Adam"), "must be the name of a Keras optimizer"),
        (keras("keras.layers", "Lambda"), "must be the name of a Keras optimizer"),
        (keras("builtins", "eval"), "must be of Keras or of a package in `trusted_packages`"),
        # Base classes that build nothing, and what is not public.
        (keras("keras.optimizers", "Optimizer"), "must be the name of a Keras optimizer"),
        (keras("tff_optim.schedules", "_Schedule"), "must be the class of a Keras optimizer"),
        # optax and torch: public names, their own arguments, and no program to run.
        (OPTAX | {"transformation": "losses"}, "the name of a public factory of optax"),
        (OPTAX | {"transformation": "apply_updates"}, "the name of a public factory of optax"),
        (OPTAX | {"transformation": "_src.alias.adam"}, "the name of a public factory of optax"),
        (OPTAX | {"transformation": ["adam"]}, "at 'transformation' must be the name"),
        (OPTAX | {"arguments": {"device": "/CPU:0"}}, "at 'arguments/device' must be left out"),
        (OPTAX | {"arguments": [0.1]}, "at 'arguments' must be a mapping"),
        (OPTAX | {"arguments": {"learning_rate": -1.0}}, "`learning_rate` of .* at least 0"),
        (OPTAX | {"arguments": {"learning_rate": 0.1, "b1": 1.0}}, r"`b1` of .* in \[0, 1\)"),
        (OPTAX | {"weight_names": "kernel"}, "at 'weight_names' must be a list of strings"),
        (TORCH | {"arguments": {"python": "/bin/sh"}}, "at 'arguments/python' must be left out"),
        (TORCH | {"arguments": {"trusted_packages": ["os"]}}, "'arguments/trusted_packages' must"),
        (TORCH | {"python": "/bin/sh"}, r"found unknown \['python'\]"),
        (TORCH | {"optimizer": "os.system"}, r"package in `trusted_packages` \["),
        (TORCH | {"optimizer": "__class__"}, "must be a public name"),
        (TORCH | {"lr_scheduler": "StepLR"}, "at 'lr_scheduler' must be like"),
        (TORCH | {"lr_scheduler": ["LambdaLR", {}]}, "made of a function"),
        # Kinds.
        (BASE | {"projection": [{"class_name": "ExponentialDecay"}]}, "a Keras constraint"),
        (BASE | {"projection": ["L2"]}, "must be the name of a part"),
        (BASE | {"regularizers": ["MaxNorm"]}, "must be the name of a part"),
        (BASE | {"transforms": [{"class_name": "Adam"}]}, "'transforms/0' must be like 'Name'"),
        (BASE | {"weight_decay": {"class_name": "L2"}}, "must be the name of a learning-rate sch"),
        # Short forms are checked as long ones.
        (BASE | {"projection": [["MaxNorm", {"max_value": float("nan")}]]}, "a finite number"),
        (BASE | {"projection": [["MaxNorm", {"max_value": -1.0}]]}, "a number of at least 0"),
        (BASE | {"projection": [["MaxNorm", {"axis": "x"}]]}, "a whole number or a list of them"),
        (BASE | {"regularizers": [["L2", {"l2": True}]]}, "must be a number of at least 0 or None"),
        # Numbers, nesting, keys.
        (BASE | {"weight_decay": 10**400}, "a finite number that fits into a float"),
        (BASE | {"learning_rate": 1e39}, "is inf when rounded to float32"),
        (["SGD", {"learning_rate": 1e39}], "is inf when rounded to float32"),
        (BASE | {1: 2}, "must have texts as keys; found 1"),
        (BASE | {"transforms": hostile_configs.deep(40, "list")}, "more than 32 deep"),
        (BASE | {"transforms": hostile_configs.doubling()}, "more than 32 deep"),
        (BASE | {"transforms": hostile_configs.cycle()}, "more than 32 deep"),
        (BASE | {"transforms": [["Adam"] * 1000] * 1000}, "hold at most 10000 values; found more"),
        (
            ["SGD", {"learning_rate": ["ExponentialDecay", {
                "initial_learning_rate": 1.0, "decay_steps": 1, "decay_rate": 1e30}]}],
            "found inf at step 10",
        ),
        # Texts and files.
        (BASE | {"device": "\ud800"}, "be text that UTF-8 can encode"),
        ('{"kind": "keras", "kind": "pipeline"}', r"the keys \['kind'\] occur twice"),
        ("[" * 100_000, "`config` must be JSON"),
        ('{"kind": ', "`config` must be JSON"),
        ("/no/such/file.json", "`config` must be a JSON file that can be read"),
        ("/" + "x" * 10**6 + ".json", "`config` must be a JSON file that can be read"),
        # What takes long, or would be told at length.
        (f'{{"kind": {"1," * 500_000}}}', "must be JSON of at most 1000000 characters; found"),
        ("{" + '"a": 1, ' * 40_000 + '"kind": "keras"}', r"the keys \['a'\] occur twice"),
        (json.dumps(BASE | MANY_KEYS), "at most 10000 values; found more: number 10001 is at 'k9998'"),
        (BASE | MANY_KEYS, "at most 10000 values; found more: number 10001 is at 'k9998'"),
        (BASE | dict(list(MANY_KEYS.items())[:9000]), r"found unknown \['k0', 'k1', .*\.\.\."),
        (BASE | {"kind": "x" * 1001}, "at 'kind' must be a text of at most 1000 characters; found 1001"),
        (BASE | {"x" * 1001: 1}, "`config` must have keys of at most 1000 characters; found 'xxx"),
        (BASE | {"transforms": ["Adam"] * 101}, "at 'transforms' must have at most 100 elements"),
        (BASE | {"regularizers": ["L2"] * 101}, "at 'regularizers' must have at most 100 elements"),
        (BASE | {"projection": ["NonNeg"] * 101}, "at 'projection' must have at most 100 elements"),
        ({"lrate": 0.1, "modules": ["adam"] * 101}, "at 'modules' must have at most 100 elements"),
        (BASE | {"transforms": [[["Adam"] * 99] * 99] * 99}, "hold at most 10000 values; found more"),
        (
            {
                "kind": "keras",
                "optimizer": "AdamW",
                "exclude_from_weight_decay": [f"a{i}" for i in range(101)],
            },
            "at 'exclude_from_weight_decay' must have at most 100 elements; found 101",
        ),
        (BASE | {"learning_rate": piecewise(101)}, "`boundaries` of .* at most 100 elements; found 101"),
        (["SGD", {"learning_rate": piecewise(4000)}], "`boundaries` of .* at most 100 elements"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, str) else None,
)  # fmt: skip
def test_what_once_got_through_or_failed_unclean(config, message):
    refused(config, message, trusted=(LAZY,))


def test_what_is_as_large_as_it_may_be_is_built():
    text = json.dumps(BASE | {"transforms": [["Momentum", {"beta": 0.5}]] * 100})
    optimizer = tff_optim.from_config(text + " " * (1_000_000 - len(text)))
    names = list(optimizer.pipeline.parts)
    assert names == ["Momentum", *(f"Momentum_{i}" for i in range(2, 101))]
    optimizer = tff_optim.from_config(BASE | {"learning_rate": piecewise(100)})
    assert len(optimizer.pipeline.learning_rate.boundaries) == 100
    excluded = {"exclude_from_weight_decay": [f"a{i}" for i in range(100)]}
    named = {"weight_names": ["x" * 1000] + ["w"] * 8000}
    optimizer = tff_optim.from_config({"kind": "keras", "optimizer": "AdamW"} | excluded | named)
    assert len(optimizer.weight_names) == 8001


def test_a_pattern_is_compiled_once_and_none_beyond_the_limit(monkeypatch):
    compiled = []
    match = tf.strings.regex_full_match
    monkeypatch.setattr(
        tf.strings, "regex_full_match", lambda *given: compiled.append(given) or match(*given)
    )
    patterns.search.cache_clear()
    config = {"kind": "keras", "optimizer": "AdamW"}
    many = [f"once{i}" for i in range(101)]
    for _ in range(2):
        with pytest.raises(ValueError, match="must have at most 100 elements"):
            tff_optim.from_config(config | {"exclude_from_weight_decay": many})
    assert not compiled
    for _ in range(2):
        optimizer = tff_optim.from_config(config | {"exclude_from_weight_decay": many[:100]})
        assert tff_optim.from_config(tff_optim.get_config(optimizer)) == optimizer
    assert len(compiled) == 100


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    refused(tmp_path / "config.json", "`config` must be a JSON file .* which is no regular file")
    refused(str(tmp_path), "must be a mapping with `kind`|must be the name of a Keras optimizer")
    (tmp_path / "long.json").write_text('"adam"' + " " * 1_000_000)
    refused(tmp_path / "long.json", "must be JSON of at most 1000000 characters")


@pytest.mark.parametrize(
    "make",
    [
        lambda: tff_optim.build_optimizer(0.1, transforms="x" * 10**6),
        lambda: tff_optim.build_optimizer(0.1, transforms=["x" * 10**6]),
        lambda: tff_optim.build_optimizer(0.1, projection=["x" * 10**6]),
        lambda: tff_optim.build_optimizer(0.1, device="x" * 10**6),
        lambda: tff_optim.build_optimizer("x" * 10**6),
        lambda: tff_optim.build_keras_optimizer("x" * 10**6),
        lambda: tff_optim.from_config("adam", trusted_packages=[1] * 10**6),
        lambda: tff_optim.from_config("adam", trusted_packages="x" * 10**6),
        lambda: tff_optim.transforms.GaussianNoise(0.1, seed="x" * 10**6),
        lambda: tff_optim.regularizers.Penalty("x" * 10**6),
        lambda: tff_optim.schedules.Warmup(0.1, 2, then="x" * 10**6),
        lambda: projections.Projection(abs, where=["x"] * 10**6),
        lambda: projections.Projection(["x"] * 10**6),
        lambda: tff_optim.build_torch_optimizer("x" * 10**6),
        lambda: tff_optim.build_torch_optimizer("SGD", python="x" * 10**6),
        lambda: tff_optim.register_transform("x" * 10**6),
    ],
)
def test_a_refusal_is_short(make):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert len(str(caught.value)) < 1500


def test_a_class_that_a_trusted_package_holds_is_built():
    with hostile_configs.lazy_package(), hostile_configs.ALARM.set() as events:
        optimizer = tff_optim.from_config(keras(LAZY, "Good"), trusted_packages=[LAZY])
    assert type(optimizer.keras_optimizer) is hostile_configs.Good
    assert not events


@pytest.mark.parametrize("pattern", hostile_configs.PATTERNS, ids=lambda p: p[:20])
def test_patterns_are_refused_or_matched_in_bounded_time(pattern):
    start = time.process_time()
    weights = {"a" * 60 + "b": tf.zeros([2]), "x" * 200: tf.zeros([2])}
    specs = tf.nest.map_structure(lambda w: tf.TensorSpec(w.shape, w.dtype), weights)
    for config in (
        BASE | {"projection": [{"function": "NonNeg", "where": pattern}]},
        {
            "kind": "keras",
            "optimizer": ["AdamW", {"weight_decay": 0.1}],
            "exclude_from_weight_decay": [pattern],
        },
    ):
        try:
            optimizer = tff_optim.from_config(config)
        except ValueError as error:
            assert re.search("a regular expression of RE2's|UTF-8|1000 characters", str(error))  # noqa: PT017
            continue
        try:
            optimizer.next(optimizer.initialize(specs), weights, weights)
        except ValueError as error:
            assert "must select at least one tensor" in str(error)  # noqa: PT017
    assert time.process_time() - start < 20


def test_patterns_find_what_python_finds():
    names = [
        "dense/kernel:0",
        "dense/bias:0",
        "batch_norm_12/gamma:0",
        "a" * 12,
        "",
        "0",
        "LayerNorm",
    ]
    for pattern in (
        "bias", "^dense", r"norm(_\d+)?/", "kernel|gamma", "(?i)layernorm", "a{3,5}$", "[^a-z]", r"\d+$",
        "", "^$", "(a+)+$", r"\bbias\b", "(?:de|ba)", r"\.", "(?P<x>b)",
    ):  # fmt: skip
        patterns.check("where", pattern)
        for name in names:
            assert patterns.search(pattern, name) == bool(re.search(pattern, name))


def test_letters_outside_ascii_are_themselves_and_no_word_characters():
    for pattern, found in {
        r"^\w+$": ["kern", "k1", "xkern"],
        r"\bkern": ["kern", "ökern", "größe/kern"],
        r"\Bkern": ["xkern"],
        r"\d$": ["k1"],
        r"\W": ["größe", "ökern", "größe/kern", "٣"],
        "^gr..e": ["größe", "größe/kern"],
        "(?i)GRÖ": ["größe", "größe/kern"],
        "[äöü]": ["größe", "ökern", "größe/kern"],
        "^[^/]+$": ["kern", "k1", "xkern", "größe", "ökern", "٣"],
    }.items():
        patterns.check("where", pattern)
        names = ["kern", "k1", "xkern", "größe", "ökern", "größe/kern", "٣"]
        assert [name for name in names if patterns.search(pattern, name)] == found
        if not pattern.startswith("(?i)"):  # Python folds no letters outside ASCII in this mode
            assert [name for name in names if re.search(pattern, name, re.ASCII)] == found


def test_programs_and_configurations_select_the_same_weights():
    weights = {"größe": tf.constant([1.0]), "kern": tf.constant([1.0])}
    specs = tf.nest.map_structure(lambda w: tf.TensorSpec(w.shape, w.dtype), weights)
    gradients = tf.nest.map_structure(tf.zeros_like, weights)
    keras = tf.keras.optimizers.AdamW(1.0, weight_decay=0.5)
    keras.exclude_from_weight_decay(var_names=[r"^\w+$"])
    box = projections.Projection(projections.Box(0.0, 0.5), where=r"^\w+$")
    for optimizer, expected in (
        (tff_optim.build_keras_optimizer(keras), {"größe": 0.5, "kern": 1.0}),
        (tff_optim.build_optimizer(0.1, projection=box), {"größe": 1.0, "kern": 0.5}),
    ):
        for made in (optimizer, tff_optim.from_config(tff_optim.get_config(optimizer))):
            assert made == optimizer
            _, new = made.next(made.initialize(specs), weights, gradients)
            assert {name: float(w[0]) for name, w in new.items()} == expected


@pytest.mark.parametrize("pattern", ["^(?!dense)", r"(a)\1", "a{,3}", "x" * 5000])
def test_programs_are_refused_what_re2_does_not_have(pattern):
    keras = tf.keras.optimizers.AdamW(weight_decay=0.1)
    keras.exclude_from_weight_decay(var_names=[pattern])
    rule = "must be a regular expression of RE2's, without lookaround"
    with pytest.raises(ValueError, match=f"^`exclude_from_weight_decay` {rule}"):
        tff_optim.build_keras_optimizer(keras)
    with pytest.raises(ValueError, match=f"^`where` of `Projection` {rule}"):
        projections.Projection(tf.keras.constraints.NonNeg(), where=pattern)


def test_a_schedule_or_regularizer_is_no_projection():
    for wrong in (
        tf.keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5),
        tf.keras.regularizers.L2(0.1),
    ):
        with pytest.raises(TypeError, match="`function` of `Projection` must be"):
            tff_optim.build_optimizer(0.1, projection=wrong)
    with pytest.raises(ValueError, match="`max_value` of `MaxNorm` must be a number of at least 0"):
        tff_optim.build_optimizer(0.1, projection=tf.keras.constraints.MaxNorm(np.nan))


def test_entries_are_copied_down_to_the_last_list():
    config = collections.OrderedDict(BASE, transforms=(["Adam", {"beta_1": np.float32(0.5)}],))
    entry = entries.read(config)
    assert entry.value == {**BASE, "transforms": [["Adam", {"beta_1": 0.5}]]}
    assert type(entry.at("transforms").at(0).at(1).at("beta_1").value) is float
    assert entry.at("transforms").at(0).at(1).at("beta_1").path == "transforms/0/1/beta_1"


@pytest.mark.parametrize("name", ["self", "make"])
def test_an_argument_may_have_any_name(name):
    config = {"kind": "optax", "transformation": "adam", "arguments": {"learning_rate": 1, name: 2}}
    with pytest.raises(TypeError, match=r"cannot be built: .*unexpected keyword argument"):
        tff_optim.from_config(config)
