"""Allocators, over any scores, budgets and layers: what they may never do, and what each of them is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfactory import BudgetAllocator, EvictionMethod, LayerContext, UserError
from kvfactory.budget import HeadAdaptive, Pyramid, Uniform
from kvfactory.testing import compress_layer

SCHEDULES = ["kvcache-factory", "never-uniform", "kvpress", "exact"]
PUBLISHED = Pyramid(pyramid_schedule="kvcache-factory")
quick = settings(max_examples=150, deadline=None)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Budget, protected tokens, competing tokens and layers of a prompt that is longer than its budget."""
    protected = draw(st.integers(0, 40))
    budget = protected + draw(st.integers(1, 120))
    competing = budget - protected + draw(st.one_of(st.integers(1, 60), st.integers(1, 2000)))
    return budget, protected, competing, draw(st.integers(1, 40))


def over_layers(allocator: BudgetAllocator, shape: tuple[int, int, int, int]) -> list[int]:
    """The count of each layer, for two heads whose counts must agree."""
    budget, protected, competing, layers = shape
    scores = torch.zeros(2, competing)
    rows = [
        allocator.counts(scores, budget=budget, protected=protected, layer_index=layer, num_layers=layers)
        for layer in range(layers)
    ]
    assert all(row[0] == row[1] for row in rows)
    return [row[0] for row in rows]


betas = st.one_of(st.just(20.0), st.floats(1, 100), st.integers(1, 40).map(float))
pyramids = st.builds(Pyramid, beta=betas, pyramid_schedule=st.sampled_from(SCHEDULES))


@quick
@given(shape=shapes())
def test_uniform_is_the_budget_everywhere(shape: tuple[int, int, int, int]) -> None:
    budget, protected, _, layers = shape
    assert over_layers(Uniform(), shape) == [budget - protected] * layers


@quick
@given(heads=st.integers(1, 8), budget=st.integers(1, 50), competing=st.integers(1, 50))
def test_uniform_never_keeps_more_than_there_is(heads: int, budget: int, competing: int) -> None:
    counts = Uniform().counts(torch.rand(heads, competing), budget=budget, protected=0, layer_index=0, num_layers=1)
    assert counts == [min(budget, competing)] * heads


@quick
@given(allocator=pyramids, shape=shapes())
def test_a_pyramid_falls_and_stays_in_bounds(allocator: Pyramid, shape: tuple[int, int, int, int]) -> None:
    counts = over_layers(allocator, shape)
    assert all(0 <= count <= shape[2] for count in counts)
    assert all(a >= b for a, b in pairwise(counts))


@quick
@given(schedule=st.sampled_from(SCHEDULES), shape=shapes())
def test_a_pyramid_with_beta_1_is_flat(schedule: str, shape: tuple[int, int, int, int]) -> None:
    counts = over_layers(Pyramid(beta=1, pyramid_schedule=schedule), shape)  # type: ignore[arg-type]
    assert len(set(counts)) == 1
    if schedule != "kvpress":  # which takes the protected tokens out of a layer's share
        assert counts[0] == shape[0] - shape[1]


@quick
@given(beta=betas, shape=shapes())
def test_the_exact_pyramid_spends_exactly_the_budget(beta: float, shape: tuple[int, int, int, int]) -> None:
    budget, protected, _, layers = shape
    counts = over_layers(Pyramid(beta=beta, pyramid_schedule="exact"), shape)
    assert sum(counts) == layers * (budget - protected)


@quick
@given(beta=betas, shape=shapes())
def test_kvcache_factorys_pyramid_spends_at_least_the_budget_and_at_most_twice(
    beta: float, shape: tuple[int, int, int, int]
) -> None:
    budget, protected, _, layers = shape
    spent = sum(over_layers(replace(PUBLISHED, beta=beta), shape)) + layers * protected
    assert layers * budget <= spent <= 2 * layers * budget


def test_kvcache_factorys_pyramid_on_a_usual_model() -> None:
    """32 layers and a window of 8: the excess is worst where the integer step is just lost, and small at 128."""
    ratios = {}
    for budget in range(9, 300):
        ratios[budget] = (sum(over_layers(PUBLISHED, (budget, 8, 4088, 32))) + 32 * 8) / (32 * budget)
    assert max(ratios, key=lambda budget: ratios[budget]) == 23
    assert ratios[23] == pytest.approx((2 * 15 + 8) / 23), (
        "30 // 31 is a step of 0: every layer keeps what the first does"
    )
    assert ratios[128] == pytest.approx((234 - 7 * 31 / 2 + 8) / 128), "from 2 * 120 - 6 down in steps of 228 // 31"
    assert min(ratios.values()) >= 1


