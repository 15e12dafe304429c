"""Splits against their definitions: every example once, and the distribution that was asked for."""

import numpy as np
import pytest

from tff_optim.simulation import splits

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [50, 100, 150, 200, 100]))
SPLIT = splits.dirichlet(LABELS, 6, 1.0, seed=3)


def everything_once(split):
    its = np.sort(np.concatenate(split.indices))
    np.testing.assert_array_equal(its, np.arange(len(LABELS)))


@pytest.mark.parametrize("concentration", [0.2, 1.0, 50.0])
def test_shares_of_labels_are_those_that_were_drawn(concentration):
    split = splits.dirichlet(LABELS, 6, concentration, seed=3)
    everything_once(split)
    counts = split.counts(LABELS)
    for kind in range(5):
        np.testing.assert_array_equal(
            counts[:, kind], [np.sum(LABELS[i] == kind) for i in split.indices]
        )
        # Rounded at both ends of each part.
        expected = split.drawn[kind] * np.sum(kind == LABELS)
        assert np.max(abs(counts[:, kind] - expected)) <= 1


def test_shares_have_the_moments_of_a_dirichlet_distribution():
    clients, concentration = 5, 0.7
    shares = np.concatenate(
        [
            splits.dirichlet(LABELS, clients, concentration, seed=s, least=0).drawn
            for s in range(400)
        ]
    )
    mean = 1 / clients
    variance = mean * (1 - mean) / (clients * concentration + 1)
    error = np.sqrt(variance / len(shares))
    assert np.all(abs(shares.mean(0) - mean) < 5 * error)
    np.testing.assert_allclose(shares.var(0), variance, rtol=0.15)
    sizes = np.stack(
        [splits.by_size(600, clients, 0.7, seed=s, least=0).drawn for s in range(2000)]
    )
    np.testing.assert_allclose(sizes.var(0), variance, rtol=0.15)


def test_each_client_has_its_labels_alone_and_each_label_is_shared_evenly():
    split = splits.by_label(LABELS, 8, 2, seed=1)
    everything_once(split)
    counts = split.counts(LABELS)
    for row, own in zip(counts, split.drawn, strict=True):
        assert set(np.flatnonzero(row)) == set(own)
        assert len(set(own)) == 2
    holders = np.bincount(split.drawn.ravel())
    assert holders.max() - holders.min() <= 1
    for kind in range(5):
        shared = counts[counts[:, kind] > 0, kind]
        assert shared.max() - shared.min() <= 1
    few = splits.by_label(LABELS, 2, 1, seed=1)  # other labels are left out
    assert np.count_nonzero(few.counts(LABELS)) == 2


def test_sizes_are_those_that_were_drawn():
    split = splits.by_size(600, 7, 0.8, seed=2, least=3)
    everything_once(split)
    sizes = np.array([len(its) for its in split.indices])
    assert sizes.min() >= 3
    assert np.max(abs(sizes - 600 * split.drawn)) <= 1


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: splits.dirichlet(LABELS, 6, 0.5, seed=seed),
        lambda seed: splits.by_label(LABELS, 6, 2, seed=seed),
        lambda seed: splits.by_size(600, 6, 0.5, seed=seed),
    ],
)
def test_the_seed_decides(make):
    one, same, other = (np.concatenate(make(seed).indices) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_data_of_clients_are_the_examples_of_the_split():
    split = splits.dirichlet(LABELS, 11, 0.5, seed=4)
    x = np.arange(600.0)[:, np.newaxis]
    data = split.datasets({"x": x, "y": LABELS}, batch_size=8)
    assert list(data)[:2] == ["client 00", "client 01"]
    for its, one in zip(split.indices, data.values(), strict=True):
        batches = list(one.as_numpy_iterator())
        assert list(batches[0]) == ["x", "y"]
        assert {len(batch["y"]) for batch in batches[:-1]} <= {8}
        np.testing.assert_array_equal(np.concatenate([b["x"] for b in batches])[:, 0], its)
        np.testing.assert_array_equal(np.concatenate([b["y"] for b in batches]), LABELS[its])


def test_each_client_holds_out_its_share():
    split = splits.by_size(600, 7, 0.8, seed=2, least=2)
    train, test = split.hold_out(0.25)
    for whole, kept, held in zip(split.indices, train.indices, test.indices, strict=True):
        assert sorted([*kept, *held]) == sorted(whole)
        assert len(kept) >= 1
        assert len(held) == max(round(0.25 * len(whole)), 1)
    with pytest.raises(ValueError, match="`share` must be above 0 and below 1; found 1"):
        split.hold_out(1)
    with pytest.raises(ValueError, match="an example to train on; found one with 1"):
        splits.by_size(2, 2, 100.0, seed=0).hold_out(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: splits.dirichlet(LABELS, 0, 1.0, seed=0), "`clients` must be a whole number"),
        (lambda: splits.dirichlet(LABELS, 601, 1.0, seed=0), "`clients` must be at most .*600"),
        (
            lambda: splits.dirichlet(LABELS, 6, 0.0, seed=0),
            "`concentration` must be a number greater",
        ),
        (
            lambda: splits.dirichlet(LABELS, 6, True, seed=0),
            "`concentration` must be a number greater",
        ),
        (lambda: splits.dirichlet(LABELS, 60, 1e-3, seed=0), "leave each client at least 1"),
        (lambda: splits.dirichlet(LABELS / 2, 6, 1.0, seed=0), "`labels` must be whole numbers"),
        (lambda: splits.dirichlet(LABELS - 1, 6, 1.0, seed=0), "`labels` must be whole numbers"),
        (lambda: splits.dirichlet(LABELS, 6, 1.0, seed=-1), "`seed` must be a whole number"),
        (lambda: splits.by_label(LABELS, 6, 6, seed=0), "at most the number of labels, 5"),
        (lambda: splits.by_label(LABELS, 300, 5, seed=0), "an example for each client that holds"),
        (lambda: splits.by_size(600, 6, 1.0, seed=0, least=101), "leave each client at least 101"),
        (lambda: splits.by_size(0, 6, 1.0, seed=0), "`examples` must be a whole number"),
        (
            lambda: SPLIT.datasets({"y": LABELS[:9]}, 2),
            "`columns` at 'y' must have a row for",
        ),
        (
            lambda: SPLIT.datasets(3.0, 2),
            "`columns` must have a row for each of at least 600 .*found \\[\\]",
        ),
        (lambda: SPLIT.datasets(LABELS, 0), "`batch_size` must be a whole number of at least 1"),
        (lambda: SPLIT.counts(LABELS[:9]), r"`labels` must have a row .*; found \[9\]"),
    ],
)
def test_a_split_that_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
