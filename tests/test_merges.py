"""What evicted entries leave behind: against the code of the authors, slow versions of each rule, and what always holds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import kvfactory_plugins.merge_pivot as merge_pivot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvfactory_plugins.cam import CamMerge
from kvfactory_plugins.merge_kvmerger import KVMerger
from kvfactory_plugins.merge_pivot import Pivot
from kvfactory_plugins.merge_weighted import Weighted
from test_golden_methods import Golden
from torch import Tensor

from kvfactory import Merge, Method, UserError, load_method
from kvfactory.indexing import entries
from kvfactory.testing import MethodContract

HEAD_BY_HEAD: list[Merge] = [
    Pivot(),
    Weighted(),
    KVMerger(similarity_threshold=0.5),
    KVMerger(similarity_threshold=0.5, value_weights="sum"),
    CamMerge(merge_budget=3),
    CamMerge(merge_budget=3, denominator="later", sampling="bernoulli"),
    CamMerge(merge_budget=3, cam_rule="kvcache-factory"),
]
LOOK_M = Weighted(weighted_rule="look-m")
MERGES = [*HEAD_BY_HEAD, LOOK_M]


class Eviction(NamedTuple):
    """What a merge is given."""

    keys: Tensor
    values: Tensor
    kept: Tensor
    scores: Tensor

    def dropped(self, head: int) -> list[int]:
        return sorted(set(range(self.keys.shape[1])) - set(self.kept[head].tolist()))


def eviction(heads: int = 3, tokens: int = 40, count: int = 12, seed: int = 0) -> Eviction:
    """Keys that wander, so that neighbours are more or less alike; some scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(heads, tokens, 6, generator=generator)
    keys, values = steps.cumsum(1) / 2, torch.randn(heads, tokens, 6, generator=generator)
    scores = torch.rand(heads, tokens, generator=generator).mul(8).round() / 8
    kept = torch.rand(heads, tokens, generator=generator).argsort(1)[:, :count].sort(1).values
    return Eviction(keys, values, kept, scores)


SEEDS = st.integers(0, 9999)
evictions = st.integers(2, 30).flatmap(
    lambda tokens: st.builds(eviction, st.integers(1, 3), st.just(tokens), st.integers(1, tokens - 1), SEEDS)
)


def merged_by(contributions: dict[int, list[tuple[float, int]]], x: Tensor, divide: str) -> dict[int, Tensor]:
    """Sums of weight times entry over what came to each kept entry, itself with 1, over the weights or their number."""
    answer = {}
    for keeper, arriving in contributions.items():
        sums = x[keeper].double() + sum(weight * x[each].double() for weight, each in arriving)
        answer[keeper] = sums / (1 + sum(weight if divide == "weights" else 1 for weight, _ in arriving))
    return answer


def similarity(case: Eviction, head: int) -> Tensor:
    unit = case.keys[head].double() / case.keys[head].double().norm(dim=-1, keepdim=True)
    return unit @ unit.T


def nearest_slowly(case: Eviction, head: int) -> dict[int, tuple[float, int]]:
    """The cosine and the index of the most similar kept entry, for each evicted one."""
    cosine = similarity(case, head)
    return {
        each: max((cosine[each, keeper].item(), keeper) for keeper in case.kept[head].tolist())
        for each in case.dropped(head)
    }


def by_keeper(case: Eviction, head: int, weights: dict[int, float]) -> dict[int, list[tuple[float, int]]]:
    nearest = nearest_slowly(case, head)
    return {
        keeper: [(weight, each) for each, weight in weights.items() if nearest[each][1] == keeper]
        for keeper in case.kept[head].tolist()
    }


def assert_merged(ours: Tensor, expected: dict[int, Tensor]) -> None:
    torch.testing.assert_close(ours.double(), torch.stack(list(expected.values())), rtol=1e-4, atol=1e-5)


# ---- against the code of the authors ----


@pytest.mark.parametrize(("case", "merge"), [("pivot", Pivot()), ("weighted", Weighted())])
def test_kvcache_factory(shared: Path, case: str, merge: Merge) -> None:
    golden = Golden(shared, f"merge__kvf_{case}")
    keys, values = golden["in_k"][0], golden["in_v"][0]
    heads, tokens, _ = keys.shape
    window = torch.arange(tokens - golden.params["window_size"], tokens).expand(heads, -1)
    kept, order = torch.cat([golden["in_selected"][0].long(), window], 1).sort(1)
    merged = merge.merge(keys, values, kept, torch.zeros(heads, tokens))
    expected = tuple(entries(golden[name][0], order) for name in ("out_k_out", "out_v_out"))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("case", "merge"), [("pivot", Pivot()), ("weightedmerge", LOOK_M)])
