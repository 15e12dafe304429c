"""What the parts of a rule and the builders refuse when they are made, and in which words."""

from collections import OrderedDict

import numpy as np
import optax
import pytest
import tensorflow as tf
import tensorflow_federated as tff
from problems import model_fn

import aggregators
from aggregators import (
    Needs,
    Reduction,
    Rule,
    StatefulClient,
    hparam,
    privacy,
    rules,
    scores,
    weighted_mean,
    weighting,
)
from aggregators.core.candidates import Candidates
from aggregators.core.layers import resolve_layers

SGD = tff.learning.optimizers.build_sgdm(0.1)
MODEL = tff.to_type([(np.float32, (2,))])
BASE = rules.plain_mean()
PARTS = (BASE.client, BASE.reduction, BASE.server)


def start(rule):
    return aggregators.rule_state(rule, MODEL)


def named(hparams, **changes):
    """A rule with numbers of these names."""
    return Rule(*PARTS, hparams={name: hparam(name, 0.5) for name in hparams}, **changes)


def own_weighting(*names):
    return weighting.Weighting(
        rule=lambda relative, seen: -relative, hparams={name: 0.5 for name in names}
    )


def score_called(name):
    return scores.Score(lambda server, client: tf.norm(server[0] - client[0]), name=name)


NO_STATE = (lambda weights, state: OrderedDict(), lambda context, done: (OrderedDict(), ()))
FOLD = (lambda: 0.0, tf.add)

