"""Stores against a plain list of tokens, over any sequence of what can happen to them; and what they weigh."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from calibrations import small_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from kvfactory import DenseStore, EvictionMethod, RaggedStore, Store, load_method
from kvfactory.growing import Growing
from kvfactory.registry import get_registry
from kvfactory.testing import compress_layer, tensors_of

KV_HEADS, DIM = 2, 3
ENTRY_BYTES = 2 * DIM * 4
POSITION_BYTES = 4


def bookkeeping(store: Store) -> int:
    """What a store may spend on knowing where its heads end: a number or two for each, and nothing if all are as long."""
    return 16 * len(store.lengths()) if isinstance(store, RaggedStore) else 0


class Plain:
    """A store as anybody would write it first: a list of (position, key, value) for each head."""

    def __init__(self, heads: list[list[tuple[int, Tensor, Tensor]]], seen: int) -> None:
        self.heads, self.seen = heads, seen

    def append(self, keys: Tensor, values: Tensor) -> None:
        group = len(self.heads) // KV_HEADS
        for head, entries in enumerate(self.heads):
            for token in range(keys.shape[1]):
                entries.append((self.seen + token, keys[head // group, token], values[head // group, token]))
        self.seen += keys.shape[1]

    def fork(self) -> Plain:
        return Plain([list(entries) for entries in self.heads], self.seen)

    def column(self, which: int) -> list[list[object]]:
        return [[entry[which] for entry in entries] for entries in self.heads]


def some(generator: torch.Generator, heads: int, tokens: int) -> Tensor:
    return torch.randn(heads, tokens, DIM, generator=generator)


def assert_rows(actual: list[Tensor], expected: list[list[object]]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, torch.stack(theirs) if theirs else torch.empty(0, DIM))  # type: ignore[arg-type]


def physical_bytes(store: Store) -> int:
    """What the allocator gave for the tensors of a store, whatever part of it the store says it uses."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(store)}.values())


