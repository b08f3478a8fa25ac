"""The contract catches broken methods, each by the rule that is meant for it, and lets a sound one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfactory import DenseStore, EvictionMethod, LayerContext, Method, Reading, Store, pool
from kvfactory.buffers import PlainBuffer
from kvfactory.testing import (
    TINY_CONFIGS,
    MethodContract,
    compress_layer,
    reference_attention,
    tiny_model,
    tiny_prompts,
)

Make = Callable[[int], Method]


def contract_of(make_method: Make, **declared: Any) -> MethodContract:
    """The contract for a method that this makes from a budget, with what its author declares."""

    class Contract(MethodContract):
        def make(self, budget: int) -> Method:
            return make_method(budget)

    for name, value in declared.items():
        setattr(Contract, name, value)
    return Contract()


def breaks(contract: MethodContract, rule: str) -> bool:
    try:
        getattr(contract, rule)()
    except (AssertionError, RuntimeError, IndexError):
        return True
    return False


# ---- a sound method, and stores and methods that each break one thing ----


@dataclass(frozen=True, kw_only=True)
class Sound(EvictionMethod):
    """Keeps what the last queries look at, pooled, so that scores tie."""

    def protected(self) -> tuple[int, int]:
        return 0, 4

    def score(self, layer: LayerContext) -> Tensor:
        votes = layer.window_attention(4).sum(1).unflatten(0, (layer.kv_heads, -1)).mean(1)
        return pool(votes, 7, "maxpool")


class IndexOnTheClass(Sound):
    """Works out what to keep of the first prompt it sees, and keeps the same of every other."""

    index: ClassVar[dict[int, Tensor]] = {}

    def store(self, layer: LayerContext, kept: Tensor | list[Tensor]) -> Store:
        assert isinstance(kept, Tensor)
        return super().store(layer, self.index.setdefault(layer.layer_index, kept))


class ScoresOnTheInstance(Sound):
    """As the last, but careful: what it remembers is cut to the prompt at hand, so that nothing looks amiss."""

    def score(self, layer: LayerContext) -> Tensor:
        remembered: dict[int, Tensor] = vars(self).setdefault("remembered", {})
        scores = remembered.setdefault(layer.layer_index, super().score(layer))
        return pad(scores, (0, max(0, layer.num_tokens - scores.shape[1])))[:, : layer.num_tokens]


class MixesInThePrompt(Sound):
    """Mixes the scores of the prompt before into those of the next."""

    last: ClassVar[dict[int, float]] = {}

    def score(self, layer: LayerContext) -> Tensor:
        scores = super().score(layer)
        previous, self.last[layer.layer_index] = self.last.get(layer.layer_index, 0.0), scores.sum().item()
        return (scores * 1e4 + previous * 1e4).sin()


class DropsTheNewest(Sound):
    """Protects no window, and the newest token has no votes."""

    def protected(self) -> tuple[int, int]:
        return 0, 0

    def score(self, layer: LayerContext) -> Tensor:
        return super().score(layer) * (torch.arange(layer.num_tokens) < layer.num_tokens - 1)


class KeepsATokenTwice(Sound):
    def store(self, layer: LayerContext, kept: Tensor | list[Tensor]) -> Store:
        assert isinstance(kept, Tensor)
        return super().store(layer, torch.cat([kept[:, :1], kept[:, :1], kept[:, 2:]], 1))


class ForgetsTheBudget(Sound):
    def compress(self, layer: LayerContext) -> Store:
        return DenseStore(layer.keys, layer.values)


class EvictsWithRoomForAll(Sound):
    def compress(self, layer: LayerContext) -> Store:
        return self.store(layer, torch.arange(layer.num_tokens // 2, layer.num_tokens).expand(layer.kv_heads, -1))


class SharesWhatIsItsOwn(Sound):
    """Shares a measure that depends on the budget under a key that does not."""

    def compress(self, layer: LayerContext) -> Store:
        kept = layer.shared("kept", lambda: torch.arange(layer.num_tokens)[-self.budget :])
        return self.store(layer, kept.expand(layer.kv_heads, -1))


class CountsCalls(Sound):
    """Stands for all that depends on who came before in the batch."""

    calls: ClassVar[list[int]] = []

    def score(self, layer: LayerContext) -> Tensor:
        self.calls.append(1)
        return super().score(layer).roll(len(self.calls), 1)


class TurnsToFloat32(Sound):
    def store(self, layer: LayerContext, kept: Tensor | list[Tensor]) -> Store:
        assert isinstance(kept, Tensor)
        keys, values = layer.gather(kept)
        return DenseStore(keys.float(), values.float(), kept.int())


class PositionsFallShort(DenseStore):
    def positions(self) -> list[Tensor]:
        return [each[1:] for each in super().positions()]


class SharedRoom(DenseStore):
    """Makes room for new tokens once, and its forks all write into the same room."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        super().__init__(keys, values, positions)
        assert isinstance(self._buffer, PlainBuffer)
        self._buffer.append(*(torch.zeros(len(keys), 100, keys.shape[2]) for _ in range(2)))
        self._buffer.length -= 100

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        assert isinstance(self._buffer, PlainBuffer)
        self._buffer.shared = False
        super().append(keys, values, position)