def test_look_m(shared: Path, case: str, merge: Merge) -> None:
    golden = Golden(shared, f"merge__lookm_official_{case}")
    keys, values, kept = golden["in_k"][0], golden["in_v"][0], golden["out_kept"].long()
    merged = merge.merge(keys, values, kept, golden["in_attn"][0].sum(1))
    torch.testing.assert_close(merged, (golden["out_k_out"][0], golden["out_v_out"][0]), rtol=1e-4, atol=1e-5)


# ---- against slow versions ----


@given(evictions)
def test_pivot_slowly(case: Eviction) -> None:
    keys, values = Pivot().merge(*case)
    for head in range(len(keys)):
        joins = by_keeper(case, head, dict.fromkeys(case.dropped(head), 1.0))
        for ours, x in ((keys[head], case.keys[head].double()), (values[head], case.values[head].double())):
            averages = {keeper: [(x[each] + x[keeper]) / 2 for _, each in come] for keeper, come in joins.items()}
            assert_merged(ours, {keeper: torch.stack([x[keeper], *come]).mean(0) for keeper, come in averages.items()})


@given(evictions)
def test_weighted_slowly(case: Eviction) -> None:
    keys, values = Weighted().merge(*case)
    for head in range(len(keys)):
        weights = {each: max((cosine + 1) / 2, 1e-6) for each, (cosine, _) in nearest_slowly(case, head).items()}
        come = by_keeper(case, head, weights)
        assert_merged(keys[head], merged_by(come, case.keys[head], "weights"))
        assert_merged(values[head], merged_by(come, case.values[head], "weights"))


@pytest.mark.parametrize(("heads", "tokens"), [(4, 40), (1, 40), (3, 13)])
def test_look_m_slowly(heads: int, tokens: int) -> None:
    """A head that comes alone is judged by itself, and what is evicted alone is as similar as the average."""
    case = eviction(heads, tokens)
    keys, values = LOOK_M.merge(*case)
    cosines = [[cosine for cosine, _ in nearest_slowly(case, head).values()] for head in range(heads)]
    over_heads = [sum(each) / heads for each in zip(*cosines, strict=True)]
    similar = [n for n, each in enumerate(over_heads) if each >= sum(over_heads) / len(over_heads)]
    assert 0 < len(similar) < len(over_heads) or tokens == 13
    for head in range(heads):
        come = by_keeper(case, head, {case.dropped(head)[n]: cosines[head][n] for n in similar})
        assert_merged(keys[head], merged_by(come, case.keys[head], "number"))
        assert_merged(values[head], merged_by(come, case.values[head], "number"))


def kvmerger_slowly(case: Eviction, head: int, threshold: float, relative: bool) -> dict[int, list[tuple[float, int]]]:
    """The Gaussian weights of the evicted entries that come to each kept one."""
    cosine, keys, scores = similarity(case, head), case.keys[head].double(), case.scores[head]
    kept = case.kept[head].tolist()
    run: list[int] = []
    runs = [run]
    for token in reversed(range(len(keys))):
        if run and cosine[token, token + 1] <= threshold:
            run = []
            runs.append(run)
        run.append(token)
    come: dict[int, list[tuple[float, int]]] = {keeper: [] for keeper in kept}
    for run in runs:
        members, leaving = sorted(set(run) & set(kept)), sorted(set(run) - set(kept))
        if members and leaving:
            pivot = max(members, key=lambda member: scores[member].item())
            squares = [(keys[pivot] - keys[each]).square().sum().item() for each in leaving]
            size = len(leaving) + 1
            variance = sum(squares) / size
            sigma = (1 + sum(math.exp(-each / (2 * variance)) for each in squares)) / (2**0.5 * size)
            width = 2 * sigma**2 * (variance if relative else 1)
            come[pivot] = [(math.exp(-square / width), each) for square, each in zip(squares, leaving, strict=True)]
    return come


@given(evictions, st.sampled_from([-0.5, 0.0, 0.5, 0.75]), st.sampled_from(["relative", "absolute"]))
def test_kvmerger_slowly(case: Eviction, threshold: float, sigma: Literal["relative", "absolute"]) -> None:
    merge = KVMerger(similarity_threshold=threshold, sigma=sigma)
    keys, values = merge.merge(*case)
    _, sums = replace(merge, value_weights="sum").merge(*case)
    for head in range(len(keys)):
        come = kvmerger_slowly(case, head, threshold, sigma == "relative")
        expected = merged_by(come, case.values[head], "weights")
        assert_merged(keys[head], merged_by(come, case.keys[head], "weights"))
        assert_merged(values[head], expected)
        assert_merged(sums[head], {keeper: (1 + len(come[keeper])) * each for keeper, each in expected.items()})


