"""TOVA keeps the contract of every method, and does what its paper says."""

from __future__ import annotations

import torch
from kvf_tova import Tova

from kvfactory.budget import Pyramid
from kvfactory.testing import MethodContract, compress_layer, reference_attention


class TestTova(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Tova:
        return Tova(budget=budget)


class TestTovaQueryHeads(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Tova:
        return Tova(budget=budget, kv_cache_granularity="query_head", gqa_score_agg="max")


class TestTovaPyramid(MethodContract):
    layer_budgets_vary = True

    def make(self, budget: int) -> Tova:
        return Tova(budget=budget, allocator=Pyramid(beta=4))


def qkv(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads, 40, 16, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def test_all_heads_keep_what_the_last_query_attends_to_most() -> None:
    q, k, v = qkv()
    first, second = compress_layer(Tova(budget=10), q, k, v).positions()
    mean = reference_attention(q, k)[:, -1].mean(0)
    best = sorted(range(39), key=lambda token: -mean[token])[:9]
    assert first.tolist() == second.tolist() == [*sorted(best), 39]


def test_a_step_evicts_what_its_query_attends_to_least() -> None:
    q, k, v = qkv()
    store = compress_layer(Tova(budget=10), q, k, v)
    before = store.positions()[0].tolist()
    store.append(k[:, :1], v[:, :1], 40)
    weights = torch.full((4, 1, 11), 0.1)
    weights[:, 0, 3] = torch.tensor([0.0, 0.05, 0.05, 0.05])
    weights[0, 0, 5] = 0.0  # least for one head, not on average
    weights[:, 0, 10] = 0.0  # the newest
    store.observe(weights)
    assert store.positions()[0].tolist() == store.positions()[1].tolist() == [*before[:3], *before[4:], 40]
