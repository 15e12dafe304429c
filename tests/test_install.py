"""The installed package: what is shipped, and what is said when TFF is missing or unsuitable."""

import importlib.metadata

import pytest

import aggregators._requirements
import tff_optim._requirements

CHECKS = [tff_optim._requirements.check_tff, aggregators._requirements.check_tff]


@pytest.mark.parametrize("check", CHECKS)
def test_a_missing_tff_is_an_error_that_names_the_fix(check, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"none is installed.*requirements\.lock"):
        check()


@pytest.mark.parametrize("check", CHECKS)
def test_an_unsuitable_tff_is_an_error_that_names_the_fix(check, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    with pytest.raises(ImportError, match=r"found 0\.1\.0.*requirements\.lock"):
        check()
