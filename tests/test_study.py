"""The study's runner keeps what it has, and its page says what its CSV holds."""

import argparse
import csv
import pathlib
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
STUDY = ROOT / "examples" / "study"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(STUDY))
    try:
        import report
        import run
        import tasks
    finally:
        sys.path.remove(str(STUDY))
    return report, run, tasks


def test_the_page_holds_the_tables_of_the_csv(study):
    report, _, _ = study
    curves = report.whole(report.read(STUDY / "results.csv"))
    page = (STUDY / "README.md").read_text()
    for table in (report.summary(curves), report.by_cell(curves), report.speed(curves)):
        assert table in page
    compared = report.compare(curves)
    worst = {rule: min(c.difference for c in cells.values()) for rule, cells in compared.items()}
    gains = [c.difference for cell, c in compared["jury"].items() if cell[3] == "random labels"]
    top = " ".join((ROOT / "README.md").read_text().split())
    runs = sum(len(seeds) for by_rule in curves.values() for seeds in by_rule.values())
    for claim in (
        f"of {runs:,} runs in {len(curves)} settings",
        f"costs at most {-worst['jury']:.1f} points",
        f"gains {min(gains):.1f} to {max(gains):.1f} points where labels are random",
        f"costs up to {-worst['KL near']:.1f} points",
    ):
        assert claim in top
    # That its worst cell lies within two standard errors of nothing.
    lost = min(compared["jury"].values(), key=lambda c: c.difference)
    assert lost.difference + 2.0 * lost.error > 0.0
    assert f"{len(curves)} of 72 cells, {runs:,} of 2,880 runs" in page


def test_late_accuracies_are_those_of_the_curves(study):
    _, run, _ = study
    with (STUDY / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == run.COLUMNS
    for row in rows:
        curve = [float(x) for x in row["accuracies"].split()]
        assert len(curve) == run.ROUNDS
        np.testing.assert_allclose(float(row["late_accuracy"]), np.mean(curve[-10:]), atol=1e-4)


def test_rules_that_are_not_ours_run_at_the_rate_that_was_best_on_other_seeds(study):
    report, run, _ = study
    found = report.mean_by_rate(STUDY / "tuning.csv")
    assert {rule for _, _, rule in found} == {"FedAvg", *run.TUNED}
    for key, by_rate in found.items():
        assert set(by_rate) == {str(rate) for rate in run.TUNING_RATES}
        best = float(max(by_rate, key=by_rate.get))
        if key[2] in run.TUNED:
            assert run.RATES.get(key, run.CLIENT_RATE) == best
    assert not {cell.seed for cell in run.plan()} & set(run.TUNING_SEEDS)
    assert report.rates(STUDY / "tuning.csv") in (STUDY / "README.md").read_text()
    with (STUDY / "results.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["task"], row["server"], row["rule"]
            assert float(row["client_rate"]) == run.RATES.get(key, run.CLIENT_RATE)


def test_parts_share_the_plan_between_them(study):
    _, run, _ = study
    assert run.part_of("2/3") == (2, 3)
    for text in ("0/2", "3/2"):
        with pytest.raises(argparse.ArgumentTypeError, match="a part must be"):
            run.part_of(text)


def test_the_plan_has_every_cell_once_with_five_seeds(study):
    _, run, tasks = study
    cells = run.plan()
    assert len(cells) == len(set(cells)) == 360
    assert len({cell[:-1] for cell in cells}) == 72
    assert len(run.RULES) * len(cells) == 2880
    assert set(run.quick_plan()) <= set(cells)
    assert {cell.corruption for cell in cells} == set(tasks.CORRUPTIONS)


def test_a_run_that_was_cut_off_is_run_again(study, tmp_path):
    _, run, _ = study
    path = tmp_path / "results.csv"
    row = "digits,sgd,0.05,none,1000,FedAvg,0.3,0.9,1.0,0.87.0,0.9 0.9"
    path.write_text(",".join(run.COLUMNS) + f"\n{row}\ndigits,sgd,0.05,none,1000,jur")
    cell = run.Cell("digits", "sgd", 0.05, "none", 1000)
    assert run.done_before(path) == {(*(str(x) for x in cell), "FedAvg", "0.3")}
    assert path.read_text().endswith(row + "\n")


def test_bad_clients_are_the_same_for_every_rule_and_of_the_share_that_is_said(study):
    _, _, tasks = study
    task = tasks.load("topics")
    clean = tasks.make_clients(task, 0.5, "none", 3)
    labels = [np.concatenate([b["y"] for b in data.as_numpy_iterator()]) for data in clean]
    for kind, share in tasks.BAD_SHARE.items():
        changed = 0
        for data, before in zip(tasks.make_clients(task, 0.5, kind, 3), labels, strict=True):
            batches = list(data.as_numpy_iterator())
            flags = np.concatenate([b["x"][:, -tasks.FLAGS :] for b in batches])
            after = np.concatenate([b["y"] for b in batches])
            assert flags[:, 1].sum() == len(batches[-1]["y"])  # the last batch, and no other
            bad = flags[0, 0] != 1.0 or flags[0, 2] > 0.0
            changed += bad or not np.array_equal(before, after)
        assert abs(changed - 20 * share) <= 1  # random labels of one example may be the true ones


@pytest.mark.parametrize("kind", ["times -10", "gaussian"])
def test_the_optimizer_does_to_an_update_what_the_flags_say(study, kind):
    import tensorflow as tf

    _, _, tasks = study
    sgd, rng = tasks.FlaggedSGD(0.3), np.random.default_rng(1)
    start = [tf.constant(rng.normal(size=5), tf.float32), tf.zeros([3])]
    gradients = [np.float32(rng.normal(size=5)) for _ in range(3)]
    factor, seed = (-10.0, 0.0) if kind == "times -10" else (1.0, 7.0)
    state, weights = sgd.initialize([tf.TensorSpec([5]), tf.TensorSpec([3])]), tuple(start)
    for number, gradient in enumerate(gradients):
        flags = tf.constant([factor, float(number == 2), seed])
        state, weights = sgd.next(state, weights, (tf.constant(gradient), flags))
    moved = weights[0] - start[0]
    if kind == "times -10":
        np.testing.assert_allclose(moved, 10.0 * 0.3 * np.sum(gradients, 0), rtol=1e-4)
    else:
        drawn = 0.1 * tf.random.stateless_normal([5], [7, 0])
        np.testing.assert_allclose(moved, drawn, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(weights[1], 0.0)