# ---- what always holds ----


@pytest.mark.parametrize("merge", MERGES, ids=str)
def test_what_was_given_is_left_as_it_is(merge: Merge) -> None:
    case = eviction()
    before = [each.clone() for each in case]
    keys, values = merge.merge(*case)
    assert all(torch.equal(a, b) for a, b in zip(case, before, strict=True))
    assert not torch.equal(values, entries(case.values, case.kept)), "nothing was merged"
    assert keys.shape == (3, 12, 6)


@pytest.mark.parametrize("merge", MERGES, ids=str)
def test_bfloat16_is_computed_in_float32_and_stays_bfloat16(merge: Merge) -> None:
    case = eviction()
    rounded = case._replace(keys=case.keys.bfloat16(), values=case.values.bfloat16())
    ours = merge.merge(*rounded)
    wide = merge.merge(*rounded._replace(keys=rounded.keys.float(), values=rounded.values.float()))
    assert {each.dtype for each in ours} == {torch.bfloat16}
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(ours, wide, strict=True))


@pytest.mark.parametrize("merge", HEAD_BY_HEAD, ids=str)
def test_heads_come_together_or_one_by_one(merge: Merge) -> None:
    case = eviction()
    alone = [merge.merge(*(each[head : head + 1] for each in case)) for head in range(3)]
    torch.testing.assert_close(merge.merge(*case), tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))


@given(evictions)
def test_entries_that_nothing_comes_to_stay_bit_by_bit(case: Eviction) -> None:
    for head in range(len(case.keys)):
        nearest = {keeper for _, keeper in nearest_slowly(case, head).values()}
        pivots = {keeper for keeper, come in kvmerger_slowly(case, head, 0.3, relative=True).items() if come}
        for merge, taken in ((Pivot(), nearest), (Weighted(), nearest), (KVMerger(similarity_threshold=0.3), pivots)):
            for ours, x in zip(merge.merge(*case), (case.keys, case.values), strict=True):
                for place, keeper in enumerate(case.kept[head].tolist()):
                    assert torch.equal(ours[head, place], x[head, keeper]) == (keeper not in taken)


@pytest.mark.parametrize("merge", [Pivot(), Weighted(), KVMerger(similarity_threshold=0)], ids=str)
@given(evictions)
def test_merged_entries_stay_in_the_hull(merge: Merge, case: Eviction) -> None:
    for ours, x in zip(merge.merge(*case), (case.keys, case.values), strict=True):
        assert (ours <= x.amax(1, keepdim=True) + 1e-5).all() and (ours >= x.amin(1, keepdim=True) - 1e-5).all()


@pytest.mark.parametrize("merge", [Pivot(), Weighted(), KVMerger(similarity_threshold=0.999)], ids=str)
def test_a_duplicate_leaves_its_twin_as_it_is(merge: Merge) -> None:
    case = eviction(tokens=8, count=4)
    kept = torch.tensor([0, 2, 4, 6]).expand(3, -1)
    keys, values = (x.clone() for x in (case.keys, case.values))
    for x in (keys, values):
        x[:, 1::2] = x[:, 0::2]
    ours = merge.merge(keys, values, kept, case.scores)
    torch.testing.assert_close(ours, (entries(keys, kept), entries(values, kept)), rtol=1e-6, atol=1e-6)


def test_similarities_are_held_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = eviction()
    at_once = Pivot().merge(*case)
    monkeypatch.setattr(merge_pivot, "DROPPED_AT_ONCE", 5)
    torch.testing.assert_close(Pivot().merge(*case), at_once)


def test_a_key_of_zeros_is_like_no_other() -> None:
    case = eviction()
    case.keys[:, ::3] = 0
    for merge in MERGES:
        assert all(torch.isfinite(each).all() for each in merge.merge(*case))


def test_a_threshold_is_a_cosine() -> None:
    with pytest.raises(UserError, match="--similarity_threshold is 2"):
        KVMerger(similarity_threshold=2)


# ---- in a cache that goes on evicting ----


class MergingContract(MethodContract):
    decode_budget = 16
    merge: str

    def make(self, budget: int) -> Method:
        return load_method("snapkv", budget=budget, window_size=4, merge=self.merge, decode_budget="same")


class TestSnapKVPivot(MergingContract):
    merge = "pivot"


class TestSnapKVWeighted(MergingContract):
    merge = "weighted"


class TestSnapKVKVMerger(MergingContract):
    merge = "kvmerger"
