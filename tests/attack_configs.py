"""The attack on `from_config` as one of all."""

import hostile_configs
from attacks import Attack


def configurations(count, seed):
    """Hostile configurations: refused in words, or built without running anything."""
    wrong = []
    found = hostile_configs.attack(count, seed, show=lambda *case: wrong.append(case))
    for _ in range(found["refused"] + found["built"]):
        yield "configuration", "right"
    for case, verdict in wrong:
        known = verdict.startswith(("hung", "unclean:"))
        yield f"configuration {case!r:.300}", verdict if known else f"unclean: {verdict}"


# The tests have a part of it of their own.
ATTACKS = [Attack("configurations", configurations, count=12_000, in_tests=0)]
