"""The statistics: against scipy where it has the test, and against simulated studies."""

from ouro.verdict import stats

import numpy as np
import pytest
import scipy.stats
import simulate


def test_holm_on_a_worked_example_and_the_levels_that_agree_with_it():
    """Sorted, 0.005, 0.01, 0.03 and 0.04 are multiplied by 4, 3, 2 and 1, and none falls below the one before it."""
    p = np.array([0.01, 0.04, 0.03, 0.005])
    adjusted, levels = stats.holm(p)
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(levels, [0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])
    rng = np.random.default_rng(0)
    p = rng.random((12, 500)) ** 4
    adjusted, levels = stats.holm(p)
    assert ((p <= levels) == (adjusted <= stats.ALPHA)).all() and (adjusted <= stats.ALPHA).any()
    np.testing.assert_allclose(adjusted[:, 7], stats.holm(p[:, 7])[0])


def test_seeds_alone_give_welchs_test_and_items_alone_the_paired_one():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(1.0, 0.1, 4), rng.normal(0.8, 0.3, 4), rng.normal(0.8, 0.3, 3)
    one, other, fewer = (stats.cell(np.tile(x, (50, 1)), np.ones(50)) for x in (a, b, c))  # items are all alike
    x, y = rng.normal(size=(300, 1)), rng.normal(0.05, 1, (300, 1))
    paired = stats.cell(y + x, np.ones(300)) - stats.cell(x, np.ones(300))
    paired.trained = False
    for groups, wanted in (
        ([one, -other], scipy.stats.ttest_ind(a, b, equal_var=False)),
        ([paired], scipy.stats.ttest_1samp(y[:, 0], 0)),
    ):
        e, (low, high) = stats.estimate(groups), wanted.confidence_interval(0.95)
        told = [float(e.p), float(e.value - e.half()), float(e.value + e.half())]
        np.testing.assert_allclose(told, [wanted.pvalue, low, high], rtol=1e-6)
    unequal = stats.estimate([one, -fewer])  # the smallest group's degrees of freedom
    stderr = np.sqrt(a.var(ddof=1) / 4 + c.var(ddof=1) / 3)
    np.testing.assert_allclose(unequal.half(), scipy.stats.t.ppf(0.975, 2) * stderr, rtol=1e-6)


@pytest.mark.parametrize("cluster", [1, 5])
def test_the_variance_is_that_of_scipys_bootstrap_over_whole_clusters_in_each_exam(cluster):
    rng = np.random.default_rng(1)
    groups, sizes = 240 // cluster, [96 // cluster, 144 // cluster]
    characters = rng.integers(50, 1500, (groups, cluster)).astype(float)
    bits = characters * (rng.gamma(20, 0.1, (groups, 1)) + rng.gamma(4, 0.1, (groups, cluster)))
    bits[: sizes[0]] += 0.5 * characters[: sizes[0]]  # the exams differ, which a bootstrap within them does not see

    above, below = bits.sum(1), characters.sum(1)
    cut = sizes[0]
    draws = []
    for _ in range(4000):
        rows = np.concatenate([rng.integers(0, cut, cut), rng.integers(cut, groups, groups - cut)])
        draws.append(above[rows].sum() / below[rows].sum())
    clusters = np.repeat(np.arange(groups), cluster)
    strata = np.repeat([0, 1], [cut * cluster, (groups - cut) * cluster])
    made = stats.cell(bits.reshape(-1, 1), characters.reshape(-1), clusters, strata)
    assert len(made.parts) == groups and made.free == groups - 2
    np.testing.assert_allclose(np.sqrt((made.parts**2).sum()), np.std(draws), rtol=0.04)
    np.testing.assert_allclose(made.values, bits.sum() / characters.sum())
    logarithm = stats.cell(bits.reshape(-1, 1), characters.reshape(-1), clusters, strata, log=True)
    np.testing.assert_allclose(logarithm.parts, made.parts / made.values)
    if cluster == 1:  # without exams scipy has the same bootstrap
        wanted = scipy.stats.bootstrap(
            (above, below), lambda b, c, axis: b.sum(axis) / c.sum(axis), paired=True, vectorized=True,
            n_resamples=8000, rng=np.random.default_rng(0), method="basic",
        )  # fmt: skip
        mine = stats.cell(bits.reshape(-1, 1), characters.reshape(-1))
        np.testing.assert_allclose(np.sqrt((mine.parts**2).sum()), wanted.standard_error, rtol=0.03)