class StoreMachine(RuleBasedStateMachine):
    """Stores and plain lists, side by side; forks join them, and all of them are compared after each event."""

    pairs: list[tuple[Store, Plain]]
    group: int
    generator: torch.Generator

    def begin(self, seed: int, group: int) -> None:
        self.group = group
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, which: int) -> tuple[Store, Plain]:
        return self.pairs[which % len(self.pairs)]

    def chosen_positions(self, count: int, prompt: int) -> Tensor:
        return torch.randperm(prompt, generator=self.generator)[:count].sort().values

    @rule(which=st.integers(0, 9), tokens=st.sampled_from([1, 1, 1, 2, 7, 40]), skipped=st.sampled_from([0, 0, 0, 3]))
    def append(self, which: int, tokens: int, skipped: int) -> None:
        store, plain = self.pick(which)
        plain.seen += skipped
        keys, values = some(self.generator, KV_HEADS, tokens), some(self.generator, KV_HEADS, tokens)
        store.append(keys, values, plain.seen)
        plain.append(keys, values)

    @precondition(lambda self: len(self.pairs) < 5)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        store, plain = self.pick(which)
        self.pairs.append((store.fork(), plain.fork()))

    @invariant()
    def all_say_the_same(self) -> None:
        for store, plain in self.pairs:
            assert store.lengths() == [len(entries) for entries in plain.heads]
            assert [each.tolist() for each in store.positions()] == plain.column(0)
            assert all(each.dtype == torch.int64 for each in store.positions())
            assert_rows(store.keys(), plain.column(1))
            assert_rows(store.values(), plain.column(2))

    @invariant()
    def a_query_reads_what_is_kept(self) -> None:
        for store, plain in self.pairs:
            query = torch.arange(2.0 * len(plain.heads))[:, None, None].expand(-1, 1, DIM)
            reading = store.read(query)
            pieces = reading.pieces(query)
            assert torch.equal(torch.cat([part for part, _, _ in pieces]), query)
            assert all(len(part) == 2 * len(keys) for part, keys, _ in pieces), "queries beside their own heads"
            assert_rows([head for _, keys, _ in pieces for head in keys], plain.column(1))
            assert_rows([head for _, _, values in pieces for head in values], plain.column(2))
            for (_, keys, _), positions in zip(pieces, reading.positions_by_piece(), strict=True):
                assert positions.shape in {(1, keys.shape[1]), keys.shape[:2]}
            rows = [
                row
                for (_, keys, _), at in zip(pieces, reading.positions_by_piece(), strict=True)
                for row in at.expand(len(keys), -1)
            ]
            assert [row.tolist() for row in rows] == plain.column(0)

    @invariant()
    def bytes_are_those_of_the_allocator(self) -> None:
        for store, plain in self.pairs:
            assert store.nbytes() == physical_bytes(store)
            entries = sum(store.lengths())
            room = len(plain.heads) * max(16, max(store.lengths()) // 8)
            assert (
                0
                <= store.nbytes() - entries * ENTRY_BYTES
                <= entries * POSITION_BYTES + room * (ENTRY_BYTES + POSITION_BYTES) + bookkeeping(store)
            )


class DenseMachine(StoreMachine):
    @initialize(
        seed=st.integers(0, 999),
        group=st.sampled_from([1, 2]),
        count=st.integers(1, 20),
        positions=st.sampled_from(["none", "one row", "a row a head"]),
    )
    def start(self, seed: int, group: int, count: int, positions: str) -> None:
        self.begin(seed, group)
        heads, prompt = KV_HEADS * group, count if positions == "none" else count + 9
        keys, values = some(self.generator, heads, count), some(self.generator, heads, count)
        rows = [self.chosen_positions(count, prompt) for _ in range(heads)]
        if positions == "one row":
            rows = rows[:1] * heads
        explicit = {"none": None, "one row": rows[0][None].int(), "a row a head": torch.stack(rows).int()}[positions]
        store = DenseStore(keys, values, explicit)
        stored_positions = 0 if explicit is None else explicit.numel()
        assert store.nbytes() == heads * count * ENTRY_BYTES + stored_positions * POSITION_BYTES
        entries = [list(zip(rows[head].tolist(), keys[head], values[head], strict=True)) for head in range(heads)]
        self.pairs = [(store, Plain(entries, prompt))]

    @rule(which=st.integers(0, 9), share=st.floats(0.05, 1))
    def keep(self, which: int, share: float) -> None:
        store, plain = self.pick(which)
        assert isinstance(store, DenseStore)
        length = store.lengths()[0]
        index = torch.stack([self.chosen_positions(max(1, int(share * length)), length) for _ in plain.heads])
        store.keep(index)
        plain.heads = [
            [entries[each] for each in row] for entries, row in zip(plain.heads, index.tolist(), strict=True)
        ]
        assert store.nbytes() == index.numel() * (ENTRY_BYTES + POSITION_BYTES), "eviction is physical"


class RaggedMachine(StoreMachine):
    @initialize(
        seed=st.integers(0, 999),
        group=st.sampled_from([1, 2]),
        counts=st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any),
    )
    def start(self, seed: int, group: int, counts: list[int]) -> None:
        self.begin(seed, group)
        counts, prompt = counts[: KV_HEADS * group], 30
        keys, values = ([some(self.generator, 1, count)[0] for count in counts] for _ in range(2))
        positions = [self.chosen_positions(count, prompt) for count in counts]
        store = RaggedStore(keys, values, [each.int() for each in positions])
        assert 0 <= store.nbytes() - sum(counts) * (ENTRY_BYTES + POSITION_BYTES) <= bookkeeping(store)
        heads = zip(positions, keys, values, strict=True)
        self.pairs = [(store, Plain([list(zip(p.tolist(), k, v, strict=True)) for p, k, v in heads], prompt))]


quick = settings(max_examples=40, stateful_step_count=12, deadline=None)
TestDenseStore = DenseMachine.TestCase
TestDenseStore.settings = quick
TestRaggedStore = RaggedMachine.TestCase
TestRaggedStore.settings = quick


@pytest.mark.parametrize("ragged", [False, True])
def test_forks_with_room_to_grow_write_apart(ragged: bool) -> None:
    keys, positions = torch.zeros(2, 5, DIM), torch.arange(5, dtype=torch.int32).expand(2, -1)
    trunk: Store = RaggedStore(list(keys), list(keys), list(positions)) if ragged else DenseStore(keys, keys, positions)
    trunk.append(keys[:, :1], keys[:, :1], 5)  # now there is room behind the entries, which forks share
    branches = [trunk, trunk.fork(), trunk.fork()]
    branches.append(branches[1].fork())
    for step in range(3):
        for number, branch in enumerate(branches):
            token = torch.full((2, 1, DIM), 10.0 * number + step)
            branch.append(token, -token, 6 + step)
    for number, branch in enumerate(branches):
        for head in range(2):
            assert branch.keys()[head][6:, 0].tolist() == [10 * number + step for step in range(3)]
            assert branch.values()[head][6:, 0].tolist() == [-10 * number - step for step in range(3)]
            assert branch.positions()[head].tolist() == list(range(9))


