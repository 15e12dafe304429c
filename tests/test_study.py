"""The study's runner keeps what it has, and its page says what its CSVs hold."""

import csv
import pathlib
import re
import sys

import attrs
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_federated as tff

from aggregators.core.update import client_update
from tff_optim.simulation import ClientArrays

ROOT = pathlib.Path(__file__).parent.parent
STUDY = ROOT / "examples" / "study"
sys.path.insert(0, str(STUDY))
try:
    import bad_clients
    import report
    import results
    import run
    import tasks
finally:
    sys.path.remove(str(STUDY))

ROWS = list(csv.DictReader((STUDY / "results.csv").open(newline="")))


def cell_of(row):
    kinds = run.Cell.__annotations__
    return run.Cell(**{name: kinds[name](row[name]) for name in run.Cell._fields})


def test_the_pages_hold_what_is_made_of_the_csvs():
    page = "".join(path.read_text() for path in report.PAGES)
    parts = report.made()
    assert set(re.findall(r"<!-- made: ([\w ]+) -->", page)) == set(parts)
    assert report.written(page, parts) == page
    # Beside these parts the page has no figures of accuracy that a CSV could contradict.
    rest = re.sub(r"<!-- made: .*?<!-- end -->", "", page, flags=re.S)
    assert re.findall(r"[+-]\d+\.\d", rest) == []


def test_a_changed_csv_changes_the_page(monkeypatch, tmp_path):
    changed = tmp_path / "results.csv"
    text = (STUDY / "results.csv").read_text()
    line = next(line for line in text.splitlines() if ",next jury,0." in line)
    head, _ = line.rsplit(",", 1)
    changed.write_text(text.replace(line, f"{head},{' '.join(['0.0100'] * run.ROUNDS)}"))
    monkeypatch.setattr(results, "RESULTS", changed)
    page = report.PAGES[0].read_text()
    assert report.written(page, report.made()) != page


def test_the_first_page_says_what_the_study_found():
    top = " ".join((ROOT / "README.md").read_text().split())
    for claim in report.claims():
        assert claim in top


def test_rows_are_of_the_plan_and_agree_with_their_curves():
    assert tuple(ROWS[0]) == run.COLUMNS
    planned = {(cell, name) for cell, names in run.blocks() for name in names}
    seen = [(cell_of(row), row["rule"]) for row in ROWS]
    assert len(seen) == len(set(seen))
    assert set(seen) <= planned
    for row in ROWS:
        curve = [float(x) for x in row["accuracies"].split()]
        assert len(curve) == run.ROUNDS
        for name, found in (
            ("late", np.mean(curve[-results.LATE :])),
            ("last", curve[-1]),
            ("whole", np.mean(curve)),
        ):
            np.testing.assert_allclose(float(row[name]), found, atol=1e-4)


def test_what_is_compared_are_whole_blocks():
    runs = results.read(results.RESULTS, results.RULES)
    assert tuple(run.RULES) == results.RULES
    for by_rule in runs.values():
        assert tuple(by_rule) == results.RULES
        assert len({tuple(by_seed) for by_seed in by_rule.values()}) == 1


def test_comparisons_are_those_that_numpy_makes():
    rng = np.random.default_rng(4)
    curves = {rule: {seed: tuple(rng.random(12)) for seed in "abc"} for rule in ("FedAvg", "other")}
    cell = results.Cell("digits", "sgd", "0.1", "none")
    fast = cell._replace(client_rate="1.0")
    runs = {cell: curves, fast: {rule: dict(by_seed) for rule, by_seed in curves.items()}}
    runs[fast]["other"] = {seed: tuple(0.5 * x for x in c) for seed, c in curves["other"].items()}
    late = {
        rule: 100.0 * np.array([np.mean(c[-10:]) for c in by_seed.values()])
        for rule, by_seed in curves.items()
    }
    apart = late["other"] - late["FedAvg"]
    compared = results.compare(runs)
    found = compared["other"][cell]
    np.testing.assert_allclose(found.mean, late["other"].mean())
    np.testing.assert_allclose(found.difference, apart.mean())
    np.testing.assert_allclose(found.error, apart.std(ddof=1) / np.sqrt(3))
    regret = results.regrets(compared)
    np.testing.assert_allclose(
        [regret["FedAvg"][cell], regret["other"][cell]],
        [max(apart.mean(), 0.0), max(-apart.mean(), 0.0)],
        atol=1e-12,
    )
    last = results.compare(runs, results.last)["other"][cell]
    ends = [100.0 * (curves["other"][s][-1] - curves["FedAvg"][s][-1]) for s in "abc"]
    np.testing.assert_allclose(last.difference, np.mean(ends))
    (bare,), best = results.best_rates(runs)
    assert best["other"][bare] == ("0.3", found.mean)