def test_what_has_no_spread_has_no_interval_and_no_word():
    one_item = stats.estimate([stats.cell(np.ones((1, 3)), np.ones(1))])
    one_run = stats.estimate([stats.cell(np.arange(8.0).reshape(8, 1), np.ones(8))])
    assert not one_item.known and not one_run.known and np.isinf(one_item.half()) and np.isinf(one_run.half())
    base = stats.cell(np.arange(8.0).reshape(8, 1), np.ones(8))
    base.trained = False  # no seed made it
    assert stats.estimate([base]).known


def test_a_difference_is_paired_by_item_and_equal_models_do_not_differ():
    values = np.random.default_rng(2).normal(size=(80, 3))
    a, b = (stats.cell(values + more, np.ones(80)) for more in (0, 0.1))
    assert float(stats.estimate([b - a]).half()) < 1e-9 and float(stats.estimate([b - a]).p) < 1e-6
    assert float(stats.estimate([a - a]).p) == 1.0


def test_items_without_a_rating_weigh_nothing():
    ratings, rated = np.tile([6.0, 8.0, 0.0, 7.0], 10), np.tile([1.0, 1.0, 0.0, 1.0], 10)
    np.testing.assert_allclose(stats.cell(ratings[:, None], rated).values, [7.0])


@pytest.mark.parametrize(
    "low, high, word",
    [(0.03, 0.05, "more"), (-0.05, -0.01, "less"), (-0.01, 0.015, "same"), (0.005, 0.015, "same"),
     (-0.01, 0.03, "undecided"), (0.01, 0.03, "more"), (-np.inf, np.inf, "undecided")],
)  # fmt: skip
def test_the_word_is_what_the_interval_says(low, high, word):
    assert stats.reading(low, high, 0.02) == word


def crossed(rng, seeds: int, spread: float, studies: int, items: int = 200) -> list[stats.Cell]:
    """Two depths of so many studies at once, whose items, seeds and what a run does with an item differ by chance."""

    def depth() -> stats.Cell:
        values = 0.05 * rng.normal(size=(items, 1, studies)) + spread * rng.normal(size=(1, seeds, studies))
        return stats.cell(values + 0.05 * rng.normal(size=(items, seeds, studies)), np.ones(items))

    return [depth(), -depth()]


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.05])
def test_intervals_cover_what_they_say_and_agree_with_p(seeds, spread):
    e = stats.estimate(crossed(np.random.default_rng(seeds), seeds, spread, 600))
    covered = np.abs(e.value) <= e.half()
    assert covered.mean() >= 0.925
    np.testing.assert_array_equal(e.p < 0.05, ~covered)


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_smallest_difference_is_found_four_times_in_five(seeds):
    e = stats.estimate(crossed(np.random.default_rng(0), seeds, 0.01, 1000))
    single = stats.estimate(crossed(np.random.default_rng(1), seeds, 0.01, 1))
    single.items, single.parts = np.array(2 * 0.05**2 / 200), np.full(2, (0.01**2 + 0.05**2 / 200) / seeds)
    smallest = single.detectable(0.05 / 10, 0.02)
    value, half = e.value + smallest, e.half(0.05 / 10)
    assert 0.76 <= np.mean(stats.reading(value - half, value + half, 0.02) == "more") <= 0.84


EQUAL, UNEQUAL = (1, 1, 1, 1), (3, 1, 1, 1)  # spread between runs, by depth


@pytest.mark.slow
@pytest.mark.parametrize("seeds, spread, cluster", [(3, EQUAL, 1), (3, UNEQUAL, 2), (3, UNEQUAL, 5), (5, UNEQUAL, 1),
                                                    (5, EQUAL, 5)])  # fmt: skip
def test_false_words_are_rare_in_whole_reports_and_intervals_cover(seeds, spread, cluster):
    """At most 5 % of studies have any false word (1.5 for chance), where nothing differs and at the margin's edge."""
    for effect in ({}, dict.fromkeys((2, 3, 4), 0.0203)):
        false, covered = simulate.run(250, (seeds,) * 4, spread, cluster, effect)
        assert false <= 0.065
        assert min(covered.values()) >= 0.93 - 0.02  # 250 studies are sure to 1.4 points