class Ring(DenseStore):
    """A new token takes the place of an old one, in tensors that forks share."""

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        for token in range(keys.shape[1]):
            slot = (position + token) % self._length
            held_keys, held_values = self._entries()
            held_keys[:, slot], held_values[:, slot] = keys[:, token], values[:, token]


class AppendsInFront(DenseStore):
    def read(self, query: Tensor) -> Reading:
        reading = super().read(query)
        assert isinstance(reading.keys, Tensor) and isinstance(reading.values, Tensor)
        return reading._replace(keys=reading.keys.roll(1, 1), values=reading.values.roll(1, 1))


class CountsNothing(DenseStore):
    def nbytes(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class SoundWith(Sound):
    """Sound, but for its store."""

    store_class: type[DenseStore]

    def store(self, layer: LayerContext, kept: Tensor | list[Tensor]) -> Store:
        assert isinstance(kept, Tensor)
        return self.store_class(*layer.gather(kept), kept.int())


def made_with(broken: type[Sound] | type[DenseStore]) -> Make:
    """Makes the broken method, or a sound one with the broken store."""
    if issubclass(broken, Store):
        return lambda budget: SoundWith(budget=budget, store_class=broken)
    return lambda budget: broken(budget=budget)


# ---- the contract ----


def test_a_sound_method_keeps_every_rule() -> None:
    contract = contract_of(made_with(Sound))
    rules = [name for name in dir(contract) if name.startswith("test_")]
    assert len(rules) >= 15
    for rule in rules:
        getattr(contract, rule)()


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (IndexOnTheClass, "test_no_memory_of_other_examples"),
        (ScoresOnTheInstance, "test_no_memory_of_other_examples"),
        (MixesInThePrompt, "test_no_memory_of_other_examples"),
        (DropsTheNewest, "test_only_real_tokens_once_each_in_order"),
        (KeepsATokenTwice, "test_only_real_tokens_once_each_in_order"),
        (ForgetsTheBudget, "test_the_budget_is_kept"),
        (EvictsWithRoomForAll, "test_room_for_all_is_the_stock_model"),
        (SharesWhatIsItsOwn, "test_a_shared_prefill_is_ones_own"),
        (CountsCalls, "test_a_row_is_itself_whatever_its_neighbours"),
        (CountsCalls, "test_the_engine_is_generate"),
        (CountsCalls, "test_kernels_agree"),
        (TurnsToFloat32, "test_bfloat16_stays_bfloat16"),
        (PositionsFallShort, "test_keys_values_and_positions_are_of_one_length"),
        (SharedRoom, "test_a_fork_leaves_the_trunk_alone"),
        (Ring, "test_a_fork_leaves_the_trunk_alone"),
        (AppendsInFront, "test_a_step_reads_what_it_just_appended_last"),
        (CountsNothing, "test_bytes_follow_what_is_kept"),
    ],
)
def test_a_broken_method_breaks_the_rule_meant_for_it(broken: type[Sound] | type[DenseStore], rule: str) -> None:
    assert not breaks(contract_of(made_with(Sound)), rule), "the sound method keeps it"
    assert breaks(contract_of(made_with(broken)), rule)


