"""Every registered method, in each form that its settings give it, keeps the contract."""

from __future__ import annotations

import re
from pathlib import Path

from kvfactory import load_method
from kvfactory.method import Method
from kvfactory.registry import get_registry
from kvfactory.testing import MethodContract


class TestFullKV(MethodContract):
    evicts = False

    def make(self, budget: int) -> Method:
        return load_method("fullkv")


class TestStreamingLLM(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("streamingllm", budget=budget)


class TestStreamingLLMWhileDecoding(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("streamingllm", budget=budget, decode_budget="same")


class TestStreamingLLMCachePositions(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("streamingllm", budget=budget, decode_budget="same", cache_positions=True)


class TestH2O(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("h2o", budget=budget)


class TestH2OWhileDecoding(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("h2o", budget=budget, decode_budget="same")


class TestH2OQueryHeadsNormalized(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method(
            "h2o",
            budget=budget,
            decode_budget="same",
            kv_cache_granularity="query_head",
            average_over_queries=True,
        )


class TestH2OPyramid(MethodContract):
    layer_budgets_vary = True

    def make(self, budget: int) -> Method:
        return load_method("h2o", budget=budget, allocator="pyramid", recent_size=4)


class TestSnapKV(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("snapkv", budget=budget, window_size=4)


class TestSnapKVQueryHeads(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("snapkv", budget=budget, window_size=4, kv_cache_granularity="query_head")


class TestPyramidKV(MethodContract):
    layer_budgets_vary = True

    def make(self, budget: int) -> Method:
        return load_method("pyramidkv", budget=budget, window_size=4)


class TestAdaKV(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("adakv", budget=budget, window_size=4)


class TestAdaKVQueryHeads(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method(
            "adakv", budget=budget, window_size=4, kv_cache_granularity="query_head", gqa_score_agg="max"
        )


def test_every_method_has_a_contract_test() -> None:
    """In this file or in the one of its kind."""
    files = [file.read_text("utf-8") for file in Path(__file__).parent.glob("test_*.py")]
    contract = re.compile(r"^class Test(\w+)\(\w*Contract\)", re.MULTILINE)
    classes = [name.lower() for text in files for name in contract.findall(text)]
    built_in = {name for name, entry in get_registry().methods.items() if entry.plugin.distribution == "kvfactory"}
    tested = {name for name in built_in if any(each.startswith(name.replace("_", "")) for each in classes)}
    assert tested == built_in