def test_the_plan_has_whole_blocks_on_seeds_that_nobody_chose_on():
    blocks = run.blocks()
    assert set(run.ALL_RULES) == {name for _, names in blocks for name in names}
    cells = [cell for cell, names in blocks if names == tuple(run.RULES)]
    assert len(cells) == len(set(cells))
    with (STUDY / "first_study.csv").open(newline="") as file:
        earlier = {int(row["seed"]) for row in csv.DictReader(file)}
    assert not earlier & {cell.seed for cell in cells}
    assert {cell.corruption for cell in cells} == set(bad_clients.CORRUPTIONS)
    assert {cell.task for cell in cells} == set(tasks.NAMES)
    assert {cell.client_rate for cell in cells} == set(run.RATES)
    for cell in cells:  # what must know the honest clients' updates works them out for dense layers
        sends = bad_clients.CORRUPTIONS[cell.corruption].sends
        assert cell.task != "cnn" or sends in ("", "noise")
        bad = round(bad_clients.CORRUPTIONS[cell.corruption].share * cell.clients)
        assert bad <= tasks.ROWS


def test_a_run_that_was_cut_off_is_run_again(tmp_path):
    path = tmp_path / "results.csv"
    cell = run.Cell("digits", 20, 1.0, "sgd", 0.1, "ipm, lies, 20 %", 7000, 0.3)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, run.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerow(run.row_of(cell, "FedAvg", [0.25, 0.5], 1.0))
    whole = path.read_text()
    path.write_text(f"{whole}digits,20,1.0,sgd,0.1,none,7000,0.3,jur")
    assert run.done_before(path) == {(*(str(x) for x in cell), "FedAvg")}
    assert path.read_text() == whole


@pytest.fixture(scope="module")
def averaging():
    with run.build_process("digits", "sgd", "FedAvg") as process:
        yield process


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results.csv", "first_study.csv"])
def test_a_run_again_gives_its_numbers_to_the_bit(averaging, name):
    """The first study had the same data, start, cohorts and batches, and other code for attacks."""
    with (STUDY / name).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["rule"] == "FedAvg"]
    row = next(row for row in rows if (row["task"], row["corruption"]) == ("digits", "times -1"))
    split, seed = float(row["concentration"]), int(row["seed"])
    cell = run.Cell("digits", 20, 1.0, "sgd", split, "times -1", seed, 0.3)
    found = run.run(averaging, cell)
    assert " ".join(f"{accuracy:.4f}" for accuracy in found) == row["accuracies"]


@pytest.mark.slow
def test_a_run_of_the_next_jury_again_gives_its_numbers_to_the_bit():
    row = next(row for row in ROWS if row["rule"] == "next jury" and "ipm" in row["corruption"])
    with run.build_process(row["task"], row["server"], "next jury") as process:
        found = run.run(process, cell_of(row))
    assert " ".join(f"{accuracy:.4f}" for accuracy in found) == row["accuracies"]


