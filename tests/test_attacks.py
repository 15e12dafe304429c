"""A seeded part of every attack, and that the attacks would notice."""

import contextlib
import os
import shutil
import threading

import attack_checkpoints
import attacks
import pytest
import selection

from tff_optim.resident import versions
from tff_optim.resident.versions import VersionDirectory

PARTS = {attack.name: attack for attack in attacks.all_attacks() if attack.in_tests}
# Those in which nothing has to be trained; what happens to workers, runs and damaged versions has
# tests of its own.
QUICK = ["saves by two writers", "files that cannot grow"]


@pytest.mark.parametrize("attack", selection.params(PARTS, QUICK))
def test_a_part_of_each_attack(attack):
    faults = []
    found = attacks.carry_out(
        attack, attack.in_tests, seed=1, show=lambda *case: faults.append(case)
    )
    assert not faults
    if not found:
        pytest.skip("mounting a file system needs root")


def test_writers_without_a_lock_are_found_out(monkeypatch):
    """The attack tells what is saved and lost; here by what the lock and the rename prevent."""

    @contextlib.contextmanager
    def no_lock(self):
        yield True

    def careless(source, target):
        shutil.rmtree(target, ignore_errors=True)
        real(source, target)

    real = os.rename
    monkeypatch.setattr(VersionDirectory, "_lock", no_lock)
    monkeypatch.setattr(VersionDirectory, "_check_new", lambda *unused: None)
    monkeypatch.setattr(versions.os, "rename", careless)
    attack = next(a for a in attack_checkpoints.ATTACKS if a.run is attack_checkpoints.two_writers)
    found = attacks.carry_out(attack, 400, seed=1)
    assert found["lost"] + found["unclean"] > 0


def test_what_does_not_end_is_hung():
    never = threading.Event()
    assert attacks.within(0.1, never.wait) == (None, None, False)
    never.set()
    assert attacks.within(1, lambda: 3) == (3, None, True)
    _, error, in_time = attacks.within(1, lambda: 1 / 0)
    assert isinstance(error, ZeroDivisionError)
    assert in_time
