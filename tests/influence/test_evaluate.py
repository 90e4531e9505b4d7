"""Measures of influence scores: against scipy and scikit-learn, and on problems whose influences are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor

from curvlib.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from curvlib.influence import evaluate
from curvlib.influence.ranks import pearson, ranks, spearman

moderately = settings(deadline=None, max_examples=20)
few_values = st.lists(st.integers(-3, 3), min_size=2, max_size=12)  # few, so that there are ties


@moderately
@given(values=few_values)
def test_ranks_are_scipys(values: list[int]) -> None:
    assert ranks(torch.tensor(values)).tolist() == stats.rankdata(values).tolist()


@moderately
@given(values=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_correlations_are_scipys(values: list[tuple[int, int]]) -> None:
    a, b = torch.tensor(values, dtype=torch.float64).T
    if len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        assert spearman(a, b).isnan()
        assert pearson(0.1 * a, 0.1 * b).isnan()
    else:
        torch.testing.assert_close(float(spearman(a, b)), float(stats.spearmanr(a, b).statistic), rtol=0, atol=1e-12)
        torch.testing.assert_close(float(pearson(a, b)), float(stats.pearsonr(a, b).statistic), rtol=0, atol=1e-12)


def test_correlations_are_taken_along_the_last_axis() -> None:
    a, b = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    for correlation in (pearson, spearman):
        rows = [correlation(x, y) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)]
        torch.testing.assert_close(correlation(a, b), torch.stack(rows).unflatten(0, (3, 4)), rtol=0, atol=1e-14)


@moderately
@given(n=st.integers(2, 30), fraction=st.floats(0.05, 0.95), number=st.integers(1, 8), seed=st.integers(0, 5))
def test_every_subset_has_the_size_asked_for(n: int, fraction: float, number: int, seed: int) -> None:
    size = round(fraction * n)
    if not 0 < size < n:
        with pytest.raises(ArgumentError, match="leave one out"):
            evaluate.subsets(n, fraction=fraction, number=number, seed=seed)
        return
    chosen = evaluate.subsets(n, fraction=fraction, number=number, seed=seed)
    assert chosen.shape == (number, n)
    assert chosen.dtype == torch.bool
    assert (chosen.sum(1) == size).all()
    assert torch.equal(chosen, evaluate.subsets(n, fraction=fraction, number=number + 3, seed=seed)[:number])


def test_subsets_are_the_same_everywhere() -> None:
    assert evaluate.subsets(12, number=2, seed=7).int().tolist() == [
        [1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0],
    ]


def test_subsets_are_uniform() -> None:
    chosen = evaluate.subsets(20, fraction=0.25, number=4000).double()
    together = chosen.mT @ chosen / len(chosen)
    pairs = torch.full((20, 20), 5 * 4 / (20 * 19), dtype=torch.float64).fill_diagonal_(0.25)
    assert (together - pairs).abs().max() < 5 * 0.007  # five standard errors of a share of a quarter


def test_subsets_of_other_seeds_differ() -> None:
    assert not torch.equal(evaluate.subsets(40, number=1), evaluate.subsets(40, number=1, seed=1))


@moderately
@given(seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_linear_datamodeling_score_is_spearmans_correlation_with_minus_the_sum(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 10, generator=generator, dtype=dtype)
    outputs = torch.randint(5, (12, 3), generator=generator).to(dtype)
    chosen = evaluate.subsets(10, number=12, seed=seed)
    found = evaluate.linear_datamodeling_score(scores, chosen, outputs)
    expected = [
        stats.spearmanr([-float(scores[q, row].double().sum()) for row in chosen], outputs[:, q]).statistic
        for q in range(3)
    ]
    torch.testing.assert_close(found.per_query, torch.tensor(expected), rtol=0, atol=1e-12, check_dtype=False)
    torch.testing.assert_close(float(found.mean), sum(expected) / 3, rtol=0, atol=1e-12)
    torch.testing.assert_close(float(found.standard_error), float(stats.sem(expected)), rtol=0, atol=1e-12)


def mean_problem() -> tuple[Tensor, Tensor]:
    """Examples [N, 3] and queries [Q, 3] of the simplest training there is: the mean, of Hessian I."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, generator=generator).double(), torch.randn(5, 3, generator=generator).double()


def losses(examples: Tensor, queries: Tensor) -> evaluate.Train:
    """Trains the mean and measures the queries' squared distances from it."""
    return lambda chosen, seed: (examples[chosen].mean(0) - queries).square().sum(1) / 2


def exact_scores(examples: Tensor, queries: Tensor) -> Tensor:
    """The gradients of 1/2 |theta - x|^2 at the mean are theta - x."""
    mean = examples.mean(0)
    return (mean - queries) @ (mean - examples).mT


def test_exact_scores_of_a_mean_have_the_right_sign_and_size() -> None:
    examples, queries = mean_problem()
    scores = exact_scores(examples, queries)
    halves = evaluate.subsets(40, number=60)
    assert evaluate.linear_datamodeling_score(scores, halves, losses_of(halves)).per_query.min() > 0.9
    chosen = evaluate.without_each(40, torch.arange(0, 40, 2))
    outputs = losses_of(chosen)
    assert evaluate.leave_one_out(scores, chosen, outputs).per_query.min() > 0.99
    change = (outputs[1:] - outputs[0]).mT
    assert (change - scores[:, ::2] / 40).norm() < 0.05 * change.norm()


def losses_of(chosen: Tensor) -> Tensor:
    return evaluate.retrain(losses(*mean_problem()), chosen)