@pytest.mark.parametrize(
    ("kind", "unit"),
    [
        ("flipped labels", 0.1),
        ("times -10", 0.5),
        ("fresh noise", 1.0),
        ("alie, lies, 20 %", 1.0),
        ("inside, lies, 20 %", 0.1),
    ],
)
def test_a_round_of_averaging_is_the_mean_of_what_clients_are_said_to_send(averaging, kind, unit):
    task, rate, what = tasks.load("digits"), 0.3 / unit**2, bad_clients.CORRUPTIONS[kind]
    federation = bad_clients.make_clients(task, 20, 0.5, kind, 7)
    good = [client for client in range(20) if client not in federation.bad]
    cohort = [*federation.bad[:2], *good[:6]]
    weights = tasks.initial_weights(task, 7, unit)
    own = np.array(
        [
            bad_clients.honest_update(task, weights, unit, federation.arrays[client], rate)
            for client in cohort
        ]
    )
    sent = np.zeros([tasks.ROWS, task.size], np.float32)
    if what.sends:
        sent = bad_clients.payloads(what.sends, own[2:], 0.1, np.random.default_rng(3))
    untrained = (sent, np.float32(unit))
    state = averaging.set_model_weights(
        averaging.initialize(), tff.learning.models.ModelWeights(tuple(weights), untrained)
    )
    state = averaging.set_hparams(state, {"client_work": {"learning_rate": rate}})
    clients = ClientArrays(federation.arrays, batch_size=tasks.BATCH)
    state = averaging.next(state, clients.cohort(cohort, 0)).state
    after = averaging.get_model_weights(state).trainable
    for number, client in enumerate(federation.bad[:2]):
        row = federation.bad.index(client) if what.sends == "noise" else 0
        own[number] = sent[row] if what.sends else what.factor * own[number]
    sizes = [len(federation.arrays[client]["y"]) for client in cohort]
    moved = np.concatenate([(b - a).ravel() for a, b in zip(weights[:-1], after[:-1], strict=True)])
    wanted = np.average(own, 0, weights=sizes)
    np.testing.assert_allclose(moved, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_array_equal(after[-1], 0.0)


def test_payloads_are_those_of_the_papers():
    honest = np.random.default_rng(5).normal(1.0, 2.0, (7, 30))
    mean = honest.mean(0)
    for kind, wanted in (("alie", mean - 1.5 * honest.std(0)), ("ipm", -0.5 * mean)):
        sent = bad_clients.payloads(kind, honest, 0.1, np.random.default_rng(0))
        np.testing.assert_allclose(sent, np.tile(wanted, (tasks.ROWS, 1)), rtol=1e-5)
    inside = bad_clients.payloads("inside", honest, 0.1, np.random.default_rng(0))[0]
    typical = np.median(np.linalg.norm(honest, axis=1))
    np.testing.assert_allclose(np.linalg.norm(inside), 2.5 * typical, rtol=1e-5)
    np.testing.assert_allclose(inside @ mean, -2.5 * typical * np.linalg.norm(mean), rtol=1e-5)
    rng = np.random.default_rng(0)
    first, second = (bad_clients.payloads("noise", honest, 0.1, rng) for _ in range(2))
    np.testing.assert_allclose(first.std(), 0.1, rtol=0.1)
    assert (
        len(np.unique([*first, *second], axis=0)) == 2 * tasks.ROWS
    )  # anew for each and each round


@pytest.mark.parametrize("lies", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_client_that_lies_runs_the_rule_on_what_it_says(lies, inside):
    sgd, seen = bad_clients.FlaggedSGD(0.5), []
    rule = attrs.evolve(run.next_jury(), client=lambda update, state: seen.append(update))
    specs = [tf.TensorSpec([4]), tf.TensorSpec([tasks.FLAGS])]
    state, weights = sgd.initialize(specs), (tf.ones([4]), tf.zeros([tasks.FLAGS]))
    for number in range(2):
        flags = tf.constant([1.0, float(number == 1), 0.0, float(lies), float(inside)])
        state, weights = sgd.next(state, weights, (tf.ones([4]), flags))
    update = client_update(
        [1.0 - weights[0], -weights[1]],
        tf.constant(7.0),
        scores=tf.constant([0.3, 0.4]),
        loss=tf.constant(2.0),
        candidate_errors=tf.constant([0.1, 0.2, 0.3, 0.4, 0.5]),
        errors_are_losses=tf.constant(False),
    )
    known = {"typical_norm": tf.constant(3.0, tf.float64), "cutoff": tf.constant(2.5, tf.float64)}
    bad_clients.deceived(rule).client(update, known)
    (told,) = seen
    np.testing.assert_allclose(told.delta[0], 7.5 / 2.0 if inside else 1.0, rtol=1e-6)
    np.testing.assert_array_equal(told.delta[1], 0.0)
    np.testing.assert_allclose(told.loss, 0.0 if lies else 2.0)
    np.testing.assert_allclose(told.scores, [0.0, 0.0] if lies else [0.3, 0.4])
    wanted = [1.0, 0.0, 0.0, 0.0, 0.0] if lies else [0.1, 0.2, 0.3, 0.4, 0.5]
    np.testing.assert_allclose(told.candidate_errors, wanted)
    assert float(told.weight) == 7.0
    assert not told.non_finite


def test_bad_clients_are_the_same_for_every_rule_and_of_the_share_that_is_said():
    task = tasks.load("topics")
    clean = bad_clients.make_clients(task, 20, 0.5, "none", 3)
    assert clean.bad == []
    for kind, what in bad_clients.CORRUPTIONS.items():
        found = bad_clients.make_clients(task, 20, 0.5, kind, 3)
        assert len(found.bad) == round(20 * what.share)
        for client, (data, before) in enumerate(zip(found.arrays, clean.arrays, strict=True)):
            assert data["x"][:, -4].sum() == (len(data["y"]) - 1) % 16 + 1  # the last batch
            is_changed = not np.array_equal(data["x"], before["x"])
            is_changed |= not np.array_equal(data["y"], before["y"])
            assert is_changed == (client in found.bad)


def test_held_out_examples_are_voted_on_and_not_trained_on(averaging):
    task = tasks.load("digits")
    whole = bad_clients.make_clients(task, 20, 0.5, "none", 3).arrays[2]
    marked = bad_clients.make_clients(task, 20, 0.5, "none", 3, held_out=True).arrays[2]
    number = len(whole["y"]) // 10
    assert number > 0
    assert np.array_equal(marked["y"] % tasks.HELD_OUT, whole["y"])
    assert (marked["y"] >= tasks.HELD_OUT).sum() == number
    logits = np.random.default_rng(1).normal(size=(len(whole["y"]), 10)).astype(np.float32)
    errors, counts = run.held_out_error(tf.constant(logits), tf.constant(marked["y"]))
    shown = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(
        errors, 1.0 - shown[np.arange(len(logits)), whole["y"]], rtol=1e-4, atol=1e-6
    )
    assert np.flatnonzero(counts).tolist() == list(range(number))
    weights = tasks.initial_weights(task, 3)
    untrained = (np.zeros([tasks.ROWS, task.size], np.float32), np.float32(1.0))
    state = averaging.set_model_weights(
        averaging.initialize(), tff.learning.models.ModelWeights(tuple(weights), untrained)
    )
    clients = ClientArrays([marked], batch_size=tasks.BATCH)
    state = averaging.next(state, clients.cohort([0], 0)).state
    after = averaging.get_model_weights(state).trainable
    moved = np.concatenate([(b - a).ravel() for a, b in zip(weights[:-1], after[:-1], strict=True)])
    wanted = bad_clients.honest_update(task, weights, 1.0, marked, run.RATE)
    np.testing.assert_allclose(moved, wanted, rtol=1e-3, atol=1e-5)
    assert (
        np.abs(moved - bad_clients.honest_update(task, weights, 1.0, whole, run.RATE)).max() > 1e-3
    )


def test_a_convolution_by_windows_is_the_one_of_tensorflow():
    task, rng = tasks.load("cnn"), np.random.default_rng(2)
    weights = [rng.normal(size=w.shape).astype(np.float32) for w in tasks.initial_weights(task, 1)]
    x = task.test_x[:5]
    cells = tf.nn.conv2d(x.reshape(-1, 8, 8, 1), weights[0].reshape(3, 3, 1, 8), 1, "VALID")
    cells = tf.nn.avg_pool2d(tf.nn.relu(cells + weights[1]), 2, 2, "VALID")
    wanted = tf.reshape(cells, [5, 72]) @ weights[2] + weights[3]
    for namespace in (np, tf):
        found = tasks.logits(task, weights[:4], x, namespace)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_unit_of_weights_changes_their_size_alone():
    task = tasks.load("made")
    weights = tasks.initial_weights(task, 1)
    longer = tasks.initial_weights(task, 1, 0.1)
    np.testing.assert_allclose(longer[0], 10.0 * weights[0], rtol=1e-6)
    assert tasks.accuracy(task, weights) == tasks.accuracy(task, longer, 0.1) > 0.0
    weights[1][:] = np.inf
    assert tasks.accuracy(task, weights) == 0.0
