"""Orders of columns under which N:M keeps more."""

import itertools

import numpy as np
import pytest

import jaxsparse as js

# figure 6 of the paper, whose columns are called A to H
PAPER = np.array(
    [
        [1.3, 1.9, 0.2, 1.2, 4.2, 3.5, 7.2, 0.6],
        [0.4, 1.1, 1.5, 6.9, 0.8, 6.7, 5.4, 8.8],
        [0.2, 1.3, 8.0, 0.8, 4.2, 1.3, 5.6, 9.7],
        [1.5, 0.6, 1.3, 0.5, 8.8, 4.2, 8.9, 8.9],
    ]
)


def kept(scores, n, m):
    groups = np.sort(scores.reshape(len(scores), -1, m), -1)
    return groups[..., m - n :].sum()


def check(scores, n, m, found):
    assert sorted(found.order) == list(range(scores.shape[1]))
    assert found.before == pytest.approx(kept(scores, n, m), rel=1e-6)
    assert found.kept == pytest.approx(kept(scores[:, found.order], n, m), rel=1e-6)
    top = np.sort(scores, 1)[:, scores.shape[1] - scores.shape[1] // m * n :].sum()
    assert found.unstructured == pytest.approx(top, rel=1e-6)
    assert found.before <= found.kept <= found.unstructured * (1 + 1e-6)


def test_the_example_of_the_paper():
    found = js.column_order(PAPER, 2, 4)
    check(PAPER, 2, 4, found)
    assert (found.before, found.kept) == pytest.approx((83.7, 102.9), abs=1e-4)
    order = ["ABCDEFGH".index(name) for name in "EGADCHBF"]
    assert kept(PAPER[:, order], 2, 4) == pytest.approx(found.kept)


@pytest.mark.parametrize("k", [4, 8, 12])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_columns_get_the_best_of_all_orders(k, n):
    scores = np.random.default_rng(k).exponential(size=(5, k))
    found = js.column_order(scores, n, 4)
    check(scores, n, 4, found)

    def best(columns):
        if not columns:
            return 0.0
        first, *others = columns
        return max(
            kept(scores[:, [first, *some]], n, 4) + best([i for i in others if i not in some])
            for some in itertools.combinations(others, 3)
        )

    assert found.kept == pytest.approx(best(list(range(k))), rel=1e-5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8), (2, 16)])
def test_many_columns_keep_more_than_before(n, m):
    rng = np.random.default_rng(0)
    scores = rng.exponential(size=(16, 128)) * np.sort(rng.exponential(size=128))
    found = js.column_order(scores, n, m, rounds=30)
    check(scores, n, m, found)
    gap = found.unstructured - found.before
    assert found.kept - found.before > 0.3 * gap
    again = js.column_order(scores, n, m, rounds=30)
    np.testing.assert_array_equal(again.order, found.order)


def test_more_rounds_are_never_worse_and_time_runs_out():
    scores = np.random.default_rng(1).exponential(size=(8, 64))
    seen = []
    found = js.column_order(scores, 2, 4, rounds=60, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == found.kept and len(seen) == 60
    late = js.column_order(scores, 2, 4, seconds=-1)
    assert late.kept == late.before
    np.testing.assert_array_equal(late.order, np.arange(64))


def test_a_product_of_reordered_operands_is_the_same():
    rng = np.random.default_rng(2)
    w, x = rng.normal(size=(8, 32)), rng.normal(size=(5, 32))
    order = js.column_order(np.abs(w), 2, 4).order
    np.testing.assert_allclose(x[:, order] @ w[:, order].T, x @ w.T, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((3, 10)), 2, 4), r"`scores` have shape \(3, 10\)\. Pass \[M, K\] with K"),
        ((np.ones(8), 2, 4), r"`scores` have shape \(8,\)"),
        ((-np.ones((3, 8)), 2, 4), "must be finite and not negative"),
        ((np.full((3, 8), np.nan), 2, 4), "must be finite and not negative"),
        ((np.ones((3, 8)), 5, 4), "column_order: .*5"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        js.column_order(*arguments)