def test_leave_one_out_is_pearsons_correlation_with_the_change() -> None:
    generator = torch.Generator().manual_seed(1)
    scores, outputs = torch.randn(3, 9, generator=generator), torch.randn(5, 3, generator=generator)
    examples = torch.tensor([8, 0, 3, 5])
    found = evaluate.leave_one_out(scores, evaluate.without_each(9, examples), outputs)
    expected = [stats.pearsonr(scores[q, examples], outputs[1:, q] - outputs[0, q]).statistic for q in range(3)]
    torch.testing.assert_close(found.per_query, torch.tensor(expected), rtol=0, atol=1e-6, check_dtype=False)


def test_brittleness_removes_the_most_helpful_of_each_query() -> None:
    examples, queries = mean_problem()
    scores, train = exact_scores(examples, queries), losses(examples, queries)
    found = evaluate.brittleness(train, scores, counts=(1, 8), random=4)
    everything = torch.arange(40)
    assert torch.equal(found.everything, train(everything, 0))
    for row, count in enumerate((1, 8)):
        for q in range(5):
            kept = scores[q].argsort(descending=True)[count:].sort().values
            torch.testing.assert_close(found.without_helpful[row, q], train(kept, 0)[q], rtol=0, atol=1e-14)
        removals = evaluate.subsets(40, fraction=1 - count / 40, number=4)
        random = torch.stack([train(subset.nonzero().squeeze(1), 0) for subset in removals]).mean(0)
        torch.testing.assert_close(found.without_random[row], random, rtol=0, atol=1e-14)
    assert found.counts.tolist() == [1, 8]
    assert (found.change > 0).all()
    assert (found.change[1] > found.change[0]).all()


@moderately
@given(seed=st.integers(0, 1000))
def test_mislabel_area_is_scikit_learns_and_that_below_the_curve(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    influence = torch.randint(6, (30,), generator=generator).double()
    flipped = torch.randperm(30, generator=generator) < 7
    found = evaluate.mislabel_detection(influence, flipped)
    torch.testing.assert_close(float(found.area), roc_auc_score(flipped, influence), rtol=0, atol=1e-12)
    # the share of right labels checked, from both curves: found against it is the characteristic itself
    right = (30 * found.checked - 7 * found.found) / 23
    torch.testing.assert_close(torch.trapezoid(found.found, right), found.area, rtol=0, atol=1e-12)


def test_mislabel_curve_does_not_depend_on_the_order_of_ties() -> None:
    flipped = torch.tensor([True, False, False, False])
    for shift in range(4):
        found = evaluate.mislabel_detection(torch.ones(4), flipped.roll(shift))
        assert found.found.tolist() == [0, 0.25, 0.5, 0.75, 1]
        assert found.area == 0.5


def test_mislabel_curve_starts_with_the_greatest_self_influence() -> None:
    found = evaluate.mislabel_detection(torch.tensor([1.0, 4.0, 3.0, 2.0]), torch.tensor([False, True, False, True]))
    assert found.found.tolist() == [0, 0.5, 0.5, 1, 1]
    assert found.checked.tolist() == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("number", [5, 40, 3000])
def test_of_equal_scores_the_first_examples_are_left_out(number: int) -> None:
    kept = evaluate.without_top(torch.arange(number).remainder(2).float().expand(3, -1), 2)
    assert (~kept).nonzero().tolist() == [[query, n] for query in range(3) for n in (1, 3)]


def test_arguments_are_left_as_they_are() -> None:
    scores, outputs, chosen = torch.randn(2, 6), torch.randn(4, 2), evaluate.subsets(6, number=4)
    copies = [tensor.clone() for tensor in (scores, outputs, chosen)]
    evaluate.linear_datamodeling_score(scores, chosen, outputs)
    assert all(torch.equal(a, b) for a, b in zip((scores, outputs, chosen), copies, strict=True))


def test_errors_say_what_does_not_fit() -> None:
    scores, outputs, chosen = torch.randn(2, 6), torch.randn(4, 2), evaluate.subsets(6, number=4)
    with pytest.raises(ShapeError, match=r"\(2, 6\), \(4, 6\) and \(2, 4\)"):
        evaluate.linear_datamodeling_score(scores, chosen, outputs.mT)
    with pytest.raises(ShapeError, match="scores should be a matrix"):
        evaluate.linear_datamodeling_score(scores[0], chosen, outputs)
    with pytest.raises(ShapeError, match="at least 2 subsets"):
        evaluate.linear_datamodeling_score(scores, chosen[:1], outputs[:1])
    with pytest.raises(DtypeError, match="subsets must be bool"):
        evaluate.linear_datamodeling_score(scores, chosen.int(), outputs)
    with pytest.raises(NonFiniteError, match="outputs"):
        evaluate.linear_datamodeling_score(scores, chosen, outputs / 0)
    with pytest.raises(ArgumentError, match="without_each"):
        evaluate.leave_one_out(scores, chosen, outputs)
    with pytest.raises(ArgumentError, match="between 0 and 5, got 6"):
        evaluate.without_each(6, torch.tensor([1, 6]))
    with pytest.raises(DtypeError, match="integers"):
        evaluate.without_each(6, torch.tensor([1.0]))
    with pytest.raises(ArgumentError, match="at least one count"):
        evaluate.brittleness(lambda examples, seed: outputs[0], scores, counts=())
    with pytest.raises(ArgumentError, match="leave one out, but would have 0 of 6"):
        evaluate.brittleness(lambda examples, seed: outputs[0], scores, counts=(6,))
    with pytest.raises(ShapeError, match="2 queries, but train measures 3"):
        evaluate.brittleness(lambda examples, seed: torch.ones(3), scores, counts=(1,))
    with pytest.raises(ArgumentError, match="0 of 4 are wrong"):
        evaluate.mislabel_detection(torch.ones(4), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(DtypeError, match="flipped must be bool"):
        evaluate.mislabel_detection(torch.ones(4), torch.ones(4))
