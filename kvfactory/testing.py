"""For authors of methods: run one layer by hand, and a contract that every method must keep.

    from kvfactory.testing import MethodContract

    class TestMine(MethodContract):
        def make(self, budget: int) -> Method:
            return Mine(budget=budget)

pytest collects the rules; they run on tiny random models, on a CPU, in seconds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from .attention import compress
from .buffers import Buffer, Stackable
from .context import LayerContext
from .engine import Engine, Sequence
from .method import Method
from .stores import Store

TINY: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TINY_CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "llama3-rope": LlamaConfig(**TINY, rope_scaling=LLAMA3_ROPE),
    "mistral": MistralConfig(**TINY, sliding_window=None),
    "mistral-window": MistralConfig(**TINY, sliding_window=24),
    "qwen2": Qwen2Config(**TINY),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
}


@cache
def tiny_model(
    family: str = "llama", attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model of a few layers, the same every time; `family` is a key of `TINY_CONFIGS`."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = type(TINY_CONFIGS[family])(**TINY_CONFIGS[family].to_dict())
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    for parameter in model.parameters():  # larger weights: greedy tokens that differ from step to step
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    return model.to(dtype)


def tiny_prompts(*lengths: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Random token ids, padded on the left, and their mask, both [rows, longest]."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, TINY["vocab_size"], (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor, tokens: int = 12) -> Tensor:
    """Greedy new tokens of `model.generate()`, [rows, tokens]."""
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    return output[:, ids.shape[1] :]


def compress_layer(
    method: Method,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_index: int = 0,
    num_layers: int = 1,
    hidden: Tensor | None = None,
    inverse_frequencies: Tensor | None = None,
) -> Store:
    """What a method keeps of one layer.

    q is [q_heads, tokens, head_dim], k and v are [kv_heads, tokens, head_dim], all rotated; hidden is [tokens, hidden_size];
    inverse_frequencies [head_dim / 2] is for methods that re-rotate keys, and those of theta 10000 if not given. What a
    method does once all layers are there (`finish`) is not done.
    """
    if inverse_frequencies is None:
        inverse_frequencies = 10000.0 ** -(torch.arange(0, k.shape[-1], 2, device=k.device) / k.shape[-1])
    return method.compress(LayerContext(layer_index, num_layers, q, k, v, hidden, inverse_frequencies))


class MethodContract(ABC):
    """The rules. Subclass it in a test, write `make`, and set `budget` or `evicts` where the defaults do not fit."""

    budget: int = 16
    """Entries per head; prompts have about four times as many tokens."""
    evicts: bool = True
    """False for a method that keeps every token."""
    decode_budget: int | None = None
    """Entries per head after any number of steps, for a method that evicts while decoding."""
    keeps_newest: bool = True
    """False for a method whose paper lets it go of the prompt's last token too."""
    layer_budgets_vary: bool = False
    """True for a method whose layers share the budget unevenly; the mean over layers may exceed it by half."""

    @abstractmethod
    def make(self, budget: int) -> Method:
        """The method under test, at a budget."""

    def _rows(
        self, *lengths: int, tokens: int = 12, family: str = "llama", kernel: str = "sdpa"
    ) -> tuple[Tensor, list[Any]]:
        model = tiny_model(family, kernel)
        with compress(model, self.make(self.budget)) as compression:
            output = generate(model, *tiny_prompts(*lengths), tokens=tokens)
        assert compression.cache is not None
        return output, [row[0] for row in compression.cache.rows]

    def test_the_budget_is_kept(self) -> None:
        _, rows = self._rows(60, tokens=1)
        kept = rows[0].kept()
        if not self.evicts:
            assert kept == [60] * len(kept)
        elif self.layer_budgets_vary:
            assert sum(kept) / len(kept) <= 1.5 * self.budget
        else:
            assert all(each <= self.budget for each in kept)

    def test_only_real_tokens_once_each_in_order(self) -> None:
        lengths = (60, 43, 30)
        _, rows = self._rows(*lengths, tokens=1)
        for length, row in zip(lengths, rows, strict=True):
            for store in row.stores:
                for positions in store.positions():
                    listed = positions.tolist()
                    assert positions.dtype == torch.int64
                    assert all(a < b for a, b in pairwise(listed))
                    assert listed[0] >= 0 and listed[-1] < length
                    assert listed[-1] == length - 1 or not self.keeps_newest, "the newest token is always kept"

    def test_keys_values_and_positions_are_of_one_length(self) -> None:
        _, rows = self._rows(60, tokens=3)
        for store in rows[0].stores:
            lengths = store.lengths()
            for held in (store.positions(), store.keys(), store.values()):
                assert [len(each) for each in held] == lengths

    def test_a_row_is_itself_whatever_its_neighbours(self) -> None:
        ids, mask = tiny_prompts(60, 43, 30)
        model, method = tiny_model(), self.make(self.budget)
        with compress(model, method):
            together = generate(model, ids, mask)
            for row, length in enumerate(mask.sum(1).tolist()):
                alone = generate(model, ids[row : row + 1, -length:], mask[row : row + 1, -length:])
                assert torch.equal(together[row], alone[0])

    def test_kernels_agree(self) -> None:
        for family in ("llama", "qwen2"):
            eager, _ = self._rows(60, 43, family=family, kernel="eager")
            sdpa, _ = self._rows(60, 43, family=family, kernel="sdpa")
            assert torch.equal(eager, sdpa)

    def test_every_family_runs(self) -> None:
        for family in TINY_CONFIGS:
            output, _ = self._rows(60, tokens=4, family=family)
            assert output.shape == (1, 4)

    def test_a_step_reads_what_it_just_appended_last(self) -> None:
        _, rows = self._rows(60, tokens=1)
        for store in rows[0].stores:
            new = torch.full((2, 1, 8), 7.0)
            store.append(new, new, 60)
            reading = store.read(torch.zeros(8, 1, 8))
            assert all(torch.equal(head[-1], new[0, 0]) for head in reading.values)
            assert all(positions[-1] == 60 for positions in store.positions())

    def test_a_fork_leaves_the_trunk_alone(self) -> None:
        engine = Engine(tiny_model())
        ids, _ = tiny_prompts(60)
        questions = ids[0, :7].tolist(), ids[0, 20:29].tolist()

        def prefilled() -> Sequence:
            return engine.prefill(ids[0], [self.make(self.budget)])[0]

        alone = [engine.decode([engine.extend(prefilled(), question)], 8)[0] for question in questions]
        trunk = prefilled()
        before = _held(trunk.cache.stores)
        branches = [trunk.fork() for _ in questions]
        for branch, question in zip(branches, questions, strict=True):
            engine.extend(branch, question)
        assert engine.decode(branches, 8) == alone, "branches write into what they share"
        assert all(torch.equal(a, b) for a, b in zip(before, _held(trunk.cache.stores), strict=True))
        assert engine.decode([engine.extend(trunk, questions[0])], 8)[0] == alone[0]

    def test_no_memory_of_other_examples(self) -> None:
        model, method = tiny_model(), self.make(self.budget)
        first, second = tiny_prompts(60, seed=2), tiny_prompts(41, seed=5)
        with compress(model, method):
            generate(model, *first)
            used = generate(model, *second)
        with compress(model, self.make(self.budget)):
            fresh = generate(model, *second)
        assert torch.equal(used, fresh)

    def test_room_for_all_is_the_stock_model(self) -> None:
        model = tiny_model()
        ids, mask = tiny_prompts(60, 43)
        stock = generate(model, ids, mask)
        with compress(model, self.make(500)):
            assert torch.equal(generate(model, ids, mask), stock)

    def test_a_shared_prefill_is_ones_own(self) -> None:
        engine = Engine(tiny_model())
        ids, _ = tiny_prompts(60)
        methods = [self.make(self.budget), self.make(self.budget + 4), self.make(500)]
        together = engine.decode(engine.prefill(ids[0], methods), 12)
        alone = [engine.decode(engine.prefill(ids[0], [method]), 12)[0] for method in methods]
        assert together == alone

    def test_the_engine_is_generate(self) -> None:
        model = tiny_model()
        ids, mask = tiny_prompts(60)
        engine = Engine(model)
        tokens = engine.decode(engine.prefill(ids[0], [self.make(self.budget)]), 12)[0]
        with compress(model, self.make(self.budget)):
            assert generate(model, ids, mask)[0].tolist() == tokens

    def test_bfloat16_stays_bfloat16(self) -> None:
        engine = Engine(tiny_model(dtype=torch.bfloat16))
        ids, _ = tiny_prompts(60)
        sequence = engine.prefill(ids[0], [self.make(self.budget)])[0]
        engine.decode([sequence], 3)
        for store in sequence.cache.stores:
            assert {each.dtype for each in (*store.keys(), *store.values())} == {torch.bfloat16}

    def test_bytes_follow_what_is_kept(self) -> None:
        engine = Engine(tiny_model())
        ids, _ = tiny_prompts(60)
        sequence = engine.prefill(ids[0], [self.make(self.budget)])[0]
        for store in sequence.cache.stores:
            assert sum(x.nbytes for x in tensors_of(store)) <= store.nbytes(), (
                "nbytes() counts every tensor that is held"
            )

    def test_the_decode_budget_is_kept(self) -> None:
        if self.decode_budget is None:
            return
        (_, early), (_, late) = self._rows(60, tokens=24), self._rows(60, tokens=48)
        assert all(max(store.lengths()) <= self.decode_budget for store in (*early[0].stores, *late[0].stores))
        assert late[0].nbytes() <= early[0].nbytes(), (
            "room and bookkeeping grow with what is stored, not with the steps"
        )


