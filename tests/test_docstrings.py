"""Every example in a docstring runs and prints what it says."""

import doctest
import functools
import importlib
import inspect
import pkgutil

import pytest
import tensorflow as tf
import tensorflow_federated as tff

import aggregators
import tff_optim
from tff_optim.config import registry

MODULES = [
    module.name
    for package in (tff_optim, aggregators)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]


@pytest.fixture(scope="module", autouse=True)
def worker(tff_runtime):
    """A worker that runs: TFF starts its own on the standard output, which doctest replaces."""
    tff.tensorflow.computation(lambda: 1)()


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, monkeypatch):
    # What an example registers is forgotten with it.
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    module = importlib.import_module(name)
    shared = name.startswith("aggregators.builders.") or name == "aggregators.client.states"
    given = fed_avg_example() if shared else {}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, extraglobs=given, optionflags=flags).failed == 0


@functools.cache
def fed_avg_example():
    """The model and the optimizer that the example of `build_fed_avg` makes, for the other builders'."""
    (first,) = [
        test
        for test in doctest.DocTestFinder().find(aggregators.build_fed_avg, "build_fed_avg")
        if test.examples
    ]
    made = {"tf": tf, "tff": tff}
    for example in first.examples:
        if "keras_model" in example.source or example.source.startswith("sgd = "):
            exec(example.source, made)
    return {name: made[name] for name in ("model", "sgd")}


def _public():
    """Every public class and function, by name: of the packages, and of the modules they offer."""
    found = {}
    for package in (tff_optim, aggregators):
        for name in package.__all__:
            member = getattr(package, name)
            if not inspect.ismodule(member):
                found[f"{package.__name__}.{name}"] = member
                continue
            for inner in member.__all__:
                found[f"{package.__name__}.{name}.{inner}"] = getattr(member, inner)
    ours = ("tff_optim.", "aggregators.")
    return {
        name: member
        for name, member in found.items()
        if callable(member) and getattr(member, "__module__", "").startswith(ours)
    }


PUBLIC = _public()


def test_the_guard_below_is_not_empty():
    assert len(PUBLIC) > 50
    assert "aggregators.rules.adaptive_mean" in PUBLIC
    assert {"tff_optim.hyperparameters.field", "tff_optim.projections.Ball"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_an_example(name):
    assert ">>>" in (PUBLIC[name].__doc__ or ""), name