@pytest.mark.parametrize(
    ("rule", "declared"),
    [
        ("test_the_budget_is_kept", {"evicts": False}),
        ("test_the_budget_is_kept", {"budget": 16, "layer_budgets_vary": True}),
        ("test_the_decode_budget_is_kept", {"decode_budget": 16}),
    ],
)
def test_what_an_author_declares_is_checked(rule: str, declared: dict[str, Any]) -> None:
    wasteful = made_with(ForgetsTheBudget) if declared.get("layer_budgets_vary") else made_with(Sound)
    assert breaks(contract_of(wasteful, **declared), rule)


# ---- the rest of the kit ----


def test_a_layer_is_compressed_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(heads, 40, 8, generator=generator) for heads in (4, 2, 2))
    store = compress_layer(Sound(budget=12), q, k, v, layer_index=1, num_layers=3)
    votes = reference_attention(q, k)[:, -4:].sum(1).view(2, 2, 40).mean(1)
    for head, kept in enumerate(store.positions()):
        listed = kept.tolist()
        assert len(listed) == 12 and listed[-4:] == [36, 37, 38, 39]
        assert torch.equal(store.keys()[head], k[head, kept]) and torch.equal(store.values()[head], v[head, kept])
        pooled = [max(votes[head, max(0, at - 3) : at + 4].tolist()) for at in range(36)]
        lost = [pooled[at] for at in range(36) if at not in listed]
        assert min(pooled[at] for at in listed[:-4]) >= max(lost) - 1e-6


class WritesDownTheLayer(Method):
    seen: ClassVar[list[LayerContext]] = []

    def compress(self, layer: LayerContext) -> Store:
        self.seen.append(layer)
        return DenseStore(layer.keys, layer.values)


def test_a_layer_by_hand_has_all_that_it_was_given() -> None:
    q, k, hidden, frequencies = torch.randn(4, 9, 8), torch.randn(2, 9, 8), torch.randn(9, 32), torch.rand(4)
    compress_layer(WritesDownTheLayer(), q, k, k + 1, 2, 5, hidden, frequencies)
    layer = WritesDownTheLayer.seen.pop()
    assert (layer.layer_index, layer.num_layers, layer.num_tokens) == (2, 5, 9)
    assert (layer.query_heads, layer.kv_heads) == (4, 2)
    assert layer.queries is q and layer.keys is k and torch.equal(layer.values, k + 1)
    assert layer.hidden is hidden and layer.inverse_frequencies is frequencies


def test_reference_attention_is_causal_and_grouped() -> None:
    q, k = torch.randn(4, 6, 8), torch.randn(2, 6, 8)
    weights = reference_attention(q, k)
    assert weights.shape == (4, 6, 6) and weights.dtype == torch.float64
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 6, dtype=torch.float64))
    assert weights.triu(1).abs().max() == 0
    by_hand = torch.tensor([(q[3, 2] @ k[1, at] / 8**0.5).exp() for at in range(3)]).double()
    torch.testing.assert_close(weights[3, 2, :3], by_hand / by_hand.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_tiny_models_are_the_same_every_time(family: str) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    first = tiny_model.__wrapped__(family)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = tiny_model(family, "sdpa")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert first.config._attn_implementation == "sdpa" and tiny_model(family, "eager") is not again


def test_tiny_prompts_are_padded_on_the_left() -> None:
    ids, mask = tiny_prompts(5, 3)
    assert mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert ((ids == 0) == (mask == 0)).all() and ids[mask == 1].min() >= 3
    assert torch.equal(tiny_prompts(5, 3)[0], ids) and not torch.equal(tiny_prompts(5, 3, seed=3)[0], ids)
