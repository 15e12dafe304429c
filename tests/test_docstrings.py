"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest
import tensorflow_federated as tff

import aggregators
import tff_optim

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
def test_examples(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


# What a user calls. A class without an example here is one that a function with an example returns.
@pytest.mark.parametrize(
    "function",
    [
        getattr(package, name)
        for package in (tff_optim, aggregators)
        for name in package.__all__
        if name.startswith(("build_", "federated_"))
    ],
    ids=lambda function: function.__name__,
)
def test_every_public_function_has_an_example(function):
    assert ">>>" in function.__doc__