WRONG = {
    "no rule": (lambda: Rule(None, None, None), r"`client` must be a function of \(update, state"),
    "a client of three": (
        lambda: Rule(lambda update, weight, state: 0, *PARTS[1:]),
        r"`client` must be a function of \(update, state\); found .* which takes others",
    ),
    "a log-weight of one": (
        lambda: weighted_mean.rule(lambda update: 0.0),
        r"`log_weight` must be a function of \(update, state\); found .* which takes others",
    ),
    "a finish of one": (
        lambda: weighted_mean.rule(lambda update, state: 0.0, finish=lambda result: result),
        r"`finish` must be a function of \(state, result\); found .* which takes others",
    ),
    "a rule called 3": (lambda: Rule(*PARTS, name=3), "`name` must be a `str`; found 3"),
    "a reduction itself": (
        lambda: Rule(PARTS[0], Reduction(*FOLD), PARTS[2]),
        r"`reduction` must be a function of \(layers\)",
    ),
    "a server of one": (
        lambda: Rule(*PARTS[:2], lambda state: state),
        r"`server` must be a function of \(state, reduced\)",
    ),
    "needs by name": (
        lambda: Rule(*PARTS, needs="loss"),
        "`needs` must be a `Needs`; found 'loss'",
    ),
    "a state and no function": (
        lambda: Rule(*PARTS, initial_state=OrderedDict()),
        r"`initial_state` must be a function of \(layers\); found OrderedDict",
    ),
    "bare numbers": (lambda: Rule(*PARTS, hparams={"a": 0.5}), "`hparams` must map names"),
    "a list of numbers": (lambda: Rule(*PARTS, hparams=["a"]), "`hparams` must map names"),
    "a number called round": (
        lambda: named(["round"]),
        "`hparams` must map names other than round",
    ),
    "steps by word": (lambda: Needs(steps="yes"), "`steps` must be True or False; found 'yes'"),
    "steps by number": (lambda: Needs(steps=1), "`steps` must be True or False; found 1"),
    "a loss at the end": (
        lambda: Needs(loss="final"),
        '`loss` must be "training" or "initial"; found \'final\'',
    ),
    "losses": (lambda: Needs(loss=np.array(["training"] * 2)), "`loss` must be"),
    "candidates by number": (lambda: Needs(candidates=2), "`candidates` must be a `Candidates`"),
    "a stateful client of nothing": (
        lambda: Needs(stateful_client=True),
        "`stateful_client` must be a `StatefulClient`",
    ),
    "a score called steps": (
        lambda: Needs(score_called("steps"), steps=True),
        "`score` must have a name that no other measurement has; found 'steps'",
    ),
    "a score called 3": (lambda: score_called(3), "`name` must be a Python identifier; found 3"),
    "a score of everything": (
        lambda: scores.Score(tf.norm, needs="all"),
        '`needs` must be "model" or "update"; found \'all\'',
    ),
    "layers by flag": (lambda: Needs(layers=[(False,), (True,)]), "`layers` must be"),
    "layers by half": (lambda: Needs(layers=[(0.5,)]), "`layers` must be"),
    "zero itself": (lambda: Reduction(0.0, tf.add), r"`zero` must be a function of \(\)"),
    "a zero of one": (lambda: Reduction(tf.zeros, tf.add), r"`zero` must be a function of"),
    "no merge": (lambda: Reduction(FOLD[0], None), r"`merge` must be a function of \(accum.*None"),
    "a merge by name": (lambda: Reduction(FOLD[0], "add"), "`merge` must be a function of"),
    "a report of two": (
        lambda: Reduction(*FOLD, tuple, tf.add),
        r"`report` must be a function of \(accum",
    ),
    "a lift by name": (lambda: Reduction(*FOLD, "x"), r"`lift` must be a function of"),
    "a zip of folds by hand": (
        lambda: aggregators.zip_reductions(a=tf.add),
        "`a` must be a `Reduction`; found",
    ),
    "models themselves": (lambda: Candidates([[0.0]], 1), r"`models` must be a function of"),
    "one candidate by flag": (
        lambda: Candidates(lambda w, s: [w], True),
        "`number` must be a whole",
    ),
    "a gradient by word": (
        lambda: StatefulClient(*NO_STATE, mean_gradient="yes"),
        "`mean_gradient` must be True or False",
    ),
    "a stateful client of no function": (
        lambda: StatefulClient(OrderedDict(), NO_STATE[1]),
        r"`initial_state` must be a function of \(weights, optimizer_state\)",
    ),
    "one client by flag": (
        lambda: StatefulClient(*NO_STATE, num_clients=True),
        "`num_clients` must be a whole number of at least 1; found True",
    ),
    "steps at most true": (
        lambda: rules.fed_nova(max_steps=True),
        "`max_steps` must be a whole number of at least 1; found True",
    ),
    "a sample of true": (
        lambda: aggregators.RuleFactory(BASE, sample_size=True),
        "`sample_size` must be a whole number of at least 0; found True",
    ),
    "scaffold for true": (lambda: rules.scaffold(True), "`num_clients` must be a whole number"),
    "a sampling of true": (
        lambda: privacy.epsilon(1.0, sampling_probability=True, steps=1, delta=1e-5),
        "`sampling_probability` must be a finite number .*; found True",
    ),
    "a loss at the end, of a rule": (
        lambda: rules.adaptive_mean("loss", weighting.softmax(), loss_at="final"),
        '`loss_at` must be "training" or "initial"; found \'final\'',
    ),
    "a gate of two words": (
        lambda: rules.loss_gated(gate=np.array(["fallen", "not_fallen"])),
        '`gate` must be "not_fallen", "fallen" or a function',
    ),
    "votes of two words": (
        lambda: rules.jury_mean(votes=np.array(["model", "direction"])),
        '`votes` must be "model"',
    ),
    "jury candidates by number": (lambda: rules.jury_mean(3), "`candidates` must be pairs"),
    "a weighting's list": (
        lambda: weighting.Weighting(rule=tf.negative, hparams=["a"]),
        "`hparams` must map names",
    ),
    "a weighting's typical score": (
        lambda: own_weighting("typical_score"),
        r"`hparams` must map names, which must not be any of .*typical_score.*; found",
    ),
    # Names in one state, of rules around rules.
    "fed_dyn around an alpha": (
        lambda: rules.fed_dyn(3, rule=named(["alpha"])),
        r"`rule` must not use a name that .*; found \['alpha'\]",
    ),
    "scaffold around a control": (
        lambda: start(
            rules.scaffold(
                3,
                rule=named([], initial_state=lambda layers: OrderedDict(control=tf.constant(0.0))),
            )
        ),
        r"`rule` must not use a name .*; found \['control'\]",
    ),
    "a state called as a number": (
        lambda: start(named(["a"], initial_state=lambda layers: {"a": tf.constant(0.0)})),
        r"`initial_state` must not use a name .*; found \['a'\]",
    ),
    "a state called round": (
        lambda: start(named([], initial_state=lambda layers: {"round": tf.constant(0.0)})),
        r"`initial_state` must not use a name .*; found \['round'\]",
    ),
    "a gate around its own number": (
        lambda: rules.loss_gated(own_weighting("min_decrease"), score="loss"),
        r"`weighting` must not use a name .*; found \['min_decrease'\]",
    ),
    "a jury around its own number": (
        lambda: rules.jury_mean([(score_called("vote"), weighting.softmax())]),
        r"`candidates` must not use a name .*; found \['vote_decay'\]",
    ),
    "a candidate called as the jury's state": (
        lambda: (
            rules.jury_mean([(score_called("typical"), own_weighting("norm"))])
            and start(rules.jury_mean([(score_called("typical"), own_weighting("norm"))]))
        ),
        r"must not use a name .*; found \['typical_norm'\]",
    ),
    # The names that a builder has, and the function that fits what was given.
    "optax for clients": (
        lambda: aggregators.build_fed_kl(model_fn, optax.sgd(0.1)),
        r"`client_optimizer_fn` must be .* with `tff_optim.build_optax_optimizer`",
    ),
    "optax, not called": (
        lambda: aggregators.build_fed_avg(model_fn, optax.adam),
        r"`client_optimizer_fn` must be .* with `tff_optim.build_optax_optimizer`",
    ),
    "Keras for the server": (
        lambda: aggregators.build_fed_kl(model_fn, SGD, tf.keras.optimizers.SGD(0.1)),
        r"`server_optimizer_fn` must be .* with `tff_optim.build_keras_optimizer`",
    ),
    "TFF's builder": (
        lambda: aggregators.build_fed_nova(model_fn, tff.learning.optimizers.build_sgdm),
        r"`client_optimizer_fn` must be .* Call it",
    ),
    "a name for the server": (
        lambda: aggregators.build_scaffold(model_fn, SGD, "adam", num_clients=2),
        r"`server_optimizer_fn` must be .*; found 'adam'. TFF's own are made by",
    ),
    "a name for a work": (
        lambda: aggregators.build_client_work(model_fn, "adam", BASE.needs),
        r"`optimizer` must be .*; found 'adam'",
    ),
    "a gate of FedMed": (
        lambda: aggregators.build_fed_med(model_fn, SGD, gate="x"),
        "`gate` must be .*; found 'x'",
    ),
    "a text that is none": (
        lambda: aggregators.federated_print(None, 3),
        "`message` must be a `str`; found 3",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_when_it_is_made(name):
    make, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_whole_numbers_of_numpy_are_whole_numbers():
    names = ["a", "b", "c"]
    assert resolve_layers([(np.int64(2), np.int32(0)), (np.uint8(1),)], names) == OrderedDict(
        {"c+a": (2, 0), "b": (1,)}
    )
    assert Needs(layers={"x": np.arange(3)}).layers["x"].tolist() == [0, 1, 2]
    assert Candidates(lambda w, s: [w], np.int64(2)).number == 2
    assert rules.scaffold(np.int32(4)).needs.stateful_client.num_clients == 4
    rule = rules.fed_nova(max_steps=np.int64(5))
    assert "momentum" in start(rule)()


def two_numbers(layers):
    return OrderedDict(a=tf.constant(0.0), b=tf.constant(0.0))


def test_a_state_may_be_returned_in_any_order():
    def server(state, reduced):
        found = BASE.server(state, reduced)
        return found._replace(state={"b": state["b"] + 2.0, "a": state["a"] + 1.0})

    rule = Rule(BASE.client, BASE.reduction, server, initial_state=two_numbers)
    process = aggregators.RuleFactory(rule).create(MODEL, tff.to_type(np.float32))
    state = process.next(process.initialize(), [[np.float32([1, 2])]], [1.0]).state
    assert (list(state), state["a"], state["b"]) == (["round", "a", "b"], 1.0, 2.0)


@pytest.mark.parametrize("returned", [["a"], ["a", "b", "c"], []])
def test_a_state_that_is_not_the_rules_is_refused(returned):
    def server(state, reduced):
        found = BASE.server(state, reduced)
        return found._replace(state={name: tf.constant(0.0) for name in returned})

    rule = Rule(BASE.client, BASE.reduction, server, initial_state=two_numbers)
    with pytest.raises(ValueError, match=r"`server` must return a state .*\['a', 'b'\]; found"):
        aggregators.RuleFactory(rule).create(MODEL, tff.to_type(np.float32))
