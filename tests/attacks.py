"""Attacks on every door to the outside, from a seed, and a table of what became of them.

    python tests/attacks.py [--seed N] [--part 0.1] [NAME ...]

Each attack is a generator of verdicts. To add one, append an `Attack` to the list of a module
`attack_*.py` and name the module in `all_attacks`.
"""

import argparse
import collections
import os
import threading
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import attrs

# What may become of a case. Everything but the first is a fault of the package:
# a refusal without a reason in its words, something saved that is gone, no answer in bounded time,
# a process or a directory that nobody owns.
VERDICTS = ("right", "unclean", "lost", "hung", "left behind")


@attrs.frozen
class Attack:
    """A way in.

    Attributes:
        name: How the table calls it.
        run: `(count, seed)` to pairs of what was done and a verdict, with details after a colon.
        count: How many cases make all of it.
        in_tests: How many of them are in the tests.
    """

    name: str
    run: Callable[[int, int], Iterator[tuple[str, str]]]
    count: int
    in_tests: int


def within(seconds, function):
    """Calls a function; returns its result or error, and whether it came in time."""
    outcome = []

    def call():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return (*outcome[0], True) if outcome else (None, None, False)


def all_attacks():
    """Lists every attack."""
    import attack_checkpoints
    import attack_configs
    import attack_runs
    import attack_workers

    modules = (attack_configs, attack_checkpoints, attack_workers, attack_runs)
    return [attack for module in modules for attack in module.ATTACKS]


def carry_out(attack, count, seed, show=lambda label, verdict: None):
    """Runs an attack; counts the verdicts, and shows those that are not right."""
    found = collections.Counter()
    for label, verdict in attack.run(count, seed):
        kind = verdict.partition(":")[0]
        assert kind in VERDICTS, verdict
        found[kind] += 1
        if kind != "right":
            show(label, verdict)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=float, default=1.0, help="of the number of cases")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of attacks; all by default")
    options = parser.parse_args()

    import tensorflow_federated as tff

    from tff_optim.interrupts import let_workers_end

    let_workers_end()
    tff.backends.native.set_sync_local_cpp_execution_context()
    try:
        rows = carry_out_all(options)
    finally:
        tff.test.set_no_default_context()
    print(f"\n{'attack':28}{'tried':>7}" + "".join(f"{v:>13}" for v in VERDICTS) + f"{'s':>7}")
    for name, found, seconds in rows:
        counts = "".join(f"{found[v]:13d}" for v in VERDICTS)
        print(f"{name:28}{found.total():7d}{counts}{seconds:7.0f}")
    raise SystemExit(any(found[v] for _, found, _ in rows for v in VERDICTS[1:]))


def carry_out_all(options):
    """Runs what the command line asks for; returns the rows of the table."""
    attacks = [a for a in all_attacks() if not options.names or a.name in options.names]
    rows = []
    for attack in attacks:
        begin = time.perf_counter()
        found = carry_out(
            attack,
            max(1, round(attack.count * options.part)),
            options.seed,
            lambda label, verdict: print(f"  {label}\n    {verdict}", flush=True),
        )
        rows.append((attack.name, found, time.perf_counter() - begin))
        print(f"{attack.name}: {dict(found)}", flush=True)
    return rows


if __name__ == "__main__":
    main()
