"""A2SF keeps the contract of every method, and does what its paper says."""

from __future__ import annotations

import pytest
import torch
from kvf_a2sf import A2SF

from kvfactory import load_method
from kvfactory.testing import MethodContract, compress_layer, reference_attention


class TestA2SF(MethodContract):
    def make(self, budget: int) -> A2SF:
        return A2SF(budget=budget)


class TestA2SFWhileDecoding(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> A2SF:
        return A2SF(budget=budget, decode_budget="same", kv_cache_granularity="query_head")


def qkv(tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, tokens, 16, generator=generator) for heads in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0])
def test_attention_fades_with_every_query(factor: float) -> None:
    q, k, v = qkv()
    score = torch.zeros(4, 40, dtype=torch.float64)
    for row in reference_attention(q, k).unbind(1):
        score = factor * score + row
    score = score.unflatten(0, (2, 2)).mean(1)
    store = compress_layer(A2SF(budget=10, forgetting_factor=factor), q, k, v)
    for head, positions in enumerate(store.positions()):
        best = sorted(range(39), key=lambda token: -score[head, token])[:9]
        assert positions.tolist() == [*sorted(best), 39]


def test_what_never_fades_is_h2os_score() -> None:
    q, k, v = qkv()
    ours = compress_layer(A2SF(budget=10, forgetting_factor=1.0), q, k, v)
    theirs = compress_layer(load_method("h2o", budget=10, recent_size=1), q, k, v)
    assert [each.tolist() for each in ours.positions()] == [each.tolist() for each in theirs.positions()]


def test_a_step_evicts_what_has_faded_most() -> None:
    q, k, v = qkv()
    store = compress_layer(A2SF(budget=10, forgetting_factor=0.0, decode_budget="same"), q, k, v)
    before = store.positions()[0].tolist()
    store.append(k[:, :1], v[:, :1], 40)
    weights = torch.full((4, 1, 11), 0.1)
    weights[:2, 0, 3] = 0.05
    store.observe(weights)
    assert store.positions()[0].tolist() == [*before[:3], *before[4:], 40]