def test_kvcache_factorys_pyramid_is_flat_while_the_prompt_is_short() -> None:
    """With 2 * (budget - protected) = 48 tokens the pyramid begins; one token less, and every layer keeps the budget."""
    assert over_layers(PUBLISHED, (32, 8, 39, 4)) == [24] * 4
    assert over_layers(PUBLISHED, (32, 8, 40, 4)) == [40, 30, 20, 10]
    assert over_layers(Pyramid(pyramid_schedule="never-uniform"), (32, 8, 39, 4)) == [39, 29, 19, 9]


def test_a_steeper_pyramid_leaves_less_for_the_last_layer() -> None:
    for schedule in SCHEDULES:
        tops, bottoms = zip(
            *(
                over_layers(Pyramid(beta=beta, pyramid_schedule=schedule), (128, 0, 4000, 16))[:: 16 - 1]  # type: ignore[arg-type]
                for beta in (1, 2, 4, 8, 16)
            ),
            strict=True,
        )
        assert list(tops) == sorted(tops) and tops[0] < tops[-1]
        assert list(bottoms) == sorted(bottoms, reverse=True) and bottoms[0] > bottoms[-1]


@st.composite
def head_scores(draw: st.DrawFn) -> Tensor:
    """[heads, competing], positive, all different, with a sharpness of its own for each head."""
    heads, competing = draw(st.integers(1, 8)), draw(st.integers(2, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    ranks = torch.randperm(heads * competing, generator=generator).double().view(heads, competing) + 1
    sharpness = torch.tensor(draw(st.lists(st.sampled_from([0.1, 0.5, 1, 3]), min_size=heads, max_size=heads)))
    scores = (ranks / ranks.max()) ** sharpness[:, None].double()
    assume(len(scores.unique()) == scores.numel())
    return scores


budgets = st.tuples(st.integers(1, 40), st.integers(0, 5))


def shares(allocator: HeadAdaptive, scores: Tensor, budget: tuple[int, int]) -> list[int]:
    base, protected = budget
    return allocator.counts(scores, budget=base + protected, protected=protected, layer_index=1, num_layers=3)


adaptives = st.builds(
    HeadAdaptive,
    floor=st.floats(0, 1),
    normalize=st.booleans(),
    floor_rule=st.sampled_from(["blend", "guarantee"]),
)


@quick
@given(allocator=adaptives, scores=head_scores(), budget=budgets)
def test_heads_stay_in_bounds(allocator: HeadAdaptive, scores: Tensor, budget: tuple[int, int]) -> None:
    counts = shares(allocator, scores, budget)
    assert len(counts) == len(scores)
    assert all(0 <= count <= scores.shape[1] for count in counts)


@quick
@given(allocator=adaptives, scores=head_scores(), budget=budgets)
def test_a_layers_total_is_its_budget(allocator: HeadAdaptive, scores: Tensor, budget: tuple[int, int]) -> None:
    heads, competing = scores.shape
    base = min(budget[0], competing)
    counts = shares(allocator, scores, budget)
    if allocator.floor_rule == "guarantee":
        assert sum(counts) == heads * base
        assert min(counts) >= int(base * allocator.floor)
    else:  # each head rounds its count by half an entry at most, and its floor down by less than one
        assert -1.5 * heads < sum(counts) - heads * base <= 0.5 * heads
        assert min(counts) >= int(base * allocator.floor)


@quick
@given(scores=head_scores(), budget=budgets, rule=st.sampled_from(["blend", "guarantee"]), normalize=st.booleans())
def test_a_floor_of_1_is_uniform(scores: Tensor, budget: tuple[int, int], rule: str, normalize: bool) -> None:
    allocator = HeadAdaptive(floor=1, normalize=normalize, floor_rule=rule)  # type: ignore[arg-type]
    assert shares(allocator, scores, budget) == [min(budget[0], scores.shape[1])] * len(scores)


@quick
@given(allocator=adaptives, scores=head_scores(), budget=budgets, seed=st.integers(0, 999))
def test_heads_have_no_rank_among_themselves(
    allocator: HeadAdaptive, scores: Tensor, budget: tuple[int, int], seed: int
) -> None:
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    counts = shares(allocator, scores, budget)
    assert shares(allocator, scores[order], budget) == [counts[head] for head in order.tolist()]


@quick
@given(scores=head_scores(), budget=budgets, normalize=st.booleans(), rule=st.sampled_from(["blend", "guarantee"]))
def test_without_a_floor_the_best_scores_of_the_layer_win(
    scores: Tensor, budget: tuple[int, int], normalize: bool, rule: str
) -> None:
    base = min(budget[0], scores.shape[1])
    rows = [sorted(row, reverse=True) for row in scores.tolist()]
    weights = [sum(row[:base]) / sum(row) if normalize else 1 for row in rows]
    best = sorted(
        (-value * weight, head) for head, (row, weight) in enumerate(zip(rows, weights, strict=True)) for value in row
    )
    winners = [head for _, head in best[: base * len(rows)]]
    allocator = HeadAdaptive(floor=0, normalize=normalize, floor_rule=rule)  # type: ignore[arg-type]
    assert shares(allocator, scores, budget) == [winners.count(head) for head in range(len(rows))]


@pytest.mark.parametrize(
    "make", [lambda: HeadAdaptive(floor=1.1), lambda: HeadAdaptive(floor=-0.1), lambda: Pyramid(beta=0.9)]
)
def test_shares_that_cannot_be_are_refused(make: Callable[[], BudgetAllocator]) -> None:
    with pytest.raises(UserError, match=r"--(floor|beta) is (1\.1|-0\.1|0\.9);"):
        make()


@pytest.mark.parametrize("rule", ["blend", "guarantee"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_head_with_one_spike_needs_few_entries(rule: str, normalize: bool) -> None:
    scores = torch.full((4, 100), 0.01)
    scores[1] = 1e-6
    scores[1, 40] = 1.0
    counts = shares(HeadAdaptive(floor=0.2, normalize=normalize, floor_rule=rule), scores, (20, 8))  # type: ignore[arg-type]
    sure = int(20 * 0.2)
    assert sure <= counts[1] <= sure + 1
    assert counts[1] < 20 < min(counts[0], counts[2], counts[3]) or sum(counts) == 80
    assert 20 - counts[1] == pytest.approx(sum(counts[:1] + counts[2:]) - 60, abs=2), "the others share what it leaves"


@pytest.mark.parametrize("rule", ["blend", "guarantee"])
def test_scores_below_zero_are_shared_rightly_or_refused(rule: str) -> None:
    """A head's share of a sum means nothing where scores are negative, such as minus a norm."""
    scores = -torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) - 0.1
    scores[0] /= 10  # far the best head
    try:
        counts = shares(HeadAdaptive(floor=0, floor_rule=rule), scores, (10, 0))  # type: ignore[arg-type]
    except UserError as error:
        assert "normalize" in str(error)
    else:
        assert counts[0] == max(counts)


class ByPosition(EvictionMethod):
    """Scores rise with position, by more in later heads; protects two sinks and three recent tokens."""

    def protected(self) -> tuple[int, int]:
        return 2, 3

    def score(self, layer: LayerContext) -> Tensor:
        return torch.arange(layer.num_tokens).float() * torch.arange(1, 1 + self.stored_heads(layer))[:, None]


@quick
@given(allocator=st.one_of(pyramids, adaptives, st.just(Uniform())), budget=st.integers(6, 30), layer=st.integers(0, 4))
def test_protected_tokens_are_kept_besides_under_every_allocator(
    allocator: BudgetAllocator, budget: int, layer: int
) -> None:
    q, k = torch.zeros(4, 40, 2), torch.zeros(2, 40, 2)
    method = ByPosition(budget=budget, allocator=allocator)
    scores = method.score(LayerContext(layer, 5, q, k, k))[:, 2:-3]
    counts = allocator.counts(scores, budget=budget, protected=5, layer_index=layer, num_layers=5)
    store = compress_layer(method, q, k, k, layer, 5)
    for count, positions in zip(counts, store.positions(), strict=True):
        assert positions.tolist() == [0, 1, *range(37 - count, 37), 37, 38, 39]


class Given(EvictionMethod):
    """Scores that are given, and one recent token that is protected."""

    def with_scores(self, scores: Tensor) -> Given:
        vars(self)["scores"] = scores
        return self

    def protected(self) -> tuple[int, int]:
        return 0, 1

    def score(self, layer: LayerContext) -> Tensor:
        scores: Tensor = vars(self)["scores"]
        return scores


@quick
@given(
    levels=st.integers(1, 5),
    tokens=st.integers(20, 60),
    budget=st.integers(2, 19),
    seed=st.integers(0, 999),
    allocator=st.one_of(st.just(Uniform()), adaptives),
    transposed=st.booleans(),
)
def test_ties_are_broken_by_position(
    levels: int, tokens: int, budget: int, seed: int, allocator: BudgetAllocator, transposed: bool
) -> None:
    """Scores of few levels tie all the time; of those that tie the first stay, however the scores lie in memory."""
    scores = torch.randint(levels, (2, tokens), generator=torch.Generator().manual_seed(seed)).float() ** 3
    lying = scores.T.contiguous().T if transposed else scores
    k = torch.zeros(2, tokens, 4)
    counts = allocator.counts(scores[:, :-1], budget=budget, protected=1, layer_index=0, num_layers=1)
    store = compress_layer(Given(budget=budget, allocator=allocator).with_scores(lying), k, k, k)
    for row, count, positions in zip(scores.tolist(), counts, store.positions(), strict=True):
        best = sorted(range(tokens - 1), key=lambda at: (-row[at], at))[:count]
        assert positions.tolist() == [*sorted(best), tokens - 1]
