"""Runs the scripts here one after another, ours before and after, and prints one table.

    make bench-rivals [RIVALS_ARGS="--rounds 7 --check"]

`--check` compares instead how far each layer goes in two rounds, at the server Adam or SGD at rate
1: with NumPy, for B with torch by hand.
"""

import argparse
import collections
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from timing import table

ENVIRONMENTS = HERE.parent.parent.parent / ".venv-rivals"
PLACES = ("plain", "device", "arrays", "side_by_side", "both", "worker")
RIVALS = [
    ("torch", ["torch_loop.py"]),
    ("torch", ["pfl_research.py"]),
    ("fedjax", ["fedjax_rounds.py"]),
    ("fedjax", ["jax_vmap.py"]),
    ("flower", ["flower.py"]),
]
TRUTH = [(None, ["numpy_loop.py"])]
FAILED: list[str] = []


def answers(environment, script, arguments):
    python = ENVIRONMENTS / environment / "bin/python" if environment else sys.executable
    if not pathlib.Path(python).exists():
        sys.exit(f"{python} must be there: `make bench-rivals` makes it.")
    command = [python, HERE / script[0], *script[1:], *arguments]
    print(*script, *arguments, file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    print(*found, sep="\n", file=sys.stderr, flush=True)
    if done.returncode:
        FAILED.append(" ".join(script))
        print(done.stderr[-2000:], file=sys.stderr)
    return found


def compare(everything):
    """Prints the largest relative difference to the truth of any layer of any task."""
    truth = {}
    for answer in everything:  # NumPy comes first, then torch by hand
        truth.setdefault(answer["task"], answer)
    rows: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for answer in everything:
        for how, server in (("sgd", "SGD"), ("adam", "Adam")):
            differences = map(_difference, answer[how], truth[answer["task"]][how])
            rows[answer["name"]][f"{answer['task']}, {server}"] = f"{max(differences):.1e}"
    headers = sorted({column for row in rows.values() for column in row}, key=_by_server)
    print(
        table(
            ["simulator", *headers],
            [[name, *(row.get(h, "") for h in headers)] for name, row in rows.items()],
        )
    )


def _difference(found, truth):
    return abs(found / truth - 1)


def _by_server(column):
    task, server = column.split(", ")
    return server == "Adam", task


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tasks", nargs="*", default=["A", "B", "C", "L", "K"])
    parser.add_argument("--places", nargs="*", default=PLACES, help="of ours")
    parser.add_argument(
        "--once", action="store_true", help="ours are not run again after the others"
    )
    parser.add_argument("--rivals", nargs="*", default=[script[0] for _, script in RIVALS])
    parser.add_argument("--rounds", default="7", help="after the first")
    options = parser.parse_args()
    arguments = ["--tasks", *options.tasks, "--rounds", options.rounds]
    ours = [(None, ["ours.py", place]) for place in options.places]
    rivals = [run for run in RIVALS if run[1][0] in options.rivals]
    if options.check:
        runs = [(*run, [*arguments, "--check"]) for run in TRUTH + rivals + ours]
        compare([answer for run in runs for answer in answers(*run)])
        return
    cells = collections.defaultdict(dict)
    for position, part in enumerate([ours, rivals, [] if options.once else ours]):
        again = ", again" if position == 2 else ""
        for environment, script in part:
            for a in answers(environment, script, arguments):
                row = f"{a['name']} {a['version']}{again}"
                cells[row][a["task"]] = a
    heads = {
        "seconds of a round": "{later:.3g} ({first:.2g})",
        "processor seconds of a round, without other programs": "{processor:.3g}",
        "peak memory of the program after the task, GB": "{peak:.2f}",
    }
    for head, text in heads.items():
        rows = [
            [row, *[text.format(**found[t]) if t in found else "-" for t in options.tasks]]
            for row, found in cells.items()
        ]
        print(table([head, *options.tasks], rows), end="\n\n")


if __name__ == "__main__":
    main()
    if FAILED:
        sys.exit(f"Failed, see above: {', '.join(FAILED)}.")