def tensors_of(thing: Any) -> list[Tensor]:
    """Every tensor that a store holds, each once: in its buffers, and in lists, dicts and dataclasses of its own too."""
    found: dict[tuple[int, torch.Size], Tensor] = {}
    seen: set[int] = set()

    def look(each: Any) -> None:
        if isinstance(each, Tensor):
            found[each.data_ptr(), each.shape] = each
        elif isinstance(each, Method) or id(each) in seen:
            return
        elif isinstance(each, (list, tuple, dict)):
            seen.add(id(each))
            for inner in each.values() if isinstance(each, dict) else each:
                look(inner)
        elif isinstance(each, (Store, Buffer, Stackable)) or is_dataclass(each):
            look(vars(each))

    look(thing)
    return list(found.values())


def _held(stores: list[Store]) -> list[Tensor]:
    return [x.clone() for store in stores for x in (*store.keys(), *store.values(), *store.positions())]


def reference_attention(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention weights, slow and obvious: q [q_heads, n, d] and k [kv_heads, n, d] give [q_heads, n, n], float64."""
    group = q.shape[0] // k.shape[0]
    logits = q.double() @ k.double().repeat_interleave(group, 0).transpose(1, 2) / math.sqrt(q.shape[-1])
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -math.inf).softmax(-1)