@pytest.mark.parametrize("ragged", [False, True])
def test_a_step_does_not_copy_the_store(ragged: bool) -> None:
    tensors = [torch.randn(64, 8) for _ in range(2)]
    positions = [torch.arange(64, dtype=torch.int32)] * 2
    dense = DenseStore(torch.stack(tensors), torch.stack(tensors), torch.stack(positions))
    store = RaggedStore(tensors, tensors, positions) if ragged else dense
    buffers, new = [], torch.randn(2, 1, 8)
    for token in range(400):
        store.append(new, new, 64 + token)
        buffers.append(tensors_of(store)[0].data_ptr())
    moves = sum(a != b for a, b in pairwise(buffers))
    assert moves < 20, "buffers grow by an eighth, so 64 -> 464 entries takes about sixteen moves"


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(ragged: bool, dtype: torch.dtype) -> None:
    keys = torch.randn(2, 5, 8).to(dtype)
    positions = torch.arange(5, dtype=torch.int32).expand(2, -1)
    store = RaggedStore(list(keys), list(keys), list(positions)) if ragged else DenseStore(keys, keys, positions)
    assert 0 <= store.nbytes() - 2 * 5 * (2 * 8 * 2 + POSITION_BYTES) <= bookkeeping(store)
    store.append(keys[:, :1], keys[:, :1], 5)
    assert {each.dtype for each in (*store.keys(), *store.values())} == {dtype}


def layer(tokens: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    """q [8, tokens, 16], k and v [2, tokens, 16]; the first KV head has far sharper attention than the second."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(heads, tokens, 16, generator=generator) for heads in (8, 2, 2))
    k[0] *= 3
    return q, k, v


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
def test_heads_with_budgets_of_their_own_weigh_their_sum(granularity: str) -> None:
    method = load_method("adakv", budget=32, kv_cache_granularity=granularity, floor=0.1)
    store = compress_layer(method, *layer())
    lengths, entry = store.lengths(), 2 * 16 * 4 + POSITION_BYTES
    assert max(lengths) > 1.2 * min(lengths)
    assert store.nbytes() == physical_bytes(store) < len(lengths) * max(lengths) * entry
    assert 0 <= store.nbytes() - sum(lengths) * entry <= bookkeeping(store)
    store.append(torch.zeros(2, 1, 16), torch.zeros(2, 1, 16), 90)
    room = max(16, max(lengths) // 8)
    assert store.nbytes() <= (sum(lengths) + len(lengths) * (1 + room)) * entry + bookkeeping(store)


EVICTING = [
    name
    for name, entry in sorted(get_registry().methods.items())
    if issubclass(entry.attention, EvictionMethod) and entry.plugin.distribution == "kvfactory"
    if entry.attention.finish is EvictionMethod.finish  # others hold the prompt until it has passed through all layers
]


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
@pytest.mark.parametrize("name", EVICTING)
def test_what_a_store_lets_go_of_is_free(name: str, granularity: str) -> None:
    """No method keeps a view of the whole prompt: what it holds is what it counts, and that follows its budget."""
    own = small_settings(name, 1, 2, 16, skip_layers=())
    full = compress_layer(load_method("fullkv"), *layer())
    store = compress_layer(load_method(name, budget=24, kv_cache_granularity=granularity, **own), *layer())
    heads = 8 if granularity == "query_head" else 2
    assert len(store.lengths()) == heads
    assert store.nbytes() == physical_bytes(store)
    assert store.nbytes() / heads < 0.5 * full.nbytes() / 2
    if type(store) in (DenseStore, RaggedStore):
        entries = sum(store.lengths()) * (2 * 16 * 4 + POSITION_BYTES)
        assert 0 <= store.nbytes() - entries <= bookkeeping(store)


@given(st.data())
def test_what_grows_never_changes_behind_anybody(data: st.DataObject) -> None:
    numbers = iter(range(10_000))

    def some() -> Tensor:
        count = data.draw(st.integers(0, 40))
        return torch.tensor([[next(numbers) for _ in range(count)]] * 2)[..., None]

    first = some()
    twins = [(Growing(first), first)]
    for _ in range(data.draw(st.integers(1, 12))):
        (growing, held), later = data.draw(st.sampled_from(twins)), some()
        twins.append((growing.joined(later), torch.cat([held, later], 1)))
        assert all(torch.equal(each.read(), expected) for each, expected in twins)
    longest = max(twins, key=lambda twin: twin[0].length)[0]
    assert longest.nbytes <= 8 * 2 * (longest.length + longest.length // 32 + 40)


def test_what_grows_is_rarely_copied() -> None:
    growing, copies = Growing(torch.zeros(2, 640, 1)), 0
    for _ in range(64):
        before, growing = growing.held, growing.joined(torch.ones(2, 1, 1))
        copies += growing.held is not before
    assert growing.read().sum() == 128 and copies == 3
